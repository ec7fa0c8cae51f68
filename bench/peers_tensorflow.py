"""The authors' TensorFlow code as a peer: PyPI Harmonization 0.0.9, unmodified, in its own process.

Two frameworks in one process would fight for its threads. The process answers one line of JSON with
another: it holds the inputs, makes a call when it is told to, times it, and says how long it took.
So TensorFlow takes its turn in the interleaved loop, and the pipe is outside of what is timed.

``tests/released.py`` loads the released files and says what is missing. The maps are (B, H, W, C)
there, TensorFlow's own layout, and the gradient is with respect to all channels, as released.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Implementations by what the other process calls them.
NAMES = {"eager": "TensorFlow, as released", "graph": "TensorFlow, as released, tf.function"}


# --- this process ---------------------------------------------------------------------------------


class TensorFlowError(RuntimeError):
    """TensorFlow or the released package is not there, or its process ended."""


class TensorFlowPeer:
    """The process, started; a context manager that ends it.

    Args:
        threads: within and between TensorFlow's operations.
        variables: of the environment, added.

    Raises:
        TensorFlowError: what is missing, in the words of ``tests/released.py``.
    """

    def __init__(self, threads: int, variables: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="harmonizer-bench-")
        self._log = Path(self._folder.name, "log").open("w+")  # noqa: SIM115  closed in close()
        self._loaded = 0
        # TensorFlow's faster kernels, which the tests switch off for reproducible sums.
        environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment, **(variables or {})},
            text=True,
        )
        try:
            self.version = str(self._answer()["version"])
        except TensorFlowError:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise TensorFlowError(f"its process ended: {''.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        if "why_not" in answer:
            raise TensorFlowError(answer["why_not"])
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def load(self, maps: Any, levels: int, gradient: bool, sets: int) -> dict[str, RemoteCall]:
        """Hands over one set of maps, of which the process makes ``sets``; calls by name."""
        import torch

        path = Path(self._folder.name, f"maps-{self._loaded}.pt")
        self._loaded += 1
        torch.save(maps, path)
        key = str(path)
        self.ask(do="load", key=key, levels=levels, gradient=gradient, sets=sets)
        return {name: RemoteCall(self, key, mode, gradient) for mode, name in NAMES.items()}

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> TensorFlowPeer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class RemoteCall:
    """A ``harness.SelfTimed``."""

    peer: TensorFlowPeer
    key: str
    mode: str
    gradient: bool

    def milliseconds(self, index: int) -> float:
        answer = self.peer.ask(do="time", key=self.key, mode=self.mode, index=index)
        return float(answer["milliseconds"])

    def peak_extra_bytes(self, small: RemoteCall) -> int:
        """Peak in a process that has not made this call; ``small`` starts what starts only once."""
        answer = self.peer.ask(do="memory", key=self.key, mode=self.mode, small=small.key)
        return int(answer["bytes"])

    def result(self) -> Any:
        """Loss, or loss and gradient (B, C, H, W), of the first set."""
        import torch

        path = self.key + ".result"
        self.peer.ask(do="result", key=self.key, mode=self.mode, path=path)
        loss, gradient = torch.load(path)
        return (loss, gradient.movedim(-1, 1)) if self.gradient else loss


# --- TensorFlow's process -------------------------------------------------------------------------


class _Worker:
    def __init__(self, threads: int) -> None:
        import tensorflow

        # Before anything is computed, which loading the released files does.
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(threads)
        self.tf = tensorflow
        self.code = released.load("float32")
        self.sets: dict[str, list[tuple[Any, ...]]] = {}
        self.functions: dict[tuple[str, str], Callable[..., Any]] = {}

    def loss_function(self, levels: int, gradient: bool) -> Callable[..., Any]:
        """``harmonizer_loss`` of the released ``training/loss.py``, its part on maps."""
        tf, code = self.tf, self.code

        def loss_of(saliency: Any, heatmaps: Any, tokens: Any) -> Any:
            predicted = code.standardize_cut(tf.reduce_mean(saliency, -1))
            true = code.standardize_cut(heatmaps)
            true_max = tf.math.reduce_max(true, (1, 2), keepdims=True) + 1e-6
            predicted_max = tf.math.reduce_max(predicted, (1, 2), keepdims=True)
            true = true / true_max * (tf.stop_gradient(predicted_max) + 1e-6)
            return code.pyramidal_mse_with_tokens(predicted, true, tokens, levels)

        def loss_and_gradient(saliency: Any, heatmaps: Any, tokens: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(saliency)
                loss = loss_of(saliency, heatmaps, tokens)
            return loss, tape.gradient(loss, saliency)

        return loss_and_gradient if gradient else loss_of

    def load(self, key: str, levels: int, gradient: bool, sets: int) -> dict[str, Any]:
        import numpy as np
        import torch

        saliency, heatmaps, tokens = (maps.numpy() for maps in torch.load(key))
        saliency = np.moveaxis(saliency, 1, -1)
        # Other memory, other order of the rows: a set of its own as far as a cache can tell.
        self.sets[key] = [
            tuple(self.tf.constant(np.roll(maps, n, 0)) for maps in (saliency, heatmaps, tokens))
            for n in range(sets)
        ]
        function = self.loss_function(levels, gradient)
        self.functions[key, "eager"] = function
        self.functions[key, "graph"] = self.tf.function(function)
        return {}

    def call(self, key: str, mode: str, index: int) -> Any:
        sets = self.sets[key]
        result = self.functions[key, mode](*sets[index % len(sets)])
        # Eager operations on the CPU are done when they return; reading the loss makes sure of it.
        (result[0] if isinstance(result, (tuple, list)) else result).numpy()
        return result

    def time(self, key: str, mode: str, index: int) -> dict[str, Any]:
        start = time.perf_counter()
        result = self.call(key, mode, index)
        elapsed = time.perf_counter() - start
        del result
        return {"milliseconds": elapsed * 1e3}

    def memory(self, key: str, mode: str, small: str) -> dict[str, Any]:
        # TensorFlow keeps what it frees: the call that is measured must be the first of its size.
        peak = harness.peak_extra_bytes(
            lambda _: self.call(key, mode, 0), lambda: self.call(small, mode, 0), "cpu"
        )
        return {"bytes": peak}

    def result(self, key: str, mode: str, path: str) -> dict[str, Any]:
        import torch

        got = self.call(key, mode, 0)
        got = got if isinstance(got, (tuple, list)) else (got, self.tf.zeros(()))
        torch.save(tuple(torch.tensor(value.numpy()) for value in got), path)
        return {}


def main() -> int:
    reason = released.why_not()
    if reason is not None:
        print(json.dumps({"why_not": reason}), flush=True)
        return 1
    worker = _Worker(int(sys.argv[1]))
    print(json.dumps({"version": worker.tf.__version__}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(getattr(worker, question.pop("do"))(**question)), flush=True)
    return 0


if __name__ == "__main__":
    import harness  # first of all: it sets what torch reads when it is loaded

    # isort: split
    sys.path.insert(0, str(harness.ROOT / "tests"))
    import released

    sys.exit(main())
