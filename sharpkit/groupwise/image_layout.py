"""In which memory layout images go through a model."""

from __future__ import annotations

import torch
from torch import nn

from sharpkit.channels_last import NeedsChannelsFirst
from sharpkit.contract.checks import Probe, close
from sharpkit.contract.functional import FunctionalModel
from sharpkit.groupwise.objective import in_layout


def image_layout(function: FunctionalModel, probe: Probe) -> torch.memory_format:
    """Channels-last for images on a CPU, where that is faster, safe, and the model takes it."""
    few = probe.examples
    images = few.uniform and any(isinstance(m, nn.Conv2d) for m in function.model.modules())
    if function.device.type != "cpu" or not images:
        return torch.contiguous_format
    with function.evaluating(), function.assigned({}), NeedsChannelsFirst() as seen:
        try:
            other = function.outputs(in_layout(few.inputs, torch.channels_last))
        except Exception:  # a view of what is no longer contiguous
            return torch.contiguous_format
    safe = close(probe.outputs, other) and not seen.found
    return torch.channels_last if safe else torch.contiguous_format
