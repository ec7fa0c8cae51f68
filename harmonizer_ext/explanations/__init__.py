"""Explanations of a network's decisions, in one form for training and for evaluation.

Each is a callable ``explain(model, images, targets, *, create_graph) -> (logits, maps)``.
``harmonizer_loss(explain=...)`` trains through it; ``importance_maps`` evaluates it.
"""

from .attribution import Attribution
from .grad_cam import GradCAM
from .gradients import GradientTimesInput, InputGradient, IntegratedGradients, SmoothGrad
from .maps import Reduce, importance_maps, reduce_channels

__all__ = [
    "Attribution",
    "GradCAM",
    "GradientTimesInput",
    "InputGradient",
    "IntegratedGradients",
    "Reduce",
    "SmoothGrad",
    "importance_maps",
    "reduce_channels",
]
