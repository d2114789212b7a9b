"""This process's share of examples that several measure together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from sharpkit.contract.checksum import checksum
from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.examples import Examples
from sharpkit.contract.loading import Data, load_examples, load_part
from sharpkit.errors import ArgumentError, DataError


@dataclass(frozen=True)
class Share:
    """Examples of this rank, and where they are among those of all.

    Attributes:
        examples: This rank's; none where there are fewer multiples than ranks.
        first: The number of the first one.
        total: How many all ranks have.
    """

    examples: Examples
    first: int
    total: int


def read_share(
    data: Data | DistributedData,
    *,
    n: int | None = None,
    seed: int | None = None,
    multiple: int = 1,
    twice: bool = False,
) -> Share:
    """Of n examples in the order of `load_examples`, those that this rank measures.

    They are consecutive, and begin and end at a multiple, but for the end of all. With
    `DistributedData` every rank must call this.

    Args:
        data: Data of one process, of which all are its share, or `DistributedData`.
        n: As for `load_examples`; so is `seed`.
        multiple: Where shares begin.
        twice: Whether data that could give other examples in another pass are read again.

    Raises:
        ArgumentError: If each rank gives a share and anything else is asked for than all of them
            in order, or they do not end at multiples.
        DataError: As `load_examples`; for examples that differ between two passes; if ranks that
            should give the same data do not, or those with a share each give the same one.

    Example:
        >>> import torch
        >>> share = read_share((torch.zeros(5, 1), torch.arange(5)), n=3)
        >>> share.examples.labels, share.first, share.total
        (tensor([0, 1, 2]), 0, 3)
    """
    if not isinstance(data, DistributedData):
        examples = _repeatable(data, lambda: load_examples(data, n=n, seed=seed), twice)
        return Share(examples, 0, len(examples))
    if data.team.world == 1:
        return read_share(data.data, n=n, seed=seed, multiple=multiple, twice=twice)
    if data.shares:
        return _given(data, n, seed, multiple, twice)
    return _dealt(data, n, seed, multiple, twice)


def _dealt(
    data: DistributedData, n: int | None, seed: int | None, multiple: int, twice: bool
) -> Share:
    """A part of data that all ranks have."""
    team, mine = data.team, list[Examples]()

    def described() -> tuple[int, int]:
        if isinstance(data.data, DataLoader) and _distributed_sampler(data.data):
            raise DataError(
                "the DataLoader has a DistributedSampler, which gives each rank other examples: "
                "pass its data set, DistributedData(loader.dataset), or DistributedData(loader, "
                "shares=True)"
            )

        def load() -> tuple[Examples, Examples, int]:
            return load_part(data.data, lambda total: team.share(total, multiple), n=n, seed=seed)

        part, ends, total = load()
        if twice and _may_change(data.data) and len(part):
            _check_repeated(part, load()[0])
        mine.append(part)
        return checksum(ends), total

    found = team.gathered(described)
    for rank, other in enumerate(found):
        if other[1] != found[0][1]:
            raise DataError(
                f"rank 0 has {found[0][1]} examples, rank {rank} has {other[1]}: expected the same "
                "data on every rank; shares=True is for a share on each"
            )
        if other != found[0]:
            raise DataError(
                f"the first or last example differs between ranks 0 and {rank} (a shuffle with "
                "another seed, or a random transformation): expected the same data on every rank; "
                "shares=True is for a share on each"
            )
    total = found[0][1]
    return Share(mine[0], team.share(total, multiple).start, total)


def _given(
    data: DistributedData, n: int | None, seed: int | None, multiple: int, twice: bool
) -> Share:
    """The examples that this rank gives."""
    team, mine = data.team, list[Examples]()

    def described() -> tuple[int, int]:
        if n is not None or seed is not None:
            raise ArgumentError(
                f"n = {n}, seed = {seed}, and each rank gives a share: all of them are measured in "
                "order. Pass n=None and seed=None, or all data on every rank without shares=True"
            )
        if isinstance(data.data, DataLoader):
            _refuse_padding(data.data)
        mine.append(_repeatable(data.data, lambda: load_examples(data.data, seed=None), twice))
        # of a stream the few that its first pass keeps
        few = mine[0] if mine[0].in_memory else mine[0].diverse(32)
        return checksum(few), len(mine[0])

    found = team.gathered(described)
    _refuse_twins([fingerprint for fingerprint, _ in found])
    sizes = [size for _, size in found]
    for rank, size in enumerate(sizes[:-1]):
        if size % multiple:
            raise ArgumentError(
                f"rank {rank} has {size} examples: every share but the last must be a multiple of "
                f"{multiple} (of all m), or a group would lie on two ranks; give all data on every "
                "rank without shares=True"
            )
    return Share(mine[0], sum(sizes[: team.rank]), sum(sizes))


def _refuse_twins(fingerprints: Sequence[int]) -> None:
    for rank, one in enumerate(fingerprints):
        if one in fingerprints[:rank]:
            raise DataError(
                f"ranks {fingerprints.index(one)} and {rank} give the same examples: with "
                "shares=True each gives its own; leave it out where all have the same data"
            )


def _distributed_sampler(loader: DataLoader[Any]) -> DistributedSampler[Any] | None:
    sampler = loader.sampler
    return sampler if isinstance(sampler, DistributedSampler) else None


def _refuse_padding(loader: DataLoader[Any]) -> None:
    """Raise DataError where a DistributedSampler repeats examples to make shares equal."""
    sampler = _distributed_sampler(loader)
    if sampler is not None and sampler.total_size > len(loader.dataset):  # type: ignore[arg-type]
        raise DataError(
            f"the DistributedSampler makes {sampler.total_size} examples of the "
            f"{len(loader.dataset)} there are, by repeating some: "  # type: ignore[arg-type]
            "pass the data set on every rank, DistributedData(loader.dataset)"
        )


def _repeatable(data: Data, load: Callable[[], Examples], twice: bool) -> Examples:
    examples = load()
    if twice and _may_change(data) and examples.in_memory:  # a stream compares its own passes
        _check_repeated(examples, load())
    return examples


def _may_change(data: Data) -> bool:
    return not (isinstance(data, tuple | list) or type(data) is TensorDataset)


def _check_repeated(first: Examples, second: Examples) -> None:
    if checksum(first) != checksum(second):
        raise DataError(
            "the data differ between two passes: a sampler that shuffles, or a random "
            "transformation; every product of an operator must see the same examples"
        )
