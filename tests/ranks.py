"""What several processes measure in the tests, and one process as well."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import sharpkit as sk
from sharpkit.errors import SharpkitError

N = 37
Given = Callable[[Any], Any]  # data of one process as those of several


def network(*, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(6)] if batch_norm else []
    return nn.Sequential(nn.Linear(5, 6), *norm, nn.Tanh(), nn.Linear(6, 3)).double().eval()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=g).double(), torch.randint(0, 3, (n,), generator=g)


class Tokens(nn.Module):
    """Outputs (n, positions, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x).cumsum(1)))


def sentences() -> tuple[Tensor, Tensor]:
    """Of the first half hardly any label counts."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 7, (16, 5), generator=g)
    labels = torch.randint(0, 7, (16, 5), generator=g)
    labels[:8, 1:] = -100
    labels[:7] = -100
    return tokens, labels


def vectors(size: int) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return torch.randn(size, 2, generator=g, dtype=torch.float64)


def product(operator: Any) -> list[Any]:
    return [operator @ vectors(operator.shape[0]), operator.gradient, operator.loss, operator.n]


def weighted_loss() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.arange(1.0, 8.0).double(), label_smoothing=0.1)


def sharpness(given: Given, **options: Any) -> list[Any]:
    found = sk.m_sharpness(network(), given(data()), **options)
    groups = [*found.group_values.values(), *found.group_weights.values()]
    return [found.value, found.std_error, found.n, *groups, *found.group_sizes.values()]


def tracked(given: Given, n: int | None = 20) -> list[Any]:
    """A training in which all processes have the same batch, so that it is that of one."""
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measures = ["loss", "stability", "trace", "critical_sharpness", "distance"]
    if n is not None:
        measures.append(sk.MSharpness(m=4, rho=0.05))
    tracker = sk.Tracker(given((x, y)), measures=measures, every=2, n=n)
    for step in range(3):
        tracker(model, optimizer, step=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return numbers(tracker)


def numbers(tracker: sk.Tracker) -> list[list[float]]:
    """Of every row all but the time."""
    return [[float(v) for k, v in row.items() if k != "seconds"] for row in tracker.rows]


def slq(given: Given, **options: Any) -> list[Any]:
    H = sk.HessianOperator(network(), given(data()))
    found = sk.spectral_density(H, steps=12, probes=2, **options)
    return [found.nodes, found.weights, found.density]


# name -> what is measured, of data that `given` makes those of all processes
MEASURED: dict[str, Callable[[Given], list[Any]]] = {
    "Hessian": lambda given: product(sk.HessianOperator(network(), given(data()))),
    "nothing kept": lambda given: product(
        sk.HessianOperator(network(), given(data()), memory_budget=0, chunk=5)
    ),
    "Gauss-Newton": lambda given: product(sk.GaussNewtonOperator(network(), given(data()))),
    "Fisher": lambda given: product(sk.FisherOperator(network(), given(data()))),
    "empirical Fisher": lambda given: product(
        sk.FisherOperator(network(), given(data()), kind="empirical")
    ),
    "ignored tokens": lambda given: product(
        sk.HessianOperator(Tokens().double(), given(sentences()))
    ),
    "weighted tokens": lambda given: product(
        sk.FisherOperator(
            Tokens().double(), given(sentences()), kind="empirical", loss=weighted_loss()
        )
    ),
    "trace": lambda given: [
        sk.trace(sk.HessianOperator(network(), given(data())), products=12).value,
        sk.trace(sk.HessianOperator(network(), given(data())), products=8, method="xtrace").value,
    ],
    "diagonal": lambda given: [
        sk.diagonal(sk.GaussNewtonOperator(network(), given(data())), products=12).values
    ],
    "spectral density": slq,
    "sharded basis": lambda given: slq(given, shard_basis=True),
    "eigenvalues": lambda given: [
        sk.top_eigenvalues(sk.HessianOperator(network(), given(data())), 3).values
    ],
    "m-sharpness, token groups": lambda given: [
        sk.m_sharpness(
            Tokens().double(), given(sentences()), m=2, rho=0.1, seed=None, engine="loop"
        ).value
    ],
}
OF_SHARES: dict[str, Callable[[Given], list[Any]]] = {
    "m-sharpness, m=4": lambda given: sharpness(given, m=4, rho=0.1, seed=None),
    "tracker": lambda given: tracked(given, n=None),
}
OF_ALL_DATA: dict[str, Callable[[Given], list[Any]]] = {
    "n of them": lambda given: product(sk.HessianOperator(network(), given(data()), n=11, seed=5)),
    "m-sharpness": lambda given: sharpness(given, m=[2, 3], rho=[0.1, 0.5]),
    "average": lambda given: sharpness(given, m=4, rho=0.1, average=True, steps=2, n=30, seed=1),
    "restarts": lambda given: sharpness(
        given, m=4, rho=0.1, ascent="pgd", steps=2, restarts=2, adaptive=True
    ),
    "one group": lambda given: sharpness(given, m=N, rho=0.1),
    "tracker": tracked,
    "data set": lambda given: [
        sk.m_sharpness(network(), given(Counted()), m=3, rho=0.1, n=20, seed=2).value
    ],
}
# rounding is divided by the step
DIFFERENCES = {
    "Hessian": lambda given: [
        sk.HessianOperator(network(), given(data()), method="finite_difference") @ vectors(57)
    ],
    "Gauss-Newton": lambda given: [
        sk.GaussNewtonOperator(network(), given(data()), method="finite_difference") @ vectors(57)
    ],
}


class Counted(Dataset):
    """Items that know how often they were read; one of them cannot be, on some rank."""

    def __init__(self, broken: int = -1) -> None:
        self.x, self.y = data()
        self.read: list[int] = []
        self.broken = broken

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read.append(i)
        if i == self.broken:
            raise OSError("the disk is gone")
        return self.x[i], self.y[i]


class Several:
    """Data in the hands of one of several processes."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def all_data(self, given: Any) -> sk.DistributedData:
        return sk.DistributedData(given)

    def shares(self, given: tuple[Tensor, Tensor]) -> sk.DistributedData:
        """The first process has four, and the last what is left."""
        n = len(given[1])
        cuts = [0, *(4 * (r + 1) for r in range(self.world - 1)), n]
        mine = slice(cuts[self.rank], cuts[self.rank + 1])
        return sk.DistributedData((given[0][mine], given[1][mine]), shares=True)


