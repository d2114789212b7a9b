"""Spectral norms of layers as the linear maps that they are, and the margin in their units."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.loading import Data, load_in_order
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.margins import margin_squared, output_margin
from sharpkit.measures.norms import frobenius_squared, products
from sharpkit.measures.passes import images
from sharpkit.measures.weight_layers import Convolution, WeightLayer, weight_layers

_DENSE = 64  # up to this many inputs a convolution is written out as a matrix
# residual of the eigenvalue: with 1e-6, Lanczos steps can end at a close neighbour of the largest
_TOLERANCE = 1e-12


def spectral_norm(layer: WeightLayer, weight: Tensor | None = None) -> float:
    """The largest singular value of a layer's linear map.

        ‖A‖₂ = max ‖A x‖₂ / ‖x‖₂

    For a matrix it is found from the eigenvalues of the smaller Gram matrix. For a convolution A
    maps the whole feature map, at the size, stride, padding and dilation at which the network
    uses it, and is never formed: the largest eigenvalue of AᵀA comes from Lanczos steps (ARPACK)
    of convolution and transposed convolution, started from a fixed vector. The Fourier formula of
    Sedghi et al. (2019) would be exact for circular padding only; the norm of the kernel reshaped
    to a matrix can be wrong by the square root of the number of its cells.

    Args:
        layer: A layer of `weight_layers`.
        weight: Another weight in its place, same shape.

    Returns:
        float: ‖A‖₂, to about 1e-8 (relative).

    Raises:
        ModelError: If a convolution was not reached by the forward pass, so that its input size is
            unknown, or the iteration does not converge.

    Example:
        >>> import torch
        >>> model = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.zeros(1, 1, 2, 2), torch.tensor([0])
        >>> round(spectral_norm(weight_layers(model, data)[0]), 6)  # every output sums all inputs
        4.0
    """
    weight = layer.weight if weight is None else weight
    if layer.module is None:
        rows, columns = weight.shape
        gram = weight @ weight.T if rows <= columns else weight.T @ weight
        return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))
    if layer.input_shape is None:
        raise ModelError(
            f"{layer.name}: the forward pass does not call this layer, so its input is unknown"
        )
    return _largest_singular_value(
        _linear_map(layer.module, layer.pad, weight), layer.input_shape, weight, layer.name
    )


def _linear_map(
    module: Convolution, pad: nn.Module | None, weight: Tensor
) -> Callable[[Tensor], Tensor]:
    state = {"weight": weight}
    if module.bias is not None:
        state["bias"] = torch.zeros_like(module.bias, dtype=weight.dtype)

    def apply(x: Tensor) -> Tensor:
        padded = x if pad is None else pad(x)
        out: Tensor = torch.func.functional_call(module, state, (padded,))
        return out

    return apply


def _largest_singular_value(
    apply: Callable[[Tensor], Tensor], shape: tuple[int, ...], weight: Tensor, name: str
) -> float:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size = math.prod(shape)
    if not bool(weight.any()):
        return 0.0
    if size <= _DENSE:
        with torch.no_grad():
            basis = torch.eye(size, dtype=weight.dtype, device=weight.device)
            columns = apply(basis.view(size, *shape)).flatten(1)
        return float(torch.linalg.matrix_norm(columns, ord=2))
    zero = torch.zeros((1, *shape), dtype=weight.dtype, device=weight.device)
    transpose = torch.func.vjp(apply, zero)[1]

    def normal(x: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(x.reshape(1, *shape), dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            product: np.ndarray = transpose(apply(v))[0].flatten().cpu().numpy()
        return product

    start = np.random.default_rng(0).standard_normal(size)
    operator = LinearOperator((size, size), matvec=normal, dtype=np.float64)
    try:
        values = eigsh(
            operator, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False
        )
    except ArpackNoConvergence as error:
        raise ModelError(f"{name}: the spectral norm did not converge ({error})") from error
    return math.sqrt(max(float(values[0]), 0.0))


def spectral_norms(model: nn.Module, data: Data, *, percentile: float = 10.0) -> dict[str, float]:
    """Products and sums of the layers' spectral norms, plain and divided by the margin.

    With d layers, s_i = ‖W_i‖₂² and the margin γ (see `output_margin`):

        log_product              Σ log s_i
        log_sum                  log d + (Σ log s_i) / d
        log_product_over_margin  Σ log s_i − 2 log|γ|
        log_sum_over_margin      log d + (Σ log s_i − 2 log|γ|) / d
        stable_rank              Σ ‖W_i‖_F² / s_i
        log_complexity           log_product_over_margin + log stable_rank

    Logarithms, because the products leave every floating-point range; ranks are the same. With
    convolutions as linear maps, ‖W‖_F is still that of the kernel, as in the papers. Cost: a few
    dozen single-example products per convolution; one forward pass for the margin.

    Args:
        model: Any module with weight matrices or convolutions; BatchNorm is folded in.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        percentile: Of the margins, 0 to 100.

    Returns:
        dict: Name to value.

    Raises:
        ModelError: For a weight that is zero, or a margin of zero.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equations 30 to 35; Bartlett et al., NeurIPS 2017.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> norms = spectral_norms(model, (torch.eye(2), torch.tensor([0, 1])))
        >>> round(norms["stable_rank"], 4)  # (9 + 1) / 9
        1.1111
    """
    layers = weight_layers(model, data)
    squares = [spectral_norm(layer) ** 2 for layer in layers]
    values = products(layers, squares, margin_squared(model, data, percentile))
    ranks = [frobenius_squared(layer.weight) / s for layer, s in zip(layers, squares, strict=True)]
    values["stable_rank"] = sum(ranks)
    values["log_complexity"] = values["log_product_over_margin"] + math.log(sum(ranks))
    return values


def normalized_margin(model: nn.Module, data: Data, *, percentile: float = 10.0) -> float:
    """The margin divided by the Lipschitz bound that the spectral norms give.

        γ / (Π ‖W_i‖₂ · mean ‖x‖₂)

    Unlike γ itself it does not change if a ReLU network without biases is scaled, nor if its
    inputs are. Cost: one forward pass, and the spectral norms.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        percentile: 0 to 100.

    Returns:
        float: Larger is better; negative as γ.

    Raises:
        DataError: For inputs that are not a tensor of real numbers, or all zero.
        ModelError: For a weight that is zero.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        After Bartlett et al., NeurIPS 2017, whose normaliser has, besides this product, the
        factor of (2,1)-norms that `spectral_norms` reports through its stable ranks.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = 5 * torch.eye(2)
        >>> data = torch.tensor([[3.0, 4.0]]), torch.tensor([1])
        >>> round(normalized_margin(model, data), 6)  # (20 − 15) / (5 · 5)
        0.2
    """
    margin = output_margin(model, data, percentile=percentile)
    inputs = images(load_in_order(data), "the normalised margin")
    size = float(inputs.double().flatten(1).norm(dim=1).mean())
    norms = [spectral_norm(layer) for layer in weight_layers(model, data)]
    if size == 0:
        raise DataError("all inputs are zero: the margin cannot be normalised by their norm")
    if min(norms) == 0:
        raise ModelError("a weight is zero: the margin cannot be normalised by its norm")
    # a product of logarithms: neither overflows nor underflows
    bound = sum(math.log(norm) for norm in norms) + math.log(size)
    return math.copysign(math.exp(math.log(abs(margin)) - bound), margin) if margin else 0.0
