"""The authors' released TensorFlow code as an oracle: PyPI ``Harmonization`` 0.0.9, unmodified.

The package cannot be imported as a whole (its ``__init__`` pulls in model zoos that no longer
install), so single files are loaded under empty parent packages of private names. Nothing in them
is edited. Two things are done from outside, because the files fix them:

* float64. The files name ``tf.float32`` where they cast the saliency, the pyramid's kernel and the
  loss terms. The second instance of the files sees a view of TensorFlow whose ``float32`` is
  ``tf.float64``. The kernel's weights are multiples of 1/256, exact in both types.
* Recording. ``harmonizer_loss`` returns parameter gradients and no value. The same view hands it a
  ``GradientTape`` and an ``add_n`` that note what passes through them.

The tests import this module as ``released``. It needs ``tensorflow-cpu`` (or ``tensorflow``),
``scipy`` and ``pip install --no-deps harmonization==0.0.9``; ``why_not()`` says what is missing.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from twins import TwinNetwork, torch_twin

VERSION = "0.0.9"
Precision = Literal["float32", "float64"]


# --------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Released:
    """The released functions, and the modules that hold them.

    ``dtype`` is the floating point type that the files compute in: ``"float32"`` is the package as
    installed, ``"float64"`` the same files with ``tf.float32`` read as ``tf.float64``.
    """

    tensorflow: types.ModuleType
    dtype: str
    loss: types.ModuleType
    pyramid: types.ModuleType
    metrics: types.ModuleType
    clickme: types.ModuleType
    blur: types.ModuleType
    standardize_cut: Callable[..., Any]
    pyramidal_representation: Callable[..., Any]
    pyramidal_mse_with_tokens: Callable[..., Any]
    harmonizer_loss: Callable[..., Any]
    spearman_correlation: Callable[..., Any]
    dice: Callable[..., Any]
    intersection_over_union: Callable[..., Any]
    parse_clickme_prototype: Callable[..., Any]
    load_clickme: Callable[..., Any]
    gaussian_kernel: Callable[..., Any]
    gaussian_blur: Callable[..., Any]
    human_spearman_ceiling: float


class TensorFlowView(types.ModuleType):
    """TensorFlow, or a module of it, with some names replaced for one released file."""

    def __init__(self, tensorflow: types.ModuleType, **replaced: Any) -> None:
        super().__init__("tensorflow")
        self.__dict__["_tensorflow"] = tensorflow
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tensorflow"], name)


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    """Says why the released code cannot be loaded here, or None where it can. For skip reasons."""
    if importlib.util.find_spec("tensorflow") is None:
        return "TensorFlow is not installed (pip install tensorflow-cpu)"
    if importlib.util.find_spec("scipy") is None:
        return "scipy is not installed (the released metrics need it)"
    if importlib.util.find_spec("harmonization") is None:
        return "the released package is not installed (pip install --no-deps harmonization==0.0.9)"
    found = importlib.metadata.version("harmonization")
    if found != VERSION:
        return f"harmonization {found} is installed, the oracle is {VERSION}"
    try:
        _import_tensorflow()
    except ImportError as error:
        return f"TensorFlow is installed but does not import: {error}"
    return None


def _import_tensorflow() -> types.ModuleType:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # plain kernels: reproducible sums
    # Both bring an LLVM, and Triton's ends the process where TensorFlow's was there first.
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    return importlib.import_module("tensorflow")


@functools.lru_cache(maxsize=2)
def load(dtype: Precision = "float32") -> Released:
    """Loads the released files.

    Args:
        dtype: ``"float32"`` for the package as installed, ``"float64"`` for the same files with
            ``tf.float32`` read as ``tf.float64`` (training code only: the metrics and the ClickMe
            reader are the float32 ones in both).

    Raises:
        RuntimeError: the package cannot be loaded; the text is that of ``why_not()``.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the released code cannot be loaded: {reason}")
    tensorflow = _import_tensorflow()
    spec = importlib.util.find_spec("harmonization")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))

    package = f"_released_{dtype}"
    for name, folder in (
        (package, root),
        (f"{package}.training", root / "training"),
        (f"{package}.evaluation", root / "evaluation"),
        (f"{package}.common", root / "common"),
    ):
        parent = types.ModuleType(name)
        parent.__path__ = [str(folder)]
        # Without a spec the import system warns about a package with neither spec nor path.
        parent.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = parent

    loss = importlib.import_module(f"{package}.training.loss")
    pyramid = importlib.import_module(f"{package}.training.pyramid")
    metrics = importlib.import_module(f"{package}.evaluation.metrics")
    clickme = importlib.import_module(f"{package}.common.clickme_dataset")
    blur = importlib.import_module(f"{package}.common.blur")
    if dtype == "float64":
        view = TensorFlowView(tensorflow, float32=tensorflow.float64)
        vars(loss)["tf"] = view
        vars(pyramid)["tf"] = view
    return Released(
        tensorflow=tensorflow,
        dtype=dtype,
        loss=loss,
        pyramid=pyramid,
        metrics=metrics,
        clickme=clickme,
        blur=blur,
        standardize_cut=loss.standardize_cut,
        pyramidal_representation=pyramid.pyramidal_representation,
        pyramidal_mse_with_tokens=loss.pyramidal_mse_with_tokens,
        harmonizer_loss=loss.harmonizer_loss,
        spearman_correlation=metrics.spearman_correlation,
        dice=metrics.dice,
        intersection_over_union=metrics.intersection_over_union,
        parse_clickme_prototype=clickme.parse_clickme_prototype,
        load_clickme=clickme.load_clickme,
        gaussian_kernel=blur.gaussian_kernel,
        gaussian_blur=blur.gaussian_blur,
        human_spearman_ceiling=_constant(
            root / "evaluation" / "clickme.py", "HUMAN_SPEARMAN_CEILING"
        ),
    )