def refusals(several: Several) -> Iterator[tuple[str, Callable[[], object]]]:
    """What ends all processes with a message, by a name."""
    rank, last = several.rank, several.rank == several.world - 1
    x, y = data()
    everyone = sk.DistributedData((x, y))
    broken = sk.DistributedData(Counted(N - 1 if last else -1))
    yield "a broken item", lambda: sk.HessianOperator(network(), broken)
    holes = x.clone()
    holes[0] = torch.nan if last else 0.0
    yield "NaN", lambda: sk.m_sharpness(network(), sk.DistributedData((holes, y)), m=1, rho=0.1)
    other = network()
    with torch.no_grad():
        other[0].bias += rank
    yield "weights", lambda: sk.HessianOperator(other, everyone)
    yield "weights, m-sharpness", lambda: sk.m_sharpness(other, everyone, m=1, rho=0.1)
    yield "buffers", lambda: sk.HessianOperator(with_statistics(rank), everyone)
    loss = "mse" if last else "cross_entropy"
    yield "loss", lambda: sk.GaussNewtonOperator(network(), everyone, loss=loss)
    some = ["0.weight", "2.bias"][: 1 + last]
    yield "parameters", lambda: sk.HessianOperator(network(), everyone, parameters=some)
    yield "rho", lambda: sk.m_sharpness(network(), everyone, m=1, rho=0.1 + rank)
    yield "a bad m", lambda: sk.m_sharpness(network(), everyone, m=0 if last else 1, rho=0.1)
    yield "n", lambda: sk.HessianOperator(network(), everyone, n=5 + rank)
    yield "tolerance", lambda: sk.m_sharpness(network(), everyone, m=1, rho=0.1, tolerance=0.1)
    few = sk.DistributedData((x[:1], y[:1]))
    yield "few", lambda: sk.HessianOperator(network(), few)
    yield (
        "other data",
        lambda: sk.HessianOperator(network(), sk.DistributedData((x.roll(rank, 0), y))),
    )
    yield (
        "another number",
        lambda: sk.HessianOperator(network(), sk.DistributedData((x[rank:], y[rank:]))),
    )
    yield "twins", lambda: sk.HessianOperator(network(), sk.DistributedData((x, y), shares=True))
    mine = several.shares((x, y))
    yield "a group on two ranks", lambda: sk.m_sharpness(network(), mine, m=3, rho=1.0, seed=None)
    yield "a seed for shares", lambda: sk.m_sharpness(network(), mine, m=4, rho=1.0)
    operator = sk.HessianOperator(network(), everyone, memory_budget=0)
    yield "seed", lambda: sk.trace(operator, seed=rank, products=6)
    changed = x.clone()
    late = sk.HessianOperator(network(), sk.DistributedData((changed, y)), memory_budget=0)
    changed[-1] += last
    yield "changed", lambda: late.to_dense()
    sampler = DistributedSampler(TensorDataset(x, y), several.world, rank)
    loader = DataLoader(TensorDataset(x, y), 4, sampler=sampler)
    yield "a sampler", lambda: sk.HessianOperator(network(), sk.DistributedData(loader))
    padded = DataLoader(TensorDataset(x, y), 4, sampler=sampler)
    yield "padding", lambda: sk.HessianOperator(network(), sk.DistributedData(padded, shares=True))
    yield "a measure", lambda: sk.Tracker(everyone, measures=["loss", "gradient_noise"])
    yield (
        "one process alone",
        lambda: sk.compare_models(network(), network(), everyone, m=1, rho=0.1),
    )


