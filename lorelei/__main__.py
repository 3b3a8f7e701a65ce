"""python -m lorelei."""

from lorelei.cli.main import main

if __name__ == "__main__":
    main()
