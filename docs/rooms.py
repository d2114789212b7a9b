"""The picture of the package's rooms and of who imports whom, from the sources themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from imports import GRAPH, ROOMS, room_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def levels() -> dict[str, int]:
    """Each folder of the package -> how many folders stand below it, one on another."""
    below: dict[str, set[str]] = {}
    folders = {room_of(m) for m in GRAPH if m.count(".") > 1}
    for module, imported in GRAPH.items():
        room = room_of(module)
        if room in folders:
            others = {room_of(other) for other in imported}
            below.setdefault(room, set()).update((others & folders) - {room})
    found: dict[str, int] = {}
    for room in (room for room in ROOMS if room in below):
        found[room] = max((found[other] + 1 for other in below[room]), default=0)
    return found


def draw() -> Figure:
    """The rooms, each above all that it imports; what is a single file is not shown."""
    import matplotlib.pyplot as plt

    level = levels()
    rows: dict[int, list[str]] = {}
    for room, row in level.items():
        rows.setdefault(row, []).append(room)
    place = {
        room: ((k + 0.5) / len(row) * 10, height)
        for height, row in rows.items()
        for k, room in enumerate(row)
    }
    figure, ax = plt.subplots(figsize=(7.5, 0.85 * len(rows) + 0.4))
    drawn = set()
    for module, imported in GRAPH.items():
        for other in imported:
            pair = room_of(module), room_of(other)
            if pair[0] == pair[1] or pair in drawn or not place.keys() >= set(pair):
                continue
            drawn.add(pair)
            ax.annotate(
                "",
                xy=place[pair[1]],
                xytext=place[pair[0]],
                arrowprops={"arrowstyle": "->", "color": "0.75", "shrinkA": 12, "shrinkB": 14},
            )
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#e8f0f8", "edgecolor": "#4878a8"}
        ax.text(x, y, room, ha="center", va="center", bbox=box, fontsize=10)
    ax.set(xlim=(-0.5, 10.5), ylim=(-0.6, len(rows) - 0.4))
    ax.axis("off")
    figure.tight_layout()
    return figure