def with_statistics(rank: int) -> nn.Module:
    model = network(batch_norm=True)
    model[1].running_mean += rank
    return model


def message(action: Callable[[], object]) -> str:
    """The error that an action raises, as text."""
    try:
        action()
    except SharpkitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def rows_of_ddp(several: Several, *, together: bool) -> tuple[Any, dict[str, Tensor]]:
    """Rows of a tracker in a training by DistributedDataParallel, and the weights at its end."""
    model = network(batch_norm=True)
    wrapped = DistributedDataParallel(model)
    x, y = data(8 * several.world)
    probe: Any = sk.DistributedData((x, y)) if together else (x, y)
    tracker = None
    if together or several.rank == 0:
        tracker = sk.Tracker(probe, measures=["loss", "lambda_max"], every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = slice(8 * several.rank, 8 * several.rank + 8)
    for step in range(3):
        if tracker is not None:
            tracker(wrapped, optimizer, step=step)
        wrapped.train()
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
        optimizer.step()
    return None if tracker is None else numbers(tracker), model.state_dict()


def work(rank: int, world: int, folder: str) -> None:
    """All of the above, in one of several processes; at the end the last one is killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    several, found = Several(rank, world), dict[str, Any]()
    for name, measure in {**MEASURED, **OF_ALL_DATA}.items():
        found[name] = measure(several.all_data)
    for name, measure in {**MEASURED, **OF_SHARES}.items():
        found[f"shares: {name}"] = measure(several.shares)
    for name, measure in DIFFERENCES.items():
        found[f"differences: {name}"] = measure(several.shares)
    items = Counted()
    operator = sk.GaussNewtonOperator(network(), sk.DistributedData(items))
    found["read"] = sorted(set(items.read))
    found["text"] = repr(sk.DistributedData(items))
    found["errors"] = {name: message(action) for name, action in refusals(several)}
    found["ddp"] = rows_of_ddp(several, together=True), rows_of_ddp(several, together=False)
    half = distributed.new_group([0])
    if rank == 0:
        alone = sk.DistributedData(data(), process_group=half)
        found["subgroup"] = product(sk.HessianOperator(network(), alone))
    else:
        found["outside"] = message(lambda: sk.DistributedData(data(), process_group=half))
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    v = vectors(operator.shape[0])
    text = message(lambda: [operator @ v for _ in range(3)])
    (Path(folder) / f"{rank}.txt").write_text(text)


def start(world: int, folder: Path) -> list[dict[str, Any]]:
    """What every rank found."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(r, world, str(folder))) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1500)  # gloo gives up waiting after 1800 s: a rank that was left alone is late
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [*[0] * (world - 1), -signal.SIGKILL]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world)]


def same_bits(a: list[Any], b: list[Any]) -> bool:
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)]
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)
