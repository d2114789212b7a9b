"""Spectra of blocks of parameters, with what they leave out and how they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.curvature.coupling import ratio_of_sums
from sharpkit.curvature.density import SpectralDensity
from sharpkit.curvature.distances import spectral_distances
from sharpkit.curvature.trace import Estimated
from sharpkit.display import readable
from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def _heading(spectra: LayerSpectra) -> str:
    parts = [f"{len(spectra)} blocks"]
    if spectra.lengths is not None:
        share = spectra.cross_block_share
        parts.append(f"cross-block share {share.value:.3g} ± {share.std_error:.1g}")
    if len(spectra) > 1:
        parts.append(f"mean distance {spectra.mean_distance():.3g}")
    return ", ".join(parts)


@readable(_heading)
@dataclass(frozen=True, eq=False)
class LayerSpectra(Mapping[str, SpectralDensity]):
    """The spectral density of every block, by its name, and what the blocks together leave out.

    Attributes:
        spectra: Name of each block to its `SpectralDensity`; also what the object itself maps.
        lengths: ‖(A z_b)_a‖ for random signs z in block b, shape (probes, blocks a, blocks b); None
            if it was not asked for, or if blocks overlap.
        shared: Names of parameters that are in more than one block.
    """

    spectra: Mapping[str, SpectralDensity]
    lengths: Array | None
    shared: tuple[str, ...]

    def __getitem__(self, name: str) -> SpectralDensity:
        return self.spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spectra)

    def __len__(self) -> int:
        return len(self.spectra)

    @property
    def coupling(self) -> Array:
        """‖A_ab‖²_F / ‖A‖²_F of every pair of blocks, estimated, symmetric; the sum is 1.

        Raises:
            ArgumentError: If it was not estimated.
        """
        squares = self._squares().mean(axis=0)
        return np.asarray((squares + squares.T) / 2 / (squares.sum() or 1.0))

    @property
    def cross_block_share(self) -> Estimated:
        """1 − Σ_b ‖A_bb‖²_F / ‖A‖²_F: what of the matrix is outside of its diagonal blocks.

        Where it is large, the spectra of blocks say little of that of the whole.

        Raises:
            ArgumentError: If it was not estimated.
        """
        squares = self._squares()
        wholes = squares.sum(axis=(1, 2))
        across = wholes - np.trace(squares, axis1=1, axis2=2)
        products = squares.shape[0] * squares.shape[1]
        return Estimated(*ratio_of_sums(across, wholes), products, "hutchinson")

    def _squares(self) -> Array:
        """In units of the largest."""
        if self.lengths is None:
            why = "share_probes is 0: ask for some"
            if self.shared:
                why = (
                    f"{', '.join(self.shared[:3])} is in several blocks: give by= a mapping "
                    "that names every parameter once"
                )
            raise ArgumentError(f"the cross-block share was not estimated, since {why}")
        return np.asarray((self.lengths / (self.lengths.max() or 1.0)) ** 2)

    def distances(self, *, normalised: bool = True) -> pd.DataFrame:
        """Jensen-Shannon distance of the spectra of every two blocks, 0 to 1.

        As in `spectral_distances`: over the asinh of λ, smoothed, so that two estimates of one
        spectrum are not exactly 0 apart.

        Args:
            normalised: Divide each spectrum by its largest |λ|; with False a difference in scale
                counts too.

        Source:
            Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, section 2, on heterogeneity
            between blocks; axis and normalisation are this package's.
        """
        import pandas as pd

        found = spectral_distances(list(self.values()), normalised)
        return pd.DataFrame(found, index=list(self), columns=list(self))

    def mean_distance(self, *, normalised: bool = True) -> float:
        """The mean of `distances` over pairs of different blocks; NaN for a single block."""
        if len(self) < 2:
            return float("nan")
        matrix = self.distances(normalised=normalised).to_numpy()
        return float(matrix.sum() / (len(self) * (len(self) - 1)))

    def frame(self) -> pd.DataFrame:
        """One row per block: block, size, largest, smallest, trace, trace_std_error,
        frobenius_norm, own_share and cross_share of ‖A‖²_F (NaN if not estimated)."""
        import pandas as pd

        shares = np.full((len(self), len(self)), np.nan)
        if self.lengths is not None:
            shares = self.coupling
        return pd.DataFrame(
            {
                "block": name,
                "size": d.size,
                "largest": float(d.nodes.max()),
                "smallest": float(d.nodes.min()),
                "trace": d.trace,
                "trace_std_error": d.trace_std_error,
                "frobenius_norm": d.frobenius_norm,
                "own_share": float(shares[i, i]),
                "cross_share": float(shares[i].sum() - shares[i, i]),
            }
            for i, (name, d) in enumerate(self.items())
        )
