"""How far a model's importance maps agree with people's."""

from .metrics import (
    CLICKME_CEILING,
    AlignmentScore,
    alignment_score,
    dice,
    iou,
    score_correlations,
    spearman,
)

__all__ = [
    "CLICKME_CEILING",
    "AlignmentScore",
    "alignment_score",
    "dice",
    "iou",
    "score_correlations",
    "spearman",
]
