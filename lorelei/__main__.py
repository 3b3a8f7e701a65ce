"""python -m lorelei."""

from lorelei.cli import main

if __name__ == "__main__":
    main()
