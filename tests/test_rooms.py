"""Walks every import of the package: a room imports only rooms below it, and never by a relative path."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "secateur"
# a room may import itself and what stands further down, not its neighbours on one floor; `data` stands above `models`,
# whose wheels its texts come out of
FLOORS = [
    ["cli"],
    ["recipe"],
    ["methods"],
    ["train", "evaluate", "export"],
    ["engine"],
    ["data"],
    ["models"],
    ["core"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """Return the room of `secateur.x.y`: a package's name, `cli` for the modules beside it."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "cli"


def imports(path: Path) -> list[tuple[int, str, int]]:
    """Return line, module and relative level of every import of a file, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or "", node.level))
            if node.module == "secateur":
                found += [(node.lineno, f"secateur.{alias.name}", 0) for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return ".".join(["secateur", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path):
    here = room_of(name_of(path))
    for line, module, level in imports(path):
        assert level == 0, f"{path.name}:{line} imports by a relative path"
        if not module.startswith("secateur.") or path == PACKAGE / "__init__.py":
            continue
        there = room_of(module)
        assert there == here or FLOOR[here] < FLOOR[there], (
            f"{path.name}:{line}: `{here}` imports `{module}` of `{there}`"
        )


def test_every_folder_is_a_room():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(FLOOR)


def test_no_file_has_a_name_that_says_nothing():
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common", "misc", "manager", "base"}


def test_packages_hold_no_code_of_their_own():
    for path in FILES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert not ast.parse(path.read_text(encoding="utf-8")).body[1:], f"{path} should be empty"


def test_a_wrong_import_would_be_found(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "def f():\n    from secateur import recipe\n    import secateur.engine.sweep\n    from . import x\n"
    )
    assert (2, "secateur.recipe", 0) in imports(path)
    assert (3, "secateur.engine.sweep", 0) in imports(path)
    assert (4, "", 1) in imports(path)
