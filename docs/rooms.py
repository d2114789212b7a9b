"""The picture of the package's rooms and of who imports whom, from the sources themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from imports import GRAPH, ROOMS, room_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


INSIDE = {
    module: {other for other in imported if "." in other}
    for module, imported in GRAPH.items()
    if "." in module
}


def below() -> dict[str, set[str]]:
    """Each folder of the package -> the folders that it imports."""
    folders = {room_of(m) for m in INSIDE if m.count(".") > 1}
    found: dict[str, set[str]] = {room: set() for room in ROOMS if room in folders}
    for module, imported in INSIDE.items():
        room = room_of(module)
        if room in folders:
            found[room] |= (set(map(room_of, imported)) & folders) - {room}
    return found


def draw() -> Figure:
    """The rooms, each above all that it imports, with arrows to those reached through no other."""
    import matplotlib.pyplot as plt

    imported = below()
    reached: dict[str, set[str]] = {}  # in any number of steps
    level: dict[str, int] = {}
    for room, others in imported.items():  # from the lowest
        reached[room] = others.union(*(reached[other] for other in others))
        level[room] = max((level[other] + 1 for other in others), default=0)
    rows: dict[int, list[str]] = {}
    for room, row in level.items():
        rows.setdefault(row, []).append(room)
    place = {
        room: ((k + 0.5) / len(row) * 10, height)
        for height, row in rows.items()
        for k, room in enumerate(row)
    }
    figure, ax = plt.subplots(figsize=(7.5, 0.85 * len(rows) + 0.4))
    for room, others in imported.items():
        for other in others - set().union(*(reached[o] for o in others)):
            arrow = {"arrowstyle": "->", "color": "0.6", "shrinkA": 12, "shrinkB": 14}
            ax.annotate("", xy=place[other], xytext=place[room], arrowprops=arrow)
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#e8f0f8", "edgecolor": "#4878a8"}
        ax.text(x, y, room, ha="center", va="center", bbox=box, fontsize=10)
    ax.set(xlim=(-0.5, 10.5), ylim=(-0.6, len(rows) - 0.4))
    ax.axis("off")
    figure.tight_layout()
    return figure
