"""The goals that the fused kernels should reach, and how far a record says that they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import records
from records import COMPILE, COPY, Rows


@dataclass(frozen=True)
class Goal:
    """A ratio of two times, and what is asked of it."""

    text: str
    #: (case, implementation) of both times; see ``_time`` for the names of implementations.
    of: tuple[str, str]
    to: tuple[str, str]
    accept: float
    aim: float
    at_least: bool = False
    #: Divide by the numbers of pixels first.
    per_pixel: bool = False


_CPU = (
    Goal("eager, as released / ours", ("released", "eager"), ("released", "ours"), 15, 25, True),
    Goal("best torch.compile / ours", ("released", "compile"), ("released", "ours"), 5, 10, True),
    Goal("ours / copy", ("released", "ours"), ("released", COPY), 2, 1.25),
    Goal("paper / released", ("paper", "ours"), ("released", "ours"), 1.6, 1.3),
    Goal(
        "bfloat16 saliency / float32",
        ("released, bfloat16 saliency", "ours"),
        ("released", "ours"),
        1.25,
        1.0,
    ),
    Goal(
        "pixel rate at an odd size / at the even one",
        ("released", "ours"),
        ("released, odd size", "ours"),
        0.4,
        0.7,
        at_least=True,
        per_pixel=True,
    ),
)
_CUDA = (
    Goal("eager, as released / ours", ("released", "eager"), ("released", "ours"), 15, 35, True),
    Goal("best torch.compile / ours", ("released", "compile"), ("released", "ours"), 5, 12, True),
    Goal("ours / copy", ("released", "ours"), ("released", COPY), 1.5, 1.12),
    Goal(
        "ours / copy, bfloat16 saliency",
        ("released, bfloat16 saliency", "ours"),
        ("released, bfloat16 saliency", COPY),
        1.9,
        1.25,
    ),
    Goal("paper / released", ("paper", "ours"), ("released", "ours"), 1.6, 1.2),
    _CPU[-1],
)
GOALS = {"cpu": _CPU, "cuda": _CUDA}

#: Microseconds of one image with its gradient, call after call: accepted, aimed at.
LATENCY = {"cpu": (300.0, 150.0)}


def _time(rows: Rows, case: str, name: str, form: str) -> dict[str, Any] | None:
    """The row of a time; "ours" is the best backend's ``form``."""
    found = records.select(rows, case=case, quantity="time")
    if name == "eager":
        names = {"eager_released", "eager_paper"}
        found = [row for row in found if row["implementation"] in names]
    elif name == "compile":
        found = [row for row in found if row["implementation"].startswith(COMPILE)]
        found.sort(key=lambda row: float(row["value"]))
    elif name == "ours":
        # Best backend first, as they were measured; the reference is not ours to be proud of.
        found = [
            row
            for row in found
            if row["implementation"].endswith(f": {form}")
            and not row["implementation"].startswith("reference")
        ]
    else:
        found = [row for row in found if row["implementation"] == name]
    return found[0] if found else None


def _verdict(value: float, goal: tuple[float, float], at_least: bool) -> str:
    accept, aim = goal
    for limit, word in ((aim, "aim met"), (accept, "accepted")):
        if value >= limit if at_least else value <= limit:
            return word
    return "MISSED"


def goals(rows: Rows) -> list[dict[str, Any]]:
    """Goals of the headline cases that the rows suffice for, by medians and lower quartiles."""
    found: list[dict[str, Any]] = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = records.select(rows, device=device)
        kind = "cuda" if device.startswith("cuda") else "cpu"
        for form in ("op", "harmonization_loss"):
            for goal in GOALS[kind]:
                pair = [_time(here, *key, form) for key in (goal.of, goal.to)]
                if pair[0] is None or pair[1] is None:
                    continue
                a, b = pair[0], pair[1]
                scale = records.pixels(b) / records.pixels(a) if goal.per_pixel else 1.0
                value = scale * a["value"] / b["value"]
                found.append(
                    {
                        "device": device,
                        "goal": goal.text,
                        "of": form,
                        "unit": "ratio",
                        "sense": ">=" if goal.at_least else "<=",
                        "accept": goal.accept,
                        "aim": goal.aim,
                        "value": value,
                        "by_lower_quartile": scale * a["lower_quartile"] / b["lower_quartile"],
                        "verdict": _verdict(value, (goal.accept, goal.aim), goal.at_least),
                    }
                )
            one = _time(here, "one image, back to back", "ours", form)
            if one is not None and kind in LATENCY:
                accept, aim = LATENCY[kind]
                value = 1e3 * one["value"]
                found.append(
                    {
                        "device": device,
                        "goal": "one image, loss and gradient, back to back",
                        "of": form,
                        "unit": "us",
                        "sense": "<=",
                        "accept": accept,
                        "aim": aim,
                        "value": value,
                        "by_lower_quartile": 1e3 * one["lower_quartile"],
                        "verdict": _verdict(value, (accept, aim), False),
                    }
                )
            memory = _memory_goal(rows, here, device, form)
            found += [memory] if memory else []
    return found


def _memory_goal(rows: Rows, here: Rows, device: str, form: str) -> dict[str, Any] | None:
    """The gradient, which is the result, and a workspace per thread."""
    time = _time(here, "released", "ours", form)
    if time is None or device != "cpu":
        return None
    peaks = records.select(
        here,
        case="released",
        implementation=time["implementation"],
        quantity="peak extra memory",
    )
    if not peaks:
        return None
    peak = peaks[0]
    batch, _, height, width = peak["saliency"]
    # A thread works on two maps and their pyramids in float32: at most 8/3 maps, and a few rows.
    # Half a megabyte is how finely the resident set can be read.
    allowed = (batch + 3 * peak["threads"]) * height * width * 4 / 1e6 + 0.5
    value = float(peak["value"])
    return {
        "device": device,
        "goal": "peak extra memory: the gradient and a workspace per thread",
        "of": form,
        "unit": "MB",
        "sense": "<=",
        "accept": allowed,
        "aim": allowed,
        "value": value,
        "by_lower_quartile": value,
        "verdict": _verdict(value, (allowed, allowed), False),
    }
