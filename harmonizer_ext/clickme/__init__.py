"""The ClickMe data set, read without TensorFlow."""

from .released import released_preprocessing
from .sample import ClickMeSample
from .shards import ClickMe
from .tfrecord import TFRecordError

__all__ = ["ClickMe", "ClickMeSample", "TFRecordError", "released_preprocessing"]
