"""Imports go one way: between the three packages, and between the folders of each."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engines", "runtime", "vocabtrim_export")  # each imports itself and those before it


def imported(path: Path) -> Iterator[str]:
    """The modules that `path` imports anywhere in it, also within functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(module: str) -> str | None:
    """The folder that holds `module`; a module that lies in none but its package's is a room of its own."""
    path = ROOT / Path(*module.split("."))
    if not (path.is_dir() or path.with_suffix(".py").is_file()):
        return None  # a name that a module has
    parts = module.split(".")
    return ".".join(parts[: max(2, len(parts) - (not path.is_dir()))])


def graph(package: str) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        home = room(".".join(parts[:-1] if path.name == "__init__.py" else parts))
        used = {room(name) for name in imported(path) if name.split(".")[0] == package}
        rooms.setdefault(str(home), set()).update(used - {home, None})
    return rooms


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_folders(package):
    rooms = graph(package)
    assert len(rooms) > 5
    TopologicalSorter(rooms).prepare()  # raises CycleError, which names the folders


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_those_below_them_alone(package):
    above = set(PACKAGES[PACKAGES.index(package) + 1 :])
    barred = above if package == "vocabtrim_export" else above | {"torch", "transformers"}
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not barred & {name.split(".")[0] for name in imported(path)}, path