def _constant(path: Path, name: str) -> float:
    """Reads a module constant without running the module, which imports what is not installed."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return float(ast.literal_eval(node.value))
    raise LookupError(f"{path} has no constant {name}")


# --------------------------------------------------------------------------- the loss on maps


def released_loss_and_gradient(
    saliency: np.ndarray,
    heatmaps: np.ndarray,
    tokens: np.ndarray,
    levels: int = 5,
    dtype: Precision = "float64",
) -> tuple[float, np.ndarray]:
    """The alignment term of the released loss and its gradient with respect to the saliency.

    Mirrors ``harmonization/training/loss.py`` 0.0.9, ``harmonizer_loss``, from
    ``sa_maps = tf.reduce_mean(sa_maps, -1)`` to ``pyramidal_mse_with_tokens(...)`` (lines 133 to
    147), calling its ``standardize_cut`` and ``pyramidal_mse_with_tokens``: channel mean;
    standardize and cut of both maps (epsilon 1e-5 added to the standard deviation); the human map
    divided by (its maximum + 1e-6) and multiplied by (stop_gradient of the saliency's maximum +
    1e-6, added outside the stop_gradient); mean over ``levels`` of the mean over all rows and
    pixels of the squared difference times the row's token. The file writes ``levels=5`` only, as
    the default of ``nb_levels``; any other number goes through that argument.

    Args:
        saliency: (B, C, H, W).
        heatmaps: (B, H, W).
        tokens: (B,).
        levels: number of pyramid levels, the full size being the first.
        dtype: the type that everything is computed in.

    Returns:
        The loss, and its gradient (B, C, H, W) in ``dtype``.
    """
    code = load(dtype)
    tf = code.tensorflow
    images_gradient = tf.constant(np.moveaxis(saliency, 1, -1), dtype=dtype)
    true_heatmaps = tf.constant(heatmaps, dtype=dtype)
    weights = tf.constant(tokens, dtype=dtype)
    with tf.GradientTape() as tape:
        tape.watch(images_gradient)
        sa_maps = tf.reduce_mean(images_gradient, -1)
        sa_maps_preprocess = code.standardize_cut(sa_maps)
        heatmaps_preprocess = code.standardize_cut(true_heatmaps)
        _hm_max = tf.math.reduce_max(heatmaps_preprocess, (1, 2), keepdims=True) + 1e-6
        _sa_max = (
            tf.stop_gradient(tf.math.reduce_max(sa_maps_preprocess, (1, 2), keepdims=True)) + 1e-6
        )
        heatmaps_preprocess = heatmaps_preprocess / _hm_max * _sa_max
        loss = code.pyramidal_mse_with_tokens(
            sa_maps_preprocess, heatmaps_preprocess, weights, levels
        )
    gradient = tape.gradient(loss, images_gradient)
    return float(loss), np.moveaxis(gradient.numpy(), -1, 1)


# --------------------------------------------------------------------------- the whole step


@dataclass
class ReleasedStep:
    """The results of one run of the released ``harmonizer_loss``.

    ``weight_penalty`` is before, ``loss`` after the multiplication by the two lambdas.
    ``gradients`` has one array per trainable Keras variable, in the variables' order and Keras
    layout; ``Twins.to_torch`` renames and transposes them. ``saliency`` is (B, C, H, W).
    """

    loss: float = float("nan")
    cross_entropy: float = float("nan")
    harmonization: float = float("nan")
    weight_penalty: float = float("nan")
    saliency: np.ndarray = field(default_factory=lambda: np.empty(0))
    gradients: list[np.ndarray] = field(default_factory=list)


class _KerasModel:
    """The parts of a model that ``harmonizer_loss`` uses, with TensorFlow variables.

    Keras 3 has variables of its own, which ``tape.watch`` refuses. Their names stay those that
    the weight penalty's filter reads.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.trainable_variables = [variable.value for variable in model.trainable_variables]

    def __call__(self, images: Any, training: bool) -> Any:
        return self._model(images, training=training)


