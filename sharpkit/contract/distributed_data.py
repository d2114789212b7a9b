"""Data that several processes measure together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sharpkit.contract.ranks import Team

if TYPE_CHECKING:
    from sharpkit.contract.loading import Data


class DistributedData:
    """Data that the processes of `torchrun` measure together, each its share of the examples.

    `HessianOperator`, `GaussNewtonOperator`, `FisherOperator`, `layer_spectra`, `m_sharpness` and
    `Tracker` take it in the place of data; what multiplies an operator (`spectral_density`,
    `top_eigenvalues`, `trace`, `diagonal`, ...) then works together, too. Every process makes the
    same calls with the same arguments and weights, and gets the same result, bit for bit; it is
    that of one process but for rounding. In a process on its own it stands for the data themselves,
    so that a script runs with and without `torchrun`.

    Args:
        data: What one process would be given, the same on every rank: each reads the part that it
            measures. With `shares=True`, this rank's own part; all parts together, in the order of
            ranks, are the examples, and they may differ in size.
        shares: Whether each rank gives its own part.
        process_group: The processes that take part; None for torch's default group, which
            `torch.distributed.init_process_group()` makes.

    Raises:
        ArgumentError: If `torchrun` started several processes that have no process group yet.

    Example:
        >>> import torch
        >>> from sharpkit.curvature import HessianOperator, trace
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> H = HessianOperator(model, DistributedData((x, torch.zeros(2, 1))), loss="mse")
        >>> trace(H).value
        3.0
    """

    def __init__(
        self, data: Data, *, shares: bool = False, process_group: Any | None = None
    ) -> None:
        self.data, self.shares, self.process_group = data, shares, process_group
        self.team = Team.of(process_group)

    def __repr__(self) -> str:
        kind = "its own share on each" if self.shares else "the same data on each"
        return f"DistributedData({kind} of {self.team.world} ranks, this is rank {self.team.rank})"
