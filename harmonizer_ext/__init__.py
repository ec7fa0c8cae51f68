"""Fused kernels and training tools for the neural harmonizer (Fel et al., NeurIPS 2022)."""

from harmonizer_ext import alignment, clickme, data, explanations, map_losses, revealed_stimuli
from harmonizer_ext._version import __version__
from harmonizer_ext.backends import available_backends
from harmonizer_ext.building_blocks import gaussian_pyramid, positive_part_mse, standardize_cut
from harmonizer_ext.double_backward import SecondDerivativeError, exact_attention
from harmonizer_ext.finite_difference import FiniteDifference
from harmonizer_ext.gradient_check import GradientCheck, check_gradients
from harmonizer_ext.loss import HarmonizationLoss, NoGraphError, harmonization_loss
from harmonizer_ext.saliency import input_gradient
from harmonizer_ext.step import HarmonizerOutput, harmonizer_loss
from harmonizer_ext.step_module import HarmonizerLoss
from harmonizer_ext.twice_differentiable import make_twice_differentiable
from harmonizer_ext.weight_penalty import weight_penalty

__all__ = [
    "FiniteDifference",
    "GradientCheck",
    "HarmonizationLoss",
    "HarmonizerLoss",
    "HarmonizerOutput",
    "NoGraphError",
    "SecondDerivativeError",
    "__version__",
    "alignment",
    "available_backends",
    "check_gradients",
    "clickme",
    "data",
    "exact_attention",
    "explanations",
    "gaussian_pyramid",
    "harmonization_loss",
    "harmonizer_loss",
    "input_gradient",
    "make_twice_differentiable",
    "map_losses",
    "positive_part_mse",
    "revealed_stimuli",
    "standardize_cut",
    "weight_penalty",
]
