"""How far a model's importance maps agree with people's, and how far people agree."""

from .ceilings import Ceiling, center_bias, split_half_ceiling
from .meter import AlignmentMeter
from .metrics import dice, iou, pearson, reduce_resolution, spearman
from .scores import (
    CLICKME_CEILING,
    AlignmentScore,
    AlignmentValues,
    MetricSummary,
    alignment_score,
    compare,
    score_correlations,
    summarize,
)

__all__ = [
    "CLICKME_CEILING",
    "AlignmentMeter",
    "AlignmentScore",
    "AlignmentValues",
    "Ceiling",
    "MetricSummary",
    "alignment_score",
    "center_bias",
    "compare",
    "dice",
    "iou",
    "pearson",
    "reduce_resolution",
    "score_correlations",
    "spearman",
    "split_half_ceiling",
    "summarize",
]
