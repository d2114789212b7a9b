"""Imports go one way: no circle of files, and no room knows of one above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import sharpkit

ROOT = Path(sharpkit.__file__).parent
# a room, which is a folder or a file of the package, imports from rooms further up in this list
ROOMS = (
    *("errors", "safe_text", "files", "doors", "containers", "settings", "tensor_files", "lock"),
    *("importing", "memory", "compiling", "device", "display", "progress", "download"),
    *("contract", "workers", "groupwise", "curvature", "sharpness", "training"),
    *("measures", "evaluation", "plot", "data", "zoo", "datasets", "zoo_training"),
    *("runs", "report", "cli", "__main__"),
)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in ROOT.rglob("*.py")}


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements in a tree, those in functions too, without those for type checkers."""
    if isinstance(tree, ast.Import | ast.ImportFrom):
        yield tree
    checked = isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test)
    for child in tree.orelse if checked else ast.iter_child_nodes(tree):
        yield from _imports(child)


def _imported(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for statement in _imports(ast.parse(path.read_text("utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        else:
            assert statement.level == 0, f"{path}: relative import"
            for alias in statement.names:
                inner = f"{statement.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(statement.module))
    return found & set(MODULES)


GRAPH = {module: _imported(path) - {module} for module, path in MODULES.items()}


def _room(module: str) -> str:
    return module.split(".")[1]


def test_no_files_import_each_other_in_a_circle() -> None:
    circles = []
    graph = {module: set(imported) for module, imported in GRAPH.items()}
    while True:
        try:
            TopologicalSorter(graph).prepare()
            break
        except CycleError as error:
            circle = error.args[1]  # each is imported by the next
            circles.append(" <- ".join(circle))
            graph[circle[1]].discard(circle[0])
    assert not circles, "\n".join(circles)


def test_no_room_imports_from_a_room_above_it() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module in sorted(GRAPH)
        for imported in sorted(GRAPH[module])
        if "sharpkit" not in (module, imported)  # the top itself has the version and lazy names
        and ROOMS.index(_room(imported)) > ROOMS.index(_room(module))
    ]
    assert not upwards, "\n".join(upwards)


def test_the_order_names_every_room() -> None:
    rooms = {_room(module) for module in MODULES if module != "sharpkit"}
    assert rooms - set(ROOMS) == set(), "write its place in ROOMS"


def test_an_import_within_a_function_is_seen_and_one_for_type_checkers_is_not() -> None:
    text = """
if TYPE_CHECKING:
    import sharpkit.zoo
else:
    import sharpkit.files
def f():
    from sharpkit import errors
"""
    found = [ast.unparse(statement) for statement in _imports(ast.parse(text))]
    assert found == ["import sharpkit.files", "from sharpkit import errors"]
