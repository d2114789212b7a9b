"""One model from a file of weights and the function that builds it. Weights are never unpickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sharpkit.doors import reading, shown
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.importing import import_callable
from sharpkit.tensor_files import read_safetensors, read_torch

# where training scripts keep the weights inside a checkpoint
_KEYS = ("state_dict", "model_state_dict", "model")


def load_checkpoint(path: str | Path, build: str | Callable[[], Any]) -> nn.Module:
    """A model with the weights of a checkpoint, read without running code that the file may hold.

    Args:
        path: A .safetensors file, or one written by `torch.save` that holds tensors, numbers
            and text only: a state dict, also under the key "state_dict", "model_state_dict" or
            "model".
        build: A function that returns the model, or its name as "module:callable"; the module is
            looked for in the working directory as well. It is the only code that runs.

    Returns:
        nn.Module: In eval mode, on the device where `build` makes it.

    Raises:
        ModelError: If the file is missing or not readable without unpickling, or does not fit.
        ArgumentError: If `build` cannot be imported or gives no module.

    Example:
        >>> import tempfile, torch, sharpkit as sk
        >>> from pathlib import Path
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> path = Path(tempfile.mkdtemp()) / "epoch-9.pt"
        >>> torch.save({"epoch": 9, "state_dict": build().state_dict()}, path)
        >>> sk.load_checkpoint(path, build)
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    model = (import_callable(build) if isinstance(build, str) else build)()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{build} returned {type(model).__name__}: expected an nn.Module")
    state = _read_state(Path(path))
    where = f"{path} does not fit the model{f' of {build}' if isinstance(build, str) else ''}"
    with reading(where, ModelError, "its parameters and buffers"):
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # names all that is missing, left over or of another shape
            raise ModelError(f"{where}: {' '.join(str(error).split())}") from error
    return model.eval()


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint")
    read = read_safetensors if path.suffix == ".safetensors" else read_torch
    state: Any = read(path, f"{path}: cannot be read as plain tensors", ModelError)
    for key in _KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path}: expected a state dict of tensors")
    if unnamed := [key for key in state if not isinstance(key, str)]:
        raise ModelError(f"{path}: expected names of tensors, found the key {shown(unnamed[0])}")
    return state
