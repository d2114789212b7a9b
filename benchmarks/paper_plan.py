"""What scoring the competition's zoos costs: arithmetic from their grids, and this machine's rate.

    python benchmarks/paper_plan.py [--device cuda] [--n 10000] [--batch 16]

A unit is one gradient pass and one forward pass over an example: 4 times the arithmetic of the
forward pass. The rate is that of the largest and smallest network of each grid, on one thread of a
CPU (its own seconds, whatever else runs) or on a GPU.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import nn

from sharpkit.zoo import build_model
from sharpkit.zoo_training.cost_counts import flops_of_an_example
from sharpkit.zoo_training.grid_file import read_plan, settings_of

INPUTS = {"task1": (32, 32, 3), "task2": (32, 32, 3), "task8": (28, 28, 1)}


def seconds_per_unit(config: dict, device: torch.device, batch: int, times: int = 3) -> float:
    """Seconds of a unit per example, the best of several measurements."""
    torch.manual_seed(0)
    model = build_model(config, device="cpu").to(device).eval()
    x = torch.randn(batch, *model.input_shape, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found = []
    for _ in range(times + 1):
        began = clock()
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            model(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - began)
    return min(found[1:]) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--n", default=10_000, type=int)
    parser.add_argument("--batch", default=16, type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task, shape in INPUTS.items():
        plan = read_plan(task)
        recipes = [replace(plan.recipe, **s) for s in settings_of(plan.grid).values()]
        configs = [recipe.network(shape, 10) for recipe in recipes]
        flops = [flops_of_an_example(recipe, shape, 10)[1] for recipe in recipes]
        print(
            f"{task}: {len(configs)} models in the grid, {min(flops) / 1e9:.3f} to "
            f"{max(flops) / 1e9:.3f}, mean {sum(flops) / len(flops) / 1e9:.3f} GFLOP per forward "
            f"pass; one unit over n = {arguments.n:,} for all of them: "
            f"{4 * sum(flops) * arguments.n / 1e15:.2f} PFLOP"
        )
        for pick in (min, max):
            chosen = pick(flops)
            config = configs[flops.index(chosen)]
            seconds = seconds_per_unit(config, arguments.device, arguments.batch)
            print(
                f"  {chosen / 1e9:.3f} GFLOP: {1000 * seconds:.2f} ms per example and unit, "
                f"{4 * chosen / seconds / 1e9:.1f} GFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
