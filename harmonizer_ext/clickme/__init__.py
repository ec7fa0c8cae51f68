"""The ClickMe data set, read without TensorFlow."""

from .files import ClickMeFiles
from .released import released_preprocessing
from .sample import ClickMeSample
from .shards import ClickMe
from .tfrecord import TFRecordError, write_records
from .webdataset import ClickMeWebDataset

__all__ = [
    "ClickMe",
    "ClickMeFiles",
    "ClickMeSample",
    "ClickMeWebDataset",
    "TFRecordError",
    "released_preprocessing",
    "write_records",
]
