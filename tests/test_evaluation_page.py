"""The code and the commands of docs/evaluation.md, as they are printed there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest
import torch

from harmonizer_ext import alignment
from harmonizer_ext.clickme import released_preprocessing

stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
CODE = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))


def run(name: str, **names: Any) -> dict[str, Any]:
    exec(compile(CODE[name], f"docs/evaluation.md {name}", "exec"), names)
    return names


def test_every_code_is_tested() -> None:
    assert set(CODE) == {"loop", "ceiling"}


def test_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data/participants"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    places = generator.integers(40, 90, (3, 1, 30, 2))
    expected = []
    for image, count in enumerate((2, 3, 1)):
        clicks = np.zeros((count, 128, 128), np.uint8)
        moved = places[image] + generator.integers(-8, 9, (count, 30, 2))
        for participant in range(count):
            clicks[participant, moved[participant, :, 0], moved[participant, :, 1]] = 1
        np.save(folder / f"{image}.npy", clicks)
        if count == 1:
            continue
        maps = [
            released_preprocessing(torch.zeros(3, 128, 128), torch.from_numpy(one)[None].float())[1]
            for one in clicks
        ]
        # One split of two participants, three of three: one against the mean of the others.
        halves = [(maps[0], maps[1])]
        if count == 3:
            halves = [(maps[i], (maps[i - 1] + maps[i - 2]) / 2) for i in range(3)]
        each = [stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in halves]
        expected.append(np.mean(each))
    monkeypatch.chdir(tmp_path)
    found = run("ceiling")["found"]
    # Means of float32 maps in another order tie a few pixels otherwise.
    np.testing.assert_allclose(found.per_image[:2], expected, atol=1e-5)
    assert 0.3 < found.ceiling < 1
    assert found.ceiling == pytest.approx(np.mean(expected), abs=1e-5)
    assert (found.maps, found.excluded) == (2, 1)
    text = f"{found.ceiling:.5f} ± {found.standard_error:.5f}, 1 left out"
    assert text in capsys.readouterr().out


def test_loop(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, padding=2), torch.nn.Tanh(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 32 * 32, 5),
    )  # fmt: skip
    images, human, labels = torch.randn(6, 3, 32, 32), torch.rand(6, 1, 32, 32), torch.arange(6) % 5
    human[4] = 0.5
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels)[range(6), labels].sum(), pixels)
    rows = [0, 1, 2, 3, 5]
    expected = [
        stats.spearmanr(gradient[i].abs().amax(0).flatten(), human[i].flatten()).statistic
        for i in rows
    ]
    # The last batch repeats an image, as a distributed sampler does.
    batches = [(torch.tensor(n), images[n], human[n], labels[n]) for n in ([0, 1, 2], [3, 4, 5, 0])]
    score = run("loop", model=model, loader=batches)["score"]
    # Batches of other sizes round differently, which may exchange neighbours among 1,024 ranks:
    # each time a correlation moves by up to 1e-5.
    assert score.spearman == pytest.approx(np.mean(expected), abs=5e-5)
    assert score.score == pytest.approx(np.mean(expected) / 0.65753, abs=1e-4)
    assert (score.maps, score.excluded) == (5, 1)
    assert "%, 1 left out" in capsys.readouterr().out


def test_commands() -> None:
    """Programs, flags and choices of the page exist."""
    if (reason := extras.why_no_train()) is not None:
        pytest.skip(reason)
    import evaluate
    import reveal_experiment
    from evaluating import networks

    parsers = {
        "python/evaluate.py": evaluate.parser(),
        "python/reveal_experiment.py": reveal_experiment.parser(),
    }
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines()]
    assert len(commands) == 6
    for python, program, *arguments in commands:
        assert python == "python"
        parsers[program].parse_args(arguments)
    table = PAGE[PAGE.index("## Explanations") :].replace("`--explanation`", "")
    assert tuple(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == networks.EXPLANATIONS
    known = " ".join(parser.format_help() for parser in parsers.values())
    for flag in set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--pixels", "--images"}:
        assert flag in known, flag


def test_numbers() -> None:
    assert f"{alignment.CLICKME_CEILING}" in PAGE
