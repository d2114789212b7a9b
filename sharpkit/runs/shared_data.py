"""One copy of a task's examples for all workers of a machine."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from sharpkit.errors import RunError
from sharpkit.workers import Backend


def share(data: TensorDataset, backend: Backend, folder: Path) -> Any:
    """What to put into the items that need the data, instead of the data.

    Worker processes get files in the folder, which they map into memory, so that all see the same
    pages; on Ray the data are in its object store, once per node.

    Raises:
        RunError: The files cannot be written.
    """
    tensors = tuple(map(_row_major, data.tensors))
    if backend == "inline":
        return TensorDataset(*tensors)
    arrays = tuple(tensor.numpy() for tensor in tensors)
    if backend == "ray":
        import ray

        return ray.put(arrays)
    files = tuple(folder / f"{name}.npy" for name in ("inputs", "labels"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, array in zip(files, arrays, strict=True):
            np.save(file, array, allow_pickle=False)  # aligned as torch aligns: same kernels
    except OSError as error:
        raise RunError(f"{folder}: cannot write the data for the workers ({error})") from error
    return files


def _row_major(tensor: Tensor) -> Tensor:
    """The same numbers with the strides that a file gives them: kernels are chosen by strides.

    A tensor with a dimension of size 1 may be contiguous with other strides as well.
    """
    return tensor.contiguous().reshape(-1).view(tensor.shape)


def shared(handle: Any) -> TensorDataset:
    """The data behind what `share` returned."""
    return handle if isinstance(handle, TensorDataset) else _opened(handle)


@lru_cache(maxsize=1)  # items come task by task
def _opened(handle: Any) -> TensorDataset:
    if isinstance(handle, tuple):
        arrays = (np.load(file, mmap_mode="c", allow_pickle=False) for file in handle)
        return TensorDataset(*map(torch.from_numpy, arrays))
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the arrays are read-only, and only read
        return TensorDataset(*map(torch.from_numpy, ray.get(handle)))
