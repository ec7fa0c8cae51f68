"""Memory that workers share with their parent: given back once, by whom it was lent to, and in all.

What is in it, test_loader.py compares.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_loader import Samples, chunks

from harmonizer_ext.data import create_loader, shared


def pieces() -> list[torch.Tensor]:
    return [memory for mapped in shared._mapped.values() for memory in mapped.values()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_gives_nothing_back() -> None:
    """Workers of another loader inherit batches that their parent still uses."""
    before = {memory.data_ptr() for memory in pieces()}
    iterator = iter(create_loader(Samples(40), chunks(40, 4), workers=1))
    batch = next(iterator)
    (memory,) = (memory for memory in pieces() if memory.data_ptr() not in before)
    assert memory.data_ptr() == batch.image.data_ptr()
    child = os.fork()
    if child == 0:
        del batch
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert memory[-1] == 1
    del batch
    assert memory[-1] == 0


def test_a_loader_without_a_name_leaves_nothing() -> None:
    """``for batch in create_loader(...)``, again and again, as evaluations do."""
    gc.collect()
    before = len(shared._mapped)
    held = []
    for _ in range(3):
        for batch in create_loader(Samples(12), chunks(12, 4), workers=1):
            held.append(batch)
    del batch
    gc.collect()
    assert len(shared._mapped) == before
    expected = [next(iter(create_loader(Samples(12), chunks(12, 4), workers=0)))] * 3
    for got, wanted in zip(held[::3], expected, strict=True):
        assert torch.equal(got.image, wanted.image)


@pytest.mark.parametrize("ending", ["raise KeyError('failed')", "sys.exit(1)"])
def test_an_iterator_whose_loader_is_gone(ending: str) -> None:
    """Its workers end with the program all the same."""
    program = f"""
        import sys
        from test_loader import Samples, chunks
        from harmonizer_ext.data import create_loader
        iterator = iter(create_loader(Samples(40), chunks(40, 4), workers=2))
        next(iterator)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 1
