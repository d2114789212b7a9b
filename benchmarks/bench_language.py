"""Curvature products of a language model with a large vocabulary: their memory and their time.

    python benchmarks/bench_language.py [--quick]

A GPT-2 of 10 M parameters in plain PyTorch with 50,257 tokens, tied embeddings, 8 sequences of 128
tokens: one tensor of (tokens x vocabulary) takes 206 MB, five times the weights. Memory is the peak
of a process of its own above what it holds with model and data, in that of one plain gradient of
all sequences: for making an operator and multiplying, also with no graph kept, and for m-sharpness
and the gradient of m-SAM with groups of m sequences. Time is that of a product in gradients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import Case, Record, in_turn, over, parser, run_cases
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk

VOCABULARY, WIDTH, LAYERS, HEADS = 50_257, 160, 6, 4
SEQUENCES, TOKENS = 8, 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mixed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.mixed(self.norms[0](x)).view(n, tokens, 3, HEADS, width // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks, self.norm = (
            nn.Sequential(*(Block() for _ in range(LAYERS))),
            nn.LayerNorm(WIDTH),
        )
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.words.weight)


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    words = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1))
    return GPT2().eval(), (words[:, :-1], words[:, 1:])


def gradient(model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten()).backward()

    return run


OPERATORS = {
    "Hessian": sk.HessianOperator,
    "Gauss-Newton": sk.GaussNewtonOperator,
    "Fisher": sk.FisherOperator,
}


GROUPED = ("m-sharpness", "m-SAM")


def product(name: str, model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], object]:
    kind, _, kept = name.partition(", ")
    options = {"memory_budget": 0} if kept else {}
    matrix = OPERATORS[kind](model, data, progress=False, **options)
    vector = torch.randn(matrix.shape[0])
    return lambda: matrix.matvec(vector)


def by_groups(name: str, model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], object]:
    kind, _, m = name.partition(", m = ")
    if kind == "m-sharpness":
        return lambda: sk.m_sharpness(model, data, m=int(m), rho=0.05, progress=False)
    return lambda: sk.m_sam_gradient(model, *data, m=int(m), rho=0.05)


def memory(arguments: argparse.Namespace) -> Iterator[Record]:
    """Peaks, each of a process of its own."""
    names = [*OPERATORS, *(f"{name}, no graph kept" for name in OPERATORS)]
    one = peak_of("gradient")
    yield Record("one gradient", "PyTorch", "MB above model and data", [one / 1e6])
    for name in names:
        case = f"memory of an operator and a product, {name}"
        target = "" if name.endswith("kept") else "<= 1.6"
        yield Record(case, "sharpkit", "of one gradient", [peak_of(name) / one], target)
    for kind in GROUPED:
        for m in (1, SEQUENCES // 2, SEQUENCES):
            name = f"{kind}, m = {m}"
            peak = [peak_of(name) / one]
            yield Record(f"memory of {name}", "sharpkit", "of one gradient", peak, "<= 1.6")


def peak_of(name: str) -> int:
    command = [sys.executable, __file__, "--worker", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def worker(name: str) -> None:
    model, data = problem()
    before = peak_memory()
    if name == "gradient":
        run = gradient(model, data)
    else:
        run = (by_groups if name.startswith(GROUPED) else product)(name, model, data)
    run()
    print(json.dumps(peak_memory() - before))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def time(arguments: argparse.Namespace) -> Iterator[Record]:
    """Products beside gradients, in turns."""
    model, data = problem()
    runs = {"gradient": gradient(model, data)}
    for name in OPERATORS:
        runs[name] = product(name, model, data)
    for run in runs.values():
        run()
    times = in_turn(runs, 2 if arguments.quick else 5)
    for name in OPERATORS:
        ratios = over(times, name, "gradient")
        yield Record(f"product, {name}", "sharpkit", "gradients", ratios, "<= 3")


CASES: dict[str, Case] = {"memory": memory, "time": time}


def main() -> None:
    options = parser(__doc__, CASES)
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    else:
        run_cases(arguments, CASES)


if __name__ == "__main__":
    main()