@contextmanager
def _recording(code: Released, step: ReleasedStep):  # type: ignore[no-untyped-def]
    """Lets ``harmonizer_loss`` run as it is, and notes the values that it does not return."""
    tf = code.tensorflow
    module = code.loss
    tensorflow_before = vars(module)["tf"]
    pyramid_before = vars(module)["pyramidal_mse_with_tokens"]

    class Tape(tf.GradientTape):  # type: ignore[name-defined, misc]
        def gradient(self, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().gradient(target, sources, *args, **kwargs)
            if isinstance(sources, list):
                step.loss = float(target)
            else:
                step.saliency = np.moveaxis(result.numpy(), -1, 1)
            return result

    def add_n(terms: Any) -> Any:
        result = tf.add_n(terms)
        step.weight_penalty = float(result)
        return result

    def pyramidal_mse_with_tokens(*args: Any, **kwargs: Any) -> Any:
        result = pyramid_before(*args, **kwargs)
        step.harmonization = float(result)
        return result

    replaced = {"GradientTape": Tape, "add_n": add_n, "float32": getattr(tf, code.dtype)}
    vars(module)["tf"] = TensorFlowView(tf, **replaced)
    vars(module)["pyramidal_mse_with_tokens"] = pyramidal_mse_with_tokens
    try:
        yield
    finally:
        vars(module)["tf"] = tensorflow_before
        vars(module)["pyramidal_mse_with_tokens"] = pyramid_before


def released_harmonizer_loss(
    model: Any,
    images: np.ndarray,
    labels: np.ndarray,
    heatmaps: np.ndarray,
    tokens: np.ndarray,
    *,
    lambda_weights: float = 1e-5,
    lambda_harmonization: float = 1.0,
    dtype: Precision = "float64",
) -> ReleasedStep:
    """Runs the complete released ``harmonizer_loss`` on a Keras model.

    Args:
        model: a Keras model (NHWC) in ``dtype``, for instance ``Twins.keras``.
        images: (B, C, H, W); transposed to NHWC here.
        labels: (B, classes), one-hot or soft.
        heatmaps: (B, H, W).
        tokens: (B,).
        lambda_weights: factor of the weight penalty.
        lambda_harmonization: factor of the alignment term.
        dtype: ``"float64"`` (default) or ``"float32"`` (the package exactly as installed).
    """
    code = load(dtype)
    tf = code.tensorflow
    step = ReleasedStep()
    # The released Cross_entropy object (first lines of loss.py) is bound to float32; the float64
    # one has the same settings.
    criterion = (
        code.loss.Cross_entropy
        if dtype == "float32"
        else tf.keras.losses.CategoricalCrossentropy(
            from_logits=True, reduction=None, label_smoothing=0.1, dtype=dtype
        )
    )

    def cross_entropy(truth: Any, prediction: Any) -> Any:
        result = criterion(truth, prediction)
        step.cross_entropy = float(tf.reduce_mean(result))
        return result

    with _recording(code, step):
        gradients = code.harmonizer_loss(
            _KerasModel(model),
            tf.constant(np.moveaxis(images, 1, -1), dtype=dtype),
            tf.constant(tokens, dtype=dtype),
            tf.constant(labels, dtype=dtype),
            tf.constant(heatmaps, dtype=dtype),
            cross_entropy=cross_entropy,
            lambda_weights=lambda_weights,
            lambda_harmonization=lambda_harmonization,
        )
    step.gradients = [gradient.numpy() for gradient in gradients]
    return step


# --------------------------------------------------------------------------- twin networks


@dataclass
class Twins:
    """The same network in Keras and in torch, with equal weights.

    ``names`` has, for each trainable Keras variable, the name of the torch parameter.
    """

    keras: Any
    torch: TwinNetwork
    names: list[str]

    def to_torch(self, gradients: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Renames and transposes Keras gradients: torch parameter name to torch layout."""
        return {
            name: _to_torch_layout(gradient)
            for name, gradient in zip(self.names, gradients, strict=True)
        }


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:  # HWIO to OIHW
        return np.transpose(array, (3, 2, 0, 1))
    return np.transpose(array)  # a dense kernel (in, out) to (out, in); vectors are unchanged


def _to_keras_layout(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, (2, 3, 1, 0) if array.ndim == 4 else None)


_SUFFIXES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}


def keras_and_torch_twins(
    seed: int, batch_norm: bool = False, dtype: Precision = "float64"
) -> Twins:
    """Builds the same small network in both frameworks with equal weights.

    Args:
        seed: of the weights.
        batch_norm: two BatchNorm layers, which run in training mode in ``harmonizer_loss``.
        dtype: of both networks.
    """
    tf = load(dtype).tensorflow
    layers = tf.keras.layers
    network = torch_twin(seed, batch_norm).to(getattr(torch, dtype))
    first, second, third = TwinNetwork.CHANNELS

    class BatchNormalization(layers.BatchNormalization):  # type: ignore[name-defined, misc]
        """Keras' layer with moments that can be differentiated twice.

        Keras 3 takes them from ``tf.nn.moments``, whose variance holds ``stop_gradient(mean)``:
        right once, wrong the second time (central differences of a float64 gradient show it; so
        it is with Keras' LayerNormalization). The fused kernel that Keras 2 took for images has a
        second derivative of its own, but no float64.
        """

        def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
            axes = list(range(inputs.shape.rank - 1))
            mean = tf.reduce_mean(inputs, axes)
            return mean, tf.reduce_mean(tf.square(inputs - mean), axes)

    images = tf.keras.Input((None, None, first), dtype=dtype)
    x = layers.Conv2D(second, 3, padding="same", name="patch_embed", dtype=dtype)(images)
    if batch_norm:
        x = BatchNormalization(name="batch_normalization", dtype=dtype)(x)
    x = layers.Activation("softplus", dtype=dtype)(x)
    x = layers.Conv2D(third, 3, strides=2, padding="valid", name="features", dtype=dtype)(x)
    if batch_norm:
        x = BatchNormalization(name="batch_normalization_1", dtype=dtype)(x)
    x = layers.Activation("silu", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(dtype=dtype)(x)
    logits = layers.Dense(TwinNetwork.CLASSES, name="head", dtype=dtype)(x)
    model = tf.keras.Model(images, logits)

    parameters = dict(network.named_parameters())
    names = []
    for variable in model.trainable_variables:
        layer, kind = variable.path.split("/")[-2:]
        name = f"{layer}.{_SUFFIXES[kind]}"
        variable.assign(_to_keras_layout(parameters[name].detach().numpy()))
        names.append(name)
    assert sorted(names) == sorted(parameters)
    return Twins(model, network, names)
