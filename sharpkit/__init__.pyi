from . import (
    measures as measures,
    plot as plot,
)
from .contract.distributed_data import (
    DistributedData as DistributedData,
)
from .contract.precision import (
    precision as precision,
)
from .curvature import (
    FisherOperator as FisherOperator,
    GaussNewtonOperator as GaussNewtonOperator,
    HessianOperator as HessianOperator,
    SpectralDensity as SpectralDensity,
    diagonal as diagonal,
    frobenius_norm as frobenius_norm,
    layer_spectra as layer_spectra,
    spectral_density as spectral_density,
    top_eigenvalues as top_eigenvalues,
    trace as trace,
)
from .datasets import (
    load_dataset as load_dataset,
)
from .evaluation import (
    conditional_mutual_information as conditional_mutual_information,
)
from .landscapes import (
    Barrier as Barrier,
    Landscape as Landscape,
    barrier as barrier,
    landscape as landscape,
)
from .measures import (
    MSharpness as MSharpness,
)
from .report import (
    write_report as write_report,
)
from .runs import (
    Scores as Scores,
    combine as combine,
    evaluate as evaluate,
    score_models as score_models,
    score_zoo as score_zoo,
    selection_regret as selection_regret,
)
from .runs.figure3 import (
    Figure3 as Figure3,
    figure3 as figure3,
)
from .sharpness import (
    SharpnessResult as SharpnessResult,
    m_sharpness as m_sharpness,
)
from .sharpness.comparison import (
    ModelComparison as ModelComparison,
    compare_models as compare_models,
)
from .tracking import (
    Tracker as Tracker,
)
from .training import (
    SAM as SAM,
    FitResult as FitResult,
    build_architecture as build_architecture,
    fit as fit,
    m_sam_gradient as m_sam_gradient,
)
from .workers import (
    Workers as Workers,
)
from .zoo import (
    ModelEntry as ModelEntry,
    Task as Task,
    Zoo as Zoo,
    ZooWriter as ZooWriter,
    embedded_zoo as embedded_zoo,
    fetch_zoo as fetch_zoo,
    load_zoo as load_zoo,
    write_zoo as write_zoo,
    zoo_info as zoo_info,
)
from .zoo.checkpoint import (
    load_checkpoint as load_checkpoint,
)
from .zoo_training import (
    TrainingCost as TrainingCost,
    TrainingReport as TrainingReport,
    train_zoo as train_zoo,
    training_cost as training_cost,
)

__version__: str
