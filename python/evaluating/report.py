"""The report: one HTML page that needs nothing else, to put beside a paper."""

from __future__ import annotations

import os
import string
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluating import figures, pictures, summary
from evaluating.scoring import Evaluation, Gallery, Panel
from evaluating.summary import cell
from harmonizer_ext import alignment
from harmonizer_ext.files.output import write_text
from harmonizer_ext.files.text import shown

TEMPLATE = Path(__file__).with_name("report.html")
#: Galleries that are open when the page is.
_OPEN = 3
_MINUS = "\N{MINUS SIGN}"


def write(
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    *,
    command: str | None = None,
    title: str = "Where networks and people look",
    class_names: Sequence[str] | None = None,
    numbers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the page.

    A picture that cannot be drawn is left out of it, with the reason in its place.

    Args:
        evaluation: of ``evaluating.evaluate``.
        path: of the page.
        command: the command line that made it, for the page to show.
        title: of the page.
        class_names: by class number, for the galleries.
        numbers: ``summary.summarize(evaluation)``, where they are there already.

    Returns:
        The numbers of the page.
    """
    numbers = numbers or summary.summarize(evaluation, command)
    parts = [
        _main_table(numbers),
        _resolutions(numbers),
        _pairs(numbers),
        _or_reason("scatter", lambda: _scatter(evaluation, numbers)),
        _or_reason("distributions", lambda: _distributions(evaluation)),
        _or_reason("galleries", lambda: _galleries(evaluation, class_names)),
    ]
    count = len(evaluation.results)
    lead = (
        f"{count} network{'s' if count > 1 else ''} on {len(evaluation.data):,} images of "
        f"{escape(evaluation.data.name)}, {numbers['provenance']['date'][:10]}"
    )
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        lead=lead,
        body="\n".join(parts),
        provenance=_provenance(numbers),
        **_methods(evaluation, numbers),
    )
    write_text(path, page)
    return numbers


def _or_reason(what: str, draw: Callable[[], str]) -> str:
    """Pictures, or why there are none: numbers and other pictures are not lost with them."""
    try:
        return draw()
    except Exception as error:  # noqa: BLE001 - of whatever library; it is told, here and there
        reason = f"{type(error).__name__}: {shown(error)}"
        print(f"report: the {what} could not be drawn: {reason}", file=sys.stderr)
        return f'<p class="note">The {what} could not be drawn: {escape(reason)}</p>'


# --- numbers --------------------------------------------------------------------------------------

#: Head of a column, key of the number, whether it is a percentage.
_COLUMNS = (
    ("top-1 (%)", "top1", True),
    ("Spearman ρ", "spearman", False),
    ("alignment (% of ceiling)", "alignment", True),
    ("Dice", "dice", False),
    ("IoU", "iou", False),
)


def _number(value: dict[str, float], **options: bool) -> str:
    """A cell whose error a telephone shows below the number."""
    number, sign, error = cell(value, **options).partition(" ± ")
    return number + (f"<small>{sign}{error}</small>" if sign else "")


def _main_table(numbers: dict[str, Any]) -> str:
    networks, controls = numbers["networks"], numbers["controls"]
    left_out = any(row["excluded"] for row in networks + controls)
    elsewhere = any(row["accuracy"] != row["top1"]["mean"] for row in networks)
    columns = list(_COLUMNS)
    heads = "".join(f'<th scope="col">{head}</th>' for head, _, _ in columns)
    heads += '<th scope="col">ImageNet top-1 (%)</th>' if elsewhere else ""
    heads += '<th scope="col">left out</th>' if left_out else ""
    best = {
        key: max((row[key]["mean"] for row in networks if row[key]["mean"] == row[key]["mean"]),
                 default=None)
        for _, key, _ in columns
    }  # fmt: skip

    def line(row: dict[str, Any]) -> str:
        size = f"{row['input_size']}×{row['input_size']}"
        about = row["description"]
        if row["parameters"]:
            about += f"; {row['parameters'] / 1e6:.1f} M parameters" + f", {size} pixels"
        elif len(controls) > 1:
            about += f"; {size} pixels"
        cells = ""
        for _, key, percent in columns:
            if key not in row:
                cells += "<td>–</td>"
                continue
            mark = len(networks) > 1 and "top1" in row and row[key]["mean"] == best[key]
            text = _number(row[key], percent=percent)
            cells += f'<td data-key="{key}"{" class=best" if mark else ""}>{text}</td>'
        if elsewhere:
            cells += f"<td>{100 * row['accuracy']:.1f}</td>" if "accuracy" in row else "<td>–</td>"
        cells += f"<td>{row['excluded']}</td>" if left_out else ""
        name = f'{escape(row["name"])}<span class="from">{escape(about)}</span>'
        return f'<tr><th scope="row">{name}</th>{cells}</tr>'

    body = "\n".join(map(line, networks))
    foot = f"<tfoot>{''.join(map(line, controls))}</tfoot>" if controls else ""
    note = "± is the bootstrap standard error over images. Best of each column in bold."
    if controls:
        note += (
            " The control predicts each image's human map by the mean of all others: a network that"
            " does not exceed it has not been shown to look where people look."
        )
        note += _below_control(networks, controls)
    if any(row["alignment"]["mean"] > 1 for row in networks + controls):
        note += (
            f" Above 100 %: closer to people's maps than the ceiling ({numbers['ceiling']:g}) says"
            " that people are to one another. Is it one of these data?"
        )
    if left_out:
        note += (
            " Left out: images with a constant map (a zero gradient, for instance), which has no"
            " correlation."
        )
    return f"""<section id="results"><h2>Results</h2>
<div class="wide"><table class="numbers" id="table">
<thead><tr><th scope="col">network</th>{heads}</tr></thead>
<tbody>{body}</tbody>
{foot}</table></div>
<p class="note">{note}</p></section>"""


def _below_control(networks: list[dict[str, Any]], controls: list[dict[str, Any]]) -> str:
    """Who has not been shown to look where people look, as a sentence."""
    level = {row["input_size"]: row for row in controls}
    below = [
        f"{escape(row['name'])} ({', '.join(name for _, name in lower)})"
        for row in networks
        if (
            lower := [
                (key, name)
                for key, name in (("spearman", "ρ"), ("dice", "Dice"), ("iou", "IoU"))
                if row["input_size"] in level
                and not row[key]["mean"] > level[row["input_size"]][key]["mean"]
            ]
        )
    ]
    return f" <b>Not above the control:</b> {'; '.join(below)}." if below else ""


def _resolutions(numbers: dict[str, Any]) -> str:
    coarse = [reducer for reducer in numbers["reducers"] if reducer != 1]
    if not coarse:
        return ""
    rows = numbers["networks"] + numbers["controls"]
    left_out = {r for r in coarse if any(row[f"excluded/{r}"] for row in rows)}
    heads = "".join(
        f'<th scope="col">ρ, 1/{r} of the size</th><th scope="col">alignment, 1/{r} (%)</th>'
        + (f'<th scope="col">left out, 1/{r}</th>' if r in left_out else "")
        for r in coarse
    )
    lines = ""
    for row in rows:
        cells = "".join(
            f"<td>{_number(row[f'spearman/{r}'])}</td>"
            f"<td>{_number(row[f'alignment/{r}'], percent=True)}</td>"
            + (f"<td>{row[f'excluded/{r}']}</td>" if r in left_out else "")
            for r in coarse
        )
        lines += f'<tr><th scope="row">{escape(row["name"])}</th>{cells}</tr>'
    note = (
        "Both maps resized bilinearly without antialiasing, as in the paper's code; relative to "
        "the same ceiling."
    )
    if left_out:
        note += " Left out: images with a map that is constant at that size."
    return f"""<section><h3>At lower resolutions</h3>
<div class="wide"><table class="numbers"><thead><tr><th scope="col">network</th>{heads}</tr></thead>
<tbody>{lines}</tbody></table></div>
<p class="note">{note}</p></section>"""


def _pairs(numbers: dict[str, Any]) -> str:
    if not numbers["pairs"]:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escape(pair["baseline"])} → {escape(pair["harmonized"])}</th>'
        f"<td>{_number(pair['top1'], percent=True, signed=True)}</td>"
        f"<td>{_number(pair['spearman'], signed=True)}</td>"
        f"<td>{_number(pair['alignment'], percent=True, signed=True)}</td></tr>"
        for pair in numbers["pairs"]
    )
    return f"""<section id="pairs"><h3>What harmonization changed</h3>
<div class="wide"><table class="numbers"><thead><tr><th scope="col">baseline → harmonized</th>
<th scope="col">top-1 (points)</th><th scope="col">Spearman ρ</th>
<th scope="col">alignment (points)</th></tr></thead>
<tbody>{lines}</tbody></table></div>
<p class="note">Mean of the differences of each image, with its bootstrap standard error: smaller
than the errors of the two means suggest, because how hard an image is, is common to both.</p>
</section>"""


# --- pictures -------------------------------------------------------------------------------------


def _twice(draw: Callable[[float], str]) -> str:
    """A picture for screens and one for telephones, of which the page shows one."""
    wide, narrow = draw(figures.WIDE), draw(figures.NARROW)
    return wide and f'<div class="screen">{wide}</div><div class="telephone">{narrow}</div>'


def _scatter(evaluation: Evaluation, numbers: dict[str, Any]) -> str:
    drawn = _twice(lambda width: figures.scatter(evaluation, numbers, width))
    if not drawn:
        return ""
    caption = (
        f"Mean Spearman correlation of human and network maps as a part of the human ceiling "
        f"({evaluation.ceiling:g}), against top-1 accuracy. Error bars: bootstrap standard errors. "
        f"Shaded: what the networks{' that are not harmonized' if evaluation.pairs else ''} reach "
        f"in both respects, up to their Pareto front."
    )
    if evaluation.pairs:
        caption += " Arrows: from a baseline (blue circle) to the same network harmonized (orange"
        caption += " diamond)."
        if len({name for pair in evaluation.pairs for name in pair}) < len(evaluation.results):
            caption += " Grey: other networks."
    if evaluation.controls:
        caption += " Dashed: what the mean human map of all other images reaches."
    return (
        f'<section id="scatter"><h2>Alignment against accuracy</h2><figure>{drawn}'
        f"<figcaption>{caption}</figcaption></figure></section>"
    )


def _distributions(evaluation: Evaluation) -> str:
    drawn = _twice(lambda width: figures.distributions(evaluation, width))
    if not drawn:
        return ""
    caption = (
        "Histograms of the Spearman correlation of single images; the upright line and the number "
        "are the mean. Each row is scaled to its own highest bar."
    )
    return (
        f'<section id="distributions"><h2>Image by image</h2><figure>{drawn}'
        f"<figcaption>{caption}</figcaption></figure></section>"
    )


def _galleries(evaluation: Evaluation, class_names: Sequence[str] | None) -> str:
    if not evaluation.galleries:
        return ""
    random, *others = evaluation.galleries
    parts = [f"<h3>{escape(random.title)}</h3>{_gallery(random, class_names)}"]
    for number, gallery in enumerate(others):
        state = " open" if number < _OPEN else ""
        parts.append(
            f"<details{state}><summary>Best, median and worst of {escape(gallery.title)}</summary>"
            f"{_gallery(gallery, class_names)}</details>"
        )
    note = (
        f"Nothing is hand-picked: random images are drawn with seed "
        f"{evaluation.settings['seed']}; the others are those of the highest, middle and lowest "
        f"Spearman correlation of that network, which is below each map. Maps go from 0 (dark) to "
        f"the {pictures.PERCENTILE}th percentile of their own values (bright); signed maps from "
        f"purple (negative) over white to orange. Correlations do not depend on that scale."
    )
    inner = "\n".join(parts)
    return f'<section id="galleries"><h2>Maps</h2><p class="note">{note}</p>{inner}</section>'


def _gallery(gallery: Gallery, class_names: Sequence[str] | None) -> str:
    """A column for each image: the image, people's map, each network's."""
    panels = [
        (panel, place == 0 and group > 0)
        for group, some in enumerate(gallery.groups.values())
        for place, panel in enumerate(some)
    ]
    several = len(gallery.groups) > 1
    head = ""
    if several:
        cells = "".join(
            f'<th scope="colgroup" colspan="{len(some)}">{name}</th>'
            for name, some in gallery.groups.items()
        )
        head = f"<thead><tr><td></td>{cells}</tr></thead>"

    def line(name: str, make: Any) -> str:
        cells = "".join(
            f"<td{' class=gap' if gap else ''}>{make(panel)}</td>" for panel, gap in panels
        )
        return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'

    def image(panel: Panel) -> str:
        named = _class(panel, class_names)
        picture = _img(pictures.picture(panel.image), f"Image {panel.row}, {named}")
        return picture + f"<small>{escape(named)}</small>"

    def human(panel: Panel) -> str:
        return _img(pictures.heat(panel.human), f"Human importance map of image {panel.row}")

    def network(name: str) -> Any:
        def make(panel: Panel) -> str:
            rho = panel.correlations[name]
            text = "no ρ" if rho != rho else f"ρ = {round(rho, 2) + 0.0:.2f}".replace("-", _MINUS)
            alternative = f"Map of {name} for image {panel.row}, {text}"
            return _img(pictures.heat(panel.maps[name]), alternative) + f"<small>{text}</small>"

        return make

    lines = [line("image", image), line("people", human)]
    lines += [line(name, network(name)) for name in gallery.networks]
    body = "\n".join(lines)
    return f'<div class="wide"><table class="maps">{head}<tbody>{body}</tbody></table></div>'


def _img(url: str, alternative: str) -> str:
    side = pictures.SIDE
    return f'<img src="{url}" alt="{escape(alternative)}" width="{side}" height="{side}">'


def _class(panel: Panel, class_names: Sequence[str] | None) -> str:
    return class_names[panel.label] if class_names else f"class {panel.label}"


# --- words ----------------------------------------------------------------------------------------


def _methods(evaluation: Evaluation, numbers: dict[str, Any]) -> dict[str, str]:
    """What the methods section of the template leaves open."""
    data = numbers["data"]
    share = ""
    if data["images"] < data["images_available"]:
        share = f" ({data['images']:,} of {data['images_available']:,}, at equal distances)"
    explained = sorted({row["explanation"] for row in numbers["networks"]})
    published = evaluation.ceiling == alignment.CLICKME_CEILING
    return {
        "data": escape(data["name"]) + share,
        "preprocessing": escape(data["preprocessing"]),
        "explanations": " or ".join(f"<code>{escape(text)}</code>" for text in explained),
        "ceiling": f"{evaluation.ceiling:g}",
        "published": " (0.65753, as published for ImageNet ClickMe)" if published else "",
    }


def _provenance(numbers: dict[str, Any]) -> str:
    made = numbers["provenance"]
    rows = {
        "data": ", ".join(numbers["data"]["paths"]),
        "images": f"{numbers['data']['images']:,}",
        "ceiling": f"{numbers['ceiling']:g}",
        "explanation": numbers["settings"]["explanation"],
        "batch size": str(numbers["settings"]["batch_size"]),
        "seed": str(numbers["settings"]["seed"]),
        "device": made["device"],
        "time": ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in numbers["networks"]),
        "date": made["date"].replace("T", " "),
        "versions": f"harmonizer_ext {made['harmonizer_ext']}, PyTorch {made['torch']}, "
        f"torchvision {made['torchvision']}, timm {made['timm']}, Python {made['python']}",
    }
    rows |= {"JPEG decoder": numbers["data"]["decoder"]} if numbers["data"]["decoder"] else {}
    rows |= {"commit": made["commit"]} if made["commit"] else {}
    rows |= {"command": made["command"]} if made["command"] else {}
    inner = "".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in rows.items())
    return f"<dl>{inner}</dl>"
