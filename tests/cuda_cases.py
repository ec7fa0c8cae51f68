"""Calls of the operations of ``harmonizer::cuda``, and the file by which a program takes them.

tests/native/run_cuda.cpp is that program. ``Backend`` makes a backend of the package of it, so that
the tests of every backend can take it as their target.
"""

from __future__ import annotations

import ctypes
import io
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from harmonizer_ext import contract

# The order of csrc/harmonizer.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMULATIONS = ("released", "paper")
DISTANCES = ("mse", "l2")

#: Runs a command with so many seconds of time and these settings.
Execute = Callable[[Sequence[str], Mapping[str, str], float], "subprocess.CompletedProcess[str]"]


@dataclass
class Case:
    """One call of an operation of ``harmonizer::cuda``."""

    operation: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)


def _write_text(file: io.BytesIO, text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<q", len(data)) + data)


def _write_case(file: io.BytesIO, case: Case) -> None:
    _write_text(file, case.operation)
    file.write(struct.pack("<q", len(case.options)))
    for name, number in case.options.items():
        _write_text(file, name)
        file.write(struct.pack("<q", number))
    file.write(struct.pack("<q", len(case.tensors)))
    for name, tensor in case.tensors.items():
        _write_text(file, name)
        tensor = tensor.detach()
        sizes, strides = tensor.shape, tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        count = last + 1 if tensor.numel() else 0
        # All that the strides reach and nothing else, as far from an aligned address as it was.
        data = ctypes.string_at(tensor.data_ptr(), count * tensor.element_size())
        offset = tensor.data_ptr() % 256
        numbers = (DTYPES.index(tensor.dtype), len(sizes), *sizes, *strides, offset, len(data))
        file.write(struct.pack(f"<{len(numbers)}q", *numbers) + data)


def _read_number(file: io.BufferedIOBase) -> int:
    return int(struct.unpack("<q", file.read(8))[0])


def _read_text(file: io.BufferedIOBase) -> str:
    return file.read(_read_number(file)).decode()


def _read_case(file: io.BufferedIOBase) -> Case:
    case = Case(_read_text(file))
    for _ in range(_read_number(file)):
        name = _read_text(file)
        case.options[name] = _read_number(file)
    for _ in range(_read_number(file)):
        name = _read_text(file)
        dtype = DTYPES[_read_number(file)]
        dimensions = _read_number(file)
        sizes = [_read_number(file) for _ in range(dimensions)]
        for _ in range(dimensions + 1):  # strides and offset: outputs are dense
            _read_number(file)
        data = bytearray(file.read(_read_number(file)))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        case.tensors[name] = flat.reshape(sizes)
    return case


def run(
    program: Path,
    cases: Sequence[Case],
    execute: Execute,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[Case]:
    """Runs cases in one process.

    Args:
        program: run_cuda, built in some way.
        cases: calls to run; the strides of the tensors are part of them.
        execute: how a command is run.
        environment: settings of the machine that the program has in it.
        timeout: seconds.

    Returns:
        For each case its outputs, by name.

    Raises:
        AssertionError: a kernel could not be launched, did something that CUDA leaves undefined, or
            a sanitizer reported something.
    """
    file = io.BytesIO()
    file.write(struct.pack("<q", len(cases)))
    for case in cases:
        _write_case(file, case)
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "cases", Path(folder) / "results"
        given.write_bytes(file.getvalue())
        result = execute([str(program), str(given), str(results)], environment or {}, timeout)
        assert result.returncode == 0, (
            f"{program.name}: exit status {result.returncode}\n{result.stderr[:6000]}"
        )
        with results.open("rb") as answers:
            outputs = [_read_case(answers) for _ in range(_read_number(answers))]
    for output in outputs:
        assert not output.operation, output.operation
    return outputs


def loss_case(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str = "released",
    levels: int = 5,
    distance: str = "mse",
    with_gradient: bool = True,
    variant: int = 0,
    prefetch: int = 0,
) -> Case:
    """A call of the loss: (B, C, H, W), (B, H, W) and (B,)."""
    weights = weights.to(contract.accumulation_dtype(saliency, heatmaps)).contiguous()
    options = {
        "levels": levels,
        "formulation": FORMULATIONS.index(formulation),
        "distance": DISTANCES.index(distance),
        "with_gradient": int(with_gradient),
        "variant": variant,
        "prefetch": prefetch,
    }
    return Case("loss", {"saliency": saliency, "heatmaps": heatmaps, "weights": weights}, options)


class Backend:
    """A backend of the package, made of a way to run cases.

    Args:
        run_cases: runs cases with settings of the machine, as ``run`` does.
        why_not_here: None if it can be built on this machine, otherwise the reason.

    Attributes:
        variant: number of the loss' specialization; 0 lets it choose, -1 is the general path.
        device: settings of the machine that describe the device.
    """

    def __init__(
        self,
        run_cases: Callable[[Sequence[Case], Mapping[str, str]], list[Case]],
        why_not_here: Callable[[], str | None],
    ) -> None:
        self.run_cases = run_cases
        self.why_not_here = why_not_here
        self.variant = 0
        self.device: Mapping[str, str] = {}

    def _run_one(self, case: Case) -> dict[str, Tensor]:
        (result,) = self.run_cases([case], self.device)
        return result.tensors

    def why_not(self, device_type: str, dtype: torch.dtype | None = None) -> str | None:
        """None if the kernels run on this device (and dtype), otherwise the reason."""
        if device_type != "cpu":
            return "it runs CUDA kernels on the CPU"
        if dtype == torch.float64:
            return "the kernels compute in float32"
        return self.why_not_here()

    def harmonization(
        self,
        saliency: Tensor,
        heatmaps: Tensor,
        weights: Tensor,
        formulation: str,
        levels: int,
        distance: str,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row losses (B,), unit gradient (B, 1, H, W) or (0,), saliency std (B,)."""
        maps = (saliency, heatmaps, weights)
        case = loss_case(*maps, formulation, levels, distance, with_gradient, self.variant)
        outputs = self._run_one(case)
        return (
            outputs["rows"],
            outputs.get("gradient", saliency.new_empty(0)),
            outputs["saliency_std"],
        )

    def pyramid(self, maps: Tensor, levels: int) -> list[Tensor]:
        """Levels 1 to levels-1 of (B, C, H, W)."""
        outputs = self._run_one(Case("pyramid", {"maps": maps}, {"levels": levels}))
        return [outputs[f"level{level}"] for level in range(1, levels)]

    def pyramid_adjoint(self, gradients: list[Tensor], height: int, width: int) -> Tensor:
        """Adjoint of ``pyramid``: (B, C, H, W) from the gradients of its outputs."""
        named = {f"gradient{level}": gradient for level, gradient in enumerate(gradients, 1)}
        return self._run_one(Case("pyramid_adjoint", named, {"height": height, "width": width}))[
            "output"
        ]

    def standardize_cut(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and dtype."""
        return self._run_one(Case("standardize", {"maps": maps}))["output"]

    def standardize_cut_backward(self, grad: Tensor, maps: Tensor) -> Tensor:
        """Gradient with respect to ``maps``, in their dtype."""
        return self._run_one(Case("standardize", {"maps": maps, "grad": grad}))["output"]

    def positive_part_mse(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) from two (B, H, W)."""
        return self._run_one(Case("positive_part_mse", {"a": a, "b": b}))["rows"]

    def positive_part_mse_backward(
        self, grad: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients with respect to ``a`` and ``b``, each in its own dtype."""
        grad = grad.to(contract.accumulation_dtype(a, b)).contiguous()
        outputs = self._run_one(Case("positive_part_mse", {"a": a, "b": b, "grad": grad}))
        return outputs["grad_a"], outputs["grad_b"]
