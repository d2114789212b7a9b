"""Generalization measures: callables (model, data, *, seed) -> value, or values by setting."""

from sharpkit.measures.all_layer_margins import all_layer_margin
from sharpkit.measures.box_sharpness import accuracy_sharpness, sharpness_radius
from sharpkit.measures.catalog import (
    FunctionMeasure,
    direction,
    make_measure,
    measure_names,
    standard_measures,
)
from sharpkit.measures.clusters_and_mixup import davies_bouldin_mixup
from sharpkit.measures.constrained_margins import constrained_margin
from sharpkit.measures.critical import critical_sharpness
from sharpkit.measures.curvature import (
    EigenvalueRatio,
    HessianRank,
    HessianTrace,
    MaxEigenvalue,
    SoftRank,
)
from sharpkit.measures.distance import distance_from_initial
from sharpkit.measures.geodesic import geodesic_sharpness
from sharpkit.measures.gradients import fisher_rao_norm, gradient_noise, jacobian_norm
from sharpkit.measures.heavy_tails import PowerLaw, fit_power_law, heavy_tail_exponent
from sharpkit.measures.layer_margins import hidden_layer_margin
from sharpkit.measures.m_sharpness import MSharpness
from sharpkit.measures.margins import inverse_margin, output_margin, training_loss
from sharpkit.measures.measure import Estimate, Measure
from sharpkit.measures.norms import depth, frobenius_norms, parameter_count
from sharpkit.measures.pac_bayes import noise_scale, pac_bayes, pac_bayes_magnitude
from sharpkit.measures.path_norms import path_norm
from sharpkit.measures.perturbation_response import gi_score, pal_score, perturbation_response
from sharpkit.measures.perturbed_margins import augmented_margin, mixup_margin
from sharpkit.measures.recorded import TrainingSteps
from sharpkit.measures.relative_flatness import relative_flatness
from sharpkit.measures.representations import (
    davies_bouldin,
    effective_rank,
    representation_variance,
)
from sharpkit.measures.robustness import augmentation_inconsistency, mixup_error
from sharpkit.measures.sharpness import average_sharpness, worst_case_sharpness
from sharpkit.measures.spectral import normalized_margin, spectral_norm, spectral_norms
from sharpkit.measures.transport_margins import k_variance_margin
from sharpkit.measures.weight_spectra import weight_spectrum

__all__ = [
    "EigenvalueRatio",
    "Estimate",
    "FunctionMeasure",
    "HessianRank",
    "HessianTrace",
    "MSharpness",
    "MaxEigenvalue",
    "Measure",
    "PowerLaw",
    "SoftRank",
    "TrainingSteps",
    "accuracy_sharpness",
    "all_layer_margin",
    "augmentation_inconsistency",
    "augmented_margin",
    "average_sharpness",
    "constrained_margin",
    "critical_sharpness",
    "davies_bouldin",
    "davies_bouldin_mixup",
    "depth",
    "direction",
    "distance_from_initial",
    "effective_rank",
    "fisher_rao_norm",
    "fit_power_law",
    "frobenius_norms",
    "geodesic_sharpness",
    "gi_score",
    "gradient_noise",
    "heavy_tail_exponent",
    "hidden_layer_margin",
    "inverse_margin",
    "jacobian_norm",
    "k_variance_margin",
    "make_measure",
    "measure_names",
    "mixup_error",
    "mixup_margin",
    "noise_scale",
    "normalized_margin",
    "output_margin",
    "pac_bayes",
    "pac_bayes_magnitude",
    "pal_score",
    "parameter_count",
    "path_norm",
    "perturbation_response",
    "relative_flatness",
    "representation_variance",
    "sharpness_radius",
    "spectral_norm",
    "spectral_norms",
    "standard_measures",
    "training_loss",
    "weight_spectrum",
    "worst_case_sharpness",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
