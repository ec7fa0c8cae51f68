"""timm, where it can be imported: what the benchmark, the tests and the programs share."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import torch


def import_torchvision() -> None:
    """timm imports torchvision, whose compiled part does not load beside a PyTorch without CUDA.

    Two of its operators are then missing when it is imported. Declared without a kernel, they let
    it be imported; nothing here calls them. Where torchvision is whole, nothing is declared.
    """
    for _ in range(3):
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(q?nms) does not exist", str(error))
            if missing is None:
                raise
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            torch.library.define(
                f"torchvision::{missing[1]}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        else:
            return


def import_timm() -> ModuleType:
    """The package timm.

    Raises:
        ImportError, RuntimeError: it or torchvision, which it needs, does not import.
    """
    import_torchvision()
    import timm

    return timm


def why_no_timm() -> str | None:
    """None where timm can be imported, otherwise the reason and the way out."""
    try:
        import_timm()
    except (ImportError, RuntimeError) as error:
        return (
            f"the networks come from timm, which does not import: {error}; install it beside the "
            f'PyTorch that is here: pip install timm "torch=={torch.__version__.split("+")[0]}"'
        )
    return None
