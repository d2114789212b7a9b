"""The few torch modules that Keras layers need and `torch.nn` lacks.

Feature maps are (n, channels, height, width); everything else has Keras' own axis order. All
forwards are pure tensor functions, so `torch.func` transforms apply to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pointwise(nn.Module):
    """An elementwise function of Keras: "exponential" or "hard_sigmoid" (slope 0.2, not 1/6)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """The function at each entry of x, any shape."""
        return x.exp() if self.kind == "exponential" else (0.2 * x + 0.5).clamp(0.0, 1.0)

    def extra_repr(self) -> str:
        """The function's name."""
        return self.kind


class ClippedReLU(nn.Module):
    """x above the threshold, cut at max_value; slope · (x − threshold) below the threshold."""

    def __init__(self, max_value: float | None, slope: float, threshold: float) -> None:
        super().__init__()
        self.max_value, self.slope, self.threshold = max_value, slope, threshold

    def forward(self, x: Tensor) -> Tensor:
        """The rectified entries of x, any shape."""
        below = self.slope * (x - self.threshold)
        upper = x if self.max_value is None else x.clamp(max=self.max_value)
        return torch.where(x > self.threshold, upper, below)

    def extra_repr(self) -> str:
        """The three settings."""
        return f"max_value={self.max_value}, slope={self.slope}, threshold={self.threshold}"


class EntrywisePReLU(nn.Module):
    """PReLU whose slopes have a full or partly shared shape; `weight` broadcasts over examples."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """max(x, 0) − weight · max(−x, 0)."""
        return F.relu(x) - self.weight * F.relu(-x)


class AxisLast(nn.Module):
    """Apply a module that works on the last axis to the channels of a feature map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The inner module over axis 1 of x, shape kept."""
        out: Tensor = self.inner(x.movedim(1, -1)).movedim(-1, 1)
        return out


class AxisSecond(nn.Module):
    """Apply a module that normalises axis 1 to the last axis of (n, a, b)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The inner module over the last axis of x, shape kept."""
        out: Tensor = self.inner(x.movedim(-1, 1)).movedim(1, -1)
        return out


class GlobalPool2d(nn.Module):
    """Mean or maximum over the positions of a feature map: (n, c, h, w) -> (n, c)."""

    def __init__(self, kind: str, keepdim: bool) -> None:
        super().__init__()
        self.kind, self.keepdim = kind, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """(n, c), or (n, c, 1, 1) with keepdim."""
        if self.kind == "mean":
            return x.mean((-2, -1), keepdim=self.keepdim)
        return x.amax((-2, -1), keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """Which pooling."""
        return f"{self.kind}, keepdim={self.keepdim}"


class UnevenAvgPool2d(nn.Module):
    """Average pooling with different padding on each side; padded cells do not count."""

    def __init__(
        self,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        pads: tuple[int, int, int, int],  # left, right, top, bottom, as F.pad takes them
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.pads = kernel, stride, pads

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h', w')."""
        inside = torch.ones((1, 1, *x.shape[-2:]), dtype=x.dtype, device=x.device)
        fraction = F.avg_pool2d(F.pad(inside, self.pads), self.kernel, self.stride)
        return F.avg_pool2d(F.pad(x, self.pads), self.kernel, self.stride) / fraction

    def extra_repr(self) -> str:
        """Window, stride and padding."""
        return f"kernel={self.kernel}, stride={self.stride}, pads={self.pads}"


class Rearrange(nn.Module):
    """Permute the axes, then reshape each example, then permute again; any step may be absent.

    This is Flatten, Reshape and Permute of Keras, whose order of a feature map is (h, w, c).
    """

    def __init__(
        self,
        before: tuple[int, ...] | None,
        shape: tuple[int, ...] | None,
        after: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.before, self.shape, self.after = before, shape, after

    def forward(self, x: Tensor) -> Tensor:
        """The rearranged examples; axis 0 stays."""
        if self.before is not None:
            x = x.permute(self.before)
        if self.shape is not None:
            x = x.reshape(x.shape[0], *self.shape)
        if self.after is not None:
            x = x.permute(self.after)
        return x

    def extra_repr(self) -> str:
        """The three steps."""
        return f"{self.before}, {self.shape}, {self.after}"
