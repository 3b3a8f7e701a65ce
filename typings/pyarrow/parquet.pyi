from pathlib import Path
from typing import Any

class Schema:
    names: list[str]

class Table:
    def to_pylist(self) -> list[dict[str, Any]]: ...

def read_schema(where: Path) -> Schema: ...
def read_table(source: Path) -> Table: ...
