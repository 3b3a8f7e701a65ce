"""The files that a function of the user's is made of: its own, and the modules beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def code_files(file: Path) -> list[Path]:
    """A Python file, and every one in its folder that it imports, also through others.

    Found by reading, nothing is run: what is imported by a computed name, or from elsewhere, is
    not among them.
    """
    folder = file.resolve().parent
    found: dict[Path, None] = {}
    waiting = [file.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = None
        for name in filter(None, _imported(path, folder)):
            waiting += _beside(folder, name)
    return sorted(found)


def _imported(path: Path, folder: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, and of what it imports from them."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # whoever imports it says so
        return
    package = path.parent.relative_to(folder).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


def _beside(folder: Path, name: str) -> list[Path]:
    """The files that importing a module runs, where it lies in `folder`."""
    parts = name.split(".")
    packages = [folder.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return [*packages, folder.joinpath(*parts).with_suffix(".py")]
