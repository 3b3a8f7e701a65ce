"""One runner for the benchmarks. Run it from the repository root.

usage: python -m benchmarks                    all of them in turn, but gpu
       python -m benchmarks NAME [CASE ...]    one
       python -m benchmarks page               write docs/benchmarks.md from benchmarks/results
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.page import BENCHMARKS, PAGE, page


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            failed = [name for name in BENCHMARKS if name != "gpu" and not _ran(name, [])]
        case ["page"]:
            PAGE.write_text(page())
            failed = []
        case [name, *cases] if name in BENCHMARKS:
            failed = [] if _ran(name, cases) else [name]
        case [name, *_]:
            sys.exit(f"error: there is no benchmark {name!r}; use {', '.join(BENCHMARKS)} or page")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed")


def _ran(name: str, cases: list[str]) -> bool:
    """A process for each: what one leaves in memory is not another's."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *cases])
    return done.returncode == 0


if __name__ == "__main__":
    main(sys.argv[1:])
