"""PyTorch's defaults as they are when Python starts, around code that is not ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """A context in which tensors are made on the CPU, in float32 where nothing else is said.

    For libraries that draw random numbers without naming device and dtype: torchvision's
    transforms, PyTorch's DataLoader. The default dtype is the process's, not the thread's, and is
    touched only where it is another.
    """
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)
