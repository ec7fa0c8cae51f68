"""A few of the cases of ``fuzz_readers.py``, which runs as many as one likes."""

from __future__ import annotations

import extras
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import fuzz_readers

CASES = 60


def test_damaged_files_of_every_kind() -> None:
    """No crash, no hang, nothing started or touched, and no error but this project's."""
    names = list(fuzz_readers.readers())
    told = fuzz_readers.fuzz(names, CASES, seed=1)
    assert {name: one["bad"] for name, one in told.items() if one["bad"]} == {}
    assert list(told) == names
    # Whole ones among them are read, or nothing would be shown.
    for name, one in told.items():
        assert one.get("read", 0) + one["refused"] == CASES
        assert one.get("read", 0) > 0, name
