"""The demo in miniature: what it writes is what its runs measured."""

from __future__ import annotations

import json
from pathlib import Path

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import demo


def test_demo_in_miniature(tmp_path: Path):
    results = demo.run(
        tmp_path / "demo",
        tmp_path / "data",
        seeds=(0, 1),
        epochs=1,
        train_images=128,
        test_images=12,
        panel_images=3,
        quiet=True,
    )
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results
    for name, factor in (("baseline", 0.0), ("harmonized", 1.0)):
        network = results[name]
        assert 0 <= network["accuracy"] <= 1
        assert -1 <= network["alignment"] <= 1
        for key in ("accuracy", "alignment"):
            values = [row[key] for row in network["seeds"]]
            assert network[key] == pytest.approx(np.mean(values), rel=1e-12)
            assert network["spread"][key] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        for seed in (0, 1):
            run = json.loads((tmp_path / "demo" / f"{name}-seed{seed}/results.json").read_text())
            # Top-level figures are those of the split where the shortcut is broken.
            assert run["final"]["test"]["accuracy"] == network["seeds"][seed]["accuracy"]
            assert run["config"]["lambda_harmonization"] == factor
            assert run["config"]["seed"] == seed
    assert (tmp_path / "demo" / "panel.png").read_bytes().startswith(b"\x89PNG")
    text = demo.table(results)
    assert f"{results['harmonized']['accuracy']:.3f} ±" in text
    assert "50% of the training images have a human map" in text
