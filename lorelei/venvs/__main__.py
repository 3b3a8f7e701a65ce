"""usage: python -m lorelei.venvs KIND...   (make vllm, make sglang, make megatron)

Installs what is missing and prints the interpreters.
"""

from __future__ import annotations

import sys

from lorelei.venvs.install import install


def main() -> None:
    for kind in sys.argv[1:]:
        try:
            print(install(kind))  # noqa: T201
        except ValueError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
