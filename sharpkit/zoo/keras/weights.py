"""Keras 2 HDF5 weight files: read into a model, read raw, and written.

A file is matched to a model by the order of the layers that have weights; names carry no meaning.
Everything a file declares is checked against the model and the file's size before memory is taken.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sharpkit.doors import shown
from sharpkit.errors import ModelError, ZooFormatError
from sharpkit.files import atomic_path
from sharpkit.zoo.keras.hdf5 import open_layers, read_array
from sharpkit.zoo.keras.layer import Slot

if TYPE_CHECKING:
    from sharpkit.zoo.keras.model import KerasModel

_ATTRIBUTE_LIMIT = 64_000  # bytes; HDF5 keeps at most 64 KiB in an object header
_KERAS_VERSION = b"2.15.0"


def read_weights(path: str | Path) -> list[list[NDArray[np.float32]]]:
    """The arrays of a Keras 2 HDF5 weight file, per layer that has any, in Keras' own layout.

    Args:
        path: A file written by `Model.save_weights` of Keras 2, or by `write_weights`.

    Returns:
        list: One list of float32 arrays for each layer with weights, in the model's order.

    Raises:
        ZooFormatError: Not such a file, damaged, or with NaN or infinite entries.

    Example:
        >>> import tempfile
        >>> from sharpkit.zoo.keras.model import build_model
        >>> model = build_model(
        ...     {"input_shape": [3], "model_config": [{"layer_name": "Dense", "units": 2}]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_weights(model, Path(folder, "weights.hdf5"))
        ...     [[kernel, bias]] = read_weights(Path(folder, "weights.hdf5"))
        >>> kernel.shape, bias.shape
        ((3, 2), (2,))
    """
    path = Path(path)
    with open_layers(path) as layers:
        return [[read_array(path, name, d) for d in datasets] for name, datasets in layers]


def load_weights(model: KerasModel, path: str | Path) -> None:
    """Put the weights of a Keras 2 HDF5 file into a model.

    A model on the meta device gets new CPU tensors; any other keeps its own tensors and devices.
    Nothing changes unless the whole file is good.

    Args:
        model: Built by `build_model`.
        path: The weight file.

    Raises:
        ZooFormatError: Damaged file, other number of layers or arrays, other shapes, NaN or
            infinite entries; names the file and the layer.

    Example:
        >>> from sharpkit.zoo import build_model, embedded_zoo
        >>> entry = embedded_zoo()["fashion_mnist_14x14"]["0"]
        >>> model = entry.load("initial")
        >>> load_weights(model, entry.path / "weights.hdf5")  # now the final ones
        >>> torch.equal(next(model.parameters()), next(entry.load().parameters()))
        True
    """
    path = Path(path)
    with open_layers(path) as layers:
        loaded = [
            (slot.target, slot.to_torch(torch.from_numpy(read_array(path, name, dataset))))
            for name, slot, dataset in _match(model, path, layers)
        ]
    assign_weights(model, loaded)


def assign_weights(model: KerasModel, loaded: Iterable[tuple[str, Tensor]]) -> None:
    """Set parameters and buffers by their dotted names; what no file has is then zero."""
    for target, value in loaded:
        _assign(model, target, value)
    for module in model.modules():  # BatchNorm's step counter is not in the file
        counter = getattr(module, "num_batches_tracked", None)
        if isinstance(counter, Tensor) and counter.is_meta:
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)


def weights_to_write(model: KerasModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files keep of a state dict, on the CPU.

    Raises:
        ModelError: A weight is missing, of another shape, not float32, or NaN or infinite.
    """
    slots = [slot for _, of_layer in model.slots for slot in of_layer]
    checked = {slot.target: _checked(state, slot) for slot in slots}
    for slot in slots:
        if (shape := tuple(checked[slot.target].shape)) != slot.torch_shape:
            raise ModelError(f"{slot.target} has shape {shape}; expected {slot.torch_shape}")
    return checked


def check_weights(model: KerasModel, path: str | Path) -> None:
    """Check that a weight file opens and fits the model, without reading its numbers.

    Raises:
        ZooFormatError: As `load_weights`, except that entries are not looked at.
    """
    path = Path(path)
    with open_layers(path) as layers:
        _match(model, path, layers)


def write_weights(
    model: KerasModel, path: str | Path, *, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model's weights as a Keras 2 HDF5 file that Keras and `load_weights` read.

    Args:
        model: Built by `build_model`; gives the layers and, by default, the weights.
        path: The file to write, replaced in one step.
        state: A `state_dict` of this model to write instead, such as the one at initialisation.

    Raises:
        ModelError: A weight is missing, not float32, or NaN or infinite.

    Example:
        >>> import tempfile
        >>> from sharpkit.zoo import embedded_zoo
        >>> model = embedded_zoo()["fashion_mnist_14x14"]["0"].load()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_weights(model, Path(folder, "weights.hdf5"))
        ...     [[a.shape for a in layer] for layer in read_weights(Path(folder, "weights.hdf5"))]
        [[(3, 3, 1, 10), (10,)], [(490, 32), (32,)], [(32, 10), (10,)]]
    """
    content = weights_content(model, state)
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(content.getbuffer())


def weights_content(model: KerasModel, state: Mapping[str, Tensor] | None = None) -> io.BytesIO:
    """What `write_weights` writes, in memory: where a disk is full, HDF5 fails as it closes a file.

    Raises:
        ModelError: As there.
    """
    import h5py

    state = model.state_dict() if state is None else state
    arrays = [
        (name, [(slot.keras_name, _to_array(state, slot)) for slot in slots])
        for name, slots in model.slots
    ]
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        _write_names(file, "layer_names", [name for name, _ in arrays])
        file.attrs["backend"] = np.bytes_(b"tensorflow")
        file.attrs["keras_version"] = np.bytes_(_KERAS_VERSION)
        for name, layer in arrays:
            group = file.create_group(name)
            _write_names(group, "weight_names", [f"{name}/{weight}" for weight, _ in layer])
            for weight, array in layer:
                group.create_dataset(f"{name}/{weight}", data=array)
    return content


# --- reading ---------------------------------------------------------------------------------


def _match(
    model: KerasModel, path: Path, found: list[tuple[str, list[Any]]]
) -> list[tuple[str, Slot, Any]]:
    """Pair each array of the file with its place in the model, by order; shapes must agree."""
    expected = [(name, slots) for name, slots in model.slots if slots]
    if len(found) != len(expected):
        raise ZooFormatError(
            f"{path}: has {len(found)} layers with weights; the config has {len(expected)}"
        )
    matched = []
    for (file_name, datasets), (name, slots) in zip(found, expected, strict=True):
        shapes = [tuple(d.shape) for d in datasets]
        wanted = [slot.keras_shape for slot in slots]
        if shapes != wanted:
            raise ZooFormatError(
                f"{path}: layer {shown(file_name)} has arrays of shapes {shown(shapes)}; "
                f"layer {name!r} of the config needs {wanted}"
            )
        matched += [(file_name, s, d) for s, d in zip(slots, datasets, strict=True)]
    return matched


def _assign(model: nn.Module, target: str, value: Tensor) -> None:
    """Set a parameter or buffer by its dotted name."""
    owner_name, _, name = target.rpartition(".")
    owner = model.get_submodule(owner_name)
    current = getattr(owner, name)
    if not current.is_meta:
        with torch.no_grad():
            current.copy_(value)
    elif isinstance(current, nn.Parameter):
        setattr(owner, name, nn.Parameter(value))
    else:
        setattr(owner, name, value)


# --- writing ---------------------------------------------------------------------------------


def _to_array(state: Mapping[str, Tensor], slot: Slot) -> NDArray[np.float32]:
    array: NDArray[np.float32] = slot.to_keras(_checked(state, slot)).contiguous().numpy()
    return array


def _checked(state: Mapping[str, Tensor], slot: Slot) -> Tensor:
    if slot.target not in state:
        raise ModelError(f"the state to write has no {slot.target!r}")
    tensor = state[slot.target].detach().cpu()
    if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{slot.target} must be finite float32 to be written, got {tensor.dtype}")
    return tensor


def _write_names(group: Any, key: str, names: list[str]) -> None:
    """An attribute with a list of names, split into key0, key1, ... where it is too long."""
    encoded = (
        np.array([n.encode("utf-8") for n in names], dtype="S") if names else np.array([], "S1")
    )
    parts = -(-encoded.nbytes // _ATTRIBUTE_LIMIT)
    if parts <= 1:
        group.attrs[key] = encoded
        return
    for part, piece in enumerate(np.array_split(encoded, parts)):
        group.attrs[f"{key}{part}"] = piece
