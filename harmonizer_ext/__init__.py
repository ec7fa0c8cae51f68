"""Fused kernels and training tools for the neural harmonizer (Fel et al., NeurIPS 2022)."""

from harmonizer_ext import alignment, clickme
from harmonizer_ext._version import __version__
from harmonizer_ext.backends import available_backends
from harmonizer_ext.building_blocks import gaussian_pyramid, positive_part_mse, standardize_cut
from harmonizer_ext.loss import HarmonizationLoss, NoGraphError, harmonization_loss
from harmonizer_ext.saliency import input_gradient
from harmonizer_ext.step import HarmonizerOutput, harmonizer_loss, weight_penalty

__all__ = [
    "HarmonizationLoss",
    "HarmonizerOutput",
    "NoGraphError",
    "__version__",
    "alignment",
    "available_backends",
    "clickme",
    "gaussian_pyramid",
    "harmonization_loss",
    "harmonizer_loss",
    "input_gradient",
    "positive_part_mse",
    "standardize_cut",
    "weight_penalty",
]
