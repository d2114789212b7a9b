"""Where the images of a zoo that comes without lie."""

from __future__ import annotations

import os

from sharpkit.data.published import EXPECTED, Published, images_in, known_place
from sharpkit.errors import ZooFormatError
from sharpkit.zoo.checkpoints.source import Source
from sharpkit.zoo.files import is_folder

_KEPT = ("cifar10", "cifar100", "svhn")  # by load_dataset


def images_of(source: Source) -> Published:
    """The files of a task's data set: the user's in `images`, or where they are usually kept.

    Raises:
        ZooFormatError: They are in none of the places.
    """
    places = [source.path / "images", source.path.parent / "images" / source.name]
    for place in places:
        if os.path.lexists(place):  # a link to nowhere too
            if is_folder(place) and (found := images_in(place)):
                return found
            raise ZooFormatError(f"{place}: no data set in it; expected {EXPECTED}")
    data_set = source.data_set
    if found := known_place(data_set):
        return found
    again = data_set.replace("_", "-")
    offer = f'; or sk.load_dataset("{again}") once, which keeps it' if data_set in _KEPT else ""
    raise ZooFormatError(
        f"{source.path}: such a zoo comes without images, and they are not here: put "
        f"{data_set or 'them'}, or a link to the folder that has it, at {places[0]} or at "
        f"{places[1]}: {EXPECTED}{offer}"
    )
