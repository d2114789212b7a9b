"""Curvature of the loss: operators, Lanczos, spectral density, eigenvalues, traces."""

from sharpkit.curvature.block_result import LayerSpectra
from sharpkit.curvature.density import SpectralDensity
from sharpkit.curvature.diagonal import Diagonal, diagonal
from sharpkit.curvature.eigenvalues import Eigenpairs, top_eigenvalues
from sharpkit.curvature.fisher import FisherOperator
from sharpkit.curvature.gauss_newton import GaussNewtonOperator
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.lanczos import Tridiagonal, lanczos
from sharpkit.curvature.layer_spectra import layer_spectra
from sharpkit.curvature.operator import CurvatureOperator
from sharpkit.curvature.quadrature import spectral_density
from sharpkit.curvature.trace import Estimated, frobenius_norm, trace

__all__ = [
    "CurvatureOperator",
    "Diagonal",
    "Eigenpairs",
    "Estimated",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "LayerSpectra",
    "SpectralDensity",
    "Tridiagonal",
    "diagonal",
    "frobenius_norm",
    "lanczos",
    "layer_spectra",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
