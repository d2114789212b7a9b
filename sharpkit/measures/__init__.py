"""Generalization measures: callables (model, data, *, seed) -> value, or values by setting."""

from sharpkit.measures.box_sharpness import accuracy_sharpness, sharpness_radius
from sharpkit.measures.catalog import (
    FunctionMeasure,
    make_measure,
    measure_names,
    standard_measures,
)
from sharpkit.measures.curvature import (
    EigenvalueRatio,
    HessianRank,
    HessianTrace,
    MaxEigenvalue,
)
from sharpkit.measures.distance import distance_from_initial
from sharpkit.measures.gradients import fisher_rao_norm, gradient_noise, jacobian_norm
from sharpkit.measures.heavy_tails import PowerLaw, fit_power_law, heavy_tail_exponent
from sharpkit.measures.layer_margins import all_layer_margin
from sharpkit.measures.m_sharpness import MSharpness
from sharpkit.measures.margins import (
    inverse_margin,
    normalized_margin,
    output_margin,
    training_loss,
)
from sharpkit.measures.measure import Estimate, Measure
from sharpkit.measures.norms import depth, frobenius_norms, parameter_count, path_norm
from sharpkit.measures.pac_bayes import noise_scale, pac_bayes, pac_bayes_magnitude
from sharpkit.measures.recorded import TrainingSteps
from sharpkit.measures.representations import (
    davies_bouldin,
    effective_rank,
    representation_variance,
)
from sharpkit.measures.robustness import augmentation_inconsistency, mixup_error
from sharpkit.measures.sharpness import average_sharpness, worst_case_sharpness
from sharpkit.measures.spectral import spectral_norm, spectral_norms

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
    "TrainingSteps",
    "accuracy_sharpness",
    "all_layer_margin",
    "augmentation_inconsistency",
    "average_sharpness",
    "davies_bouldin",
    "depth",
    "distance_from_initial",
    "effective_rank",
    "fisher_rao_norm",
    "fit_power_law",
    "frobenius_norms",
    "gradient_noise",
    "heavy_tail_exponent",
    "inverse_margin",
    "jacobian_norm",
    "make_measure",
    "measure_names",
    "mixup_error",
    "noise_scale",
    "normalized_margin",
    "output_margin",
    "pac_bayes",
    "pac_bayes_magnitude",
    "parameter_count",
    "path_norm",
    "representation_variance",
    "sharpness_radius",
    "spectral_norm",
    "spectral_norms",
    "standard_measures",
    "training_loss",
    "worst_case_sharpness",
]
