"""Training data: ClickMe mixed with images without human maps, augmented together with their maps.

Augmentation needs torchvision, which only ``harmonizer_ext.data.augmentation`` imports.
"""

from harmonizer_ext.data.loader import collate, create_loader
from harmonizer_ext.data.memory import InMemory
from harmonizer_ext.data.mixing import Draw, MixedBatchSampler, MixedDataset
from harmonizer_ext.data.mixup import Mixup
from harmonizer_ext.data.streams import MixedStream

__all__ = [
    "Draw",
    "InMemory",
    "MixedBatchSampler",
    "MixedDataset",
    "MixedStream",
    "Mixup",
    "collate",
    "create_loader",
]
