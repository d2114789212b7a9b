"""Before torchvision is imported: no downloads, and its operators where its binary cannot load."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # the networks are small: more threads would wait for one another

# torchvision registers the shapes of these two at import; a CUDA build beside a CPU build of torch
# cannot load the binary that declares them
_SCHEMAS = [f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for name in ("nms", "qnms")]  # fmt: skip


def _declared_operators() -> torch.library.Library | None:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        return library
    return None


_library = _declared_operators()  # the declarations live as long as this object
