"""Who imports whom within the package, and which of its rooms stands on which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sharpkit

ROOT = Path(sharpkit.__file__).parent
# a room, which is a folder or a file of the package, imports from rooms further up in this list
ROOMS = (
    *("errors", "safe_text", "files", "doors", "containers", "settings", "tensor_files"),
    *("importing", "memory", "channels_last", "compiling", "device", "display", "progress"),
    *("download", "digests"),
    *("contract", "run_directory", "workers", "groupwise", "curvature", "sharpness", "training"),
    *("measures", "evaluation", "plot", "landscapes", "tracking", "data", "zoo", "datasets"),
    *("zoo_training", "runs", "report", "cli", "__main__"),
)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in ROOT.rglob("*.py")}


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements in a tree, those in functions too, without those for type checkers."""
    if isinstance(tree, ast.Import | ast.ImportFrom):
        yield tree
    checked = isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test)
    for child in tree.orelse if checked else ast.iter_child_nodes(tree):
        yield from imports(child)


def _imported(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for statement in imports(ast.parse(path.read_text("utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        else:
            assert statement.level == 0, f"{path}: relative import"
            for alias in statement.names:
                inner = f"{statement.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(statement.module))
    return found & set(MODULES)


GRAPH = {module: _imported(path) - {module} for module, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]
