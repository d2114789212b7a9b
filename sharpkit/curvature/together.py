"""Several vectors through one backward pass.

A small network keeps a GPU busy only while something is computed; most of the time of a product it
waits for the next operation to be launched. Vectors that go through the graph together, under
`torch.func.vmap`, share the launches, and a convolution with the weights of k vectors is one with k
times the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sharpkit.curvature.problem import Problem
from sharpkit.curvature.second_derivatives import Product, Tensors

# a network of this size computes for less time than its operations take to launch
_SMALL_WEIGHTS = 16 * 2**20
# bytes of graph times vectors: what a product writes besides the graph is about as large
_GPU_TOGETHER = 4 * 2**30


def vectors_together(graph: int, weights: Sequence[Tensor], free: int | None) -> int:
    """How many vectors share a backward pass: one on a CPU, and for large networks.

    `graph` is the bytes of one chunk's, `free` what the device has, None if that is unknown.
    """
    small = sum(w.nbytes for w in weights) <= _SMALL_WEIGHTS
    if weights[0].device.type != "cuda" or not small:
        return 1
    room = _GPU_TOGETHER if free is None else min(_GPU_TOGETHER, free // 4)
    return max(1, room // max(graph, 1))


def products_together(problem: Problem, product: Product, vectors: Tensors) -> Tensors:
    """The products with k vectors, each parameter with an axis of size k in front."""

    def one(vector: Tensors) -> list[Tensor]:
        return problem.filled(product(vector))

    found: list[Tensor] = torch.func.vmap(one)(list(vectors))
    return found


def can_go_together(problem: Problem, product: Product) -> bool:
    """Whether two vectors at once give what they give one by one: not all models can be batched."""
    device = problem.function.device
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    vectors = [draw(2, *w.shape, dtype=w.dtype) for w in problem.weights.values()]
    try:
        both = products_together(problem, product, vectors)
    except Exception:  # a backward pass that vmap cannot transform
        return False
    for i in range(2):
        one = problem.filled(product([v[i] for v in vectors]))
        error = torch.stack([(a[i] - b).norm() for a, b in zip(both, one, strict=True)]).norm()
        size = torch.stack([b.norm() for b in one]).norm()
        if not float(error) <= 1e-3 * float(size):
            return False
    return True
