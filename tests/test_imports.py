"""Imports go one way: no circle of files, and no room knows of one above it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

from imports import GRAPH, MODULES, ROOMS, imports, room_of


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
        and ROOMS.index(room_of(imported)) > ROOMS.index(room_of(module))
    ]
    assert not upwards, "\n".join(upwards)


def test_the_order_names_every_room() -> None:
    rooms = {room_of(module) for module in MODULES if module != "sharpkit"}
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
    found = [ast.unparse(statement) for statement in imports(ast.parse(text))]
    assert found == ["import sharpkit.files", "from sharpkit import errors"]
