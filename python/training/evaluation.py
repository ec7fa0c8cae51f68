"""What a network does on a set of images: its accuracy, and whether it looks where people look."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import alignment
from training import data
from training.networks import InputForm
from training.processes import World


class Panel(NamedTuple):
    """The first images of a set with their maps, on the CPU.

    Attributes:
        images: (n, 3, H, W) in 0..255.
        human, network: (n, H, W).
        correlations: (n,), Spearman's.
        labels, predictions: (n,).
    """

    images: Tensor
    human: Tensor
    network: Tensor
    correlations: Tensor
    labels: Tensor
    predictions: Tensor


def evaluate(
    model: nn.Module,
    test: data.Test,
    form: InputForm,
    world: World,
    *,
    channels_last: bool = False,
    classes: int = 1000,
    panel_images: int = 0,
    batches: int | None = None,
) -> tuple[dict[str, float], Panel | None]:
    """Accuracy, and for images with human maps how the network's agree with them.

    Args:
        model: left in eval mode.
        test: this process's share; the results are of all shares.
        panel_images: how many of the first images to return with their maps.
        batches: only so many of the first batches.

    Returns:
        "accuracy"; "alignment", the mean Spearman correlation of the human map with the absolute
        input gradient of the true class's logit, its largest value over channels, as in the
        released evaluation; "alignment_signed", that of the mean over channels, which is what the
        loss sees; "saliency_std", the latter's mean standard deviation; "excluded", the number of
        pairs of which one map is constant. Rows that could not be read (a label below 0) have no
        part in any of them. And, on the first process, the panel.
    """
    model.eval()
    names = ["accuracy", "alignment", "alignment_signed", "saliency_std"]
    sums = torch.zeros(2, len(names), dtype=torch.float64, device="cpu")
    panel: Panel | None = None
    done = 0
    for index, collated in enumerate(test.batches):
        if index == batches:
            break
        batch = data.to_device(collated, classes, world.device)
        left_out = collated.label < 0
        batch = batch._replace(labels=batch.labels.clamp(min=0))
        # Rows beyond the share only keep the processes in step.
        rows = slice(0, max(min(len(batch.labels), test.count - done), 0))
        done += len(batch.labels)
        pixels = form(batch.images, channels_last)
        if not test.mapped:
            with torch.no_grad():
                logits = model(pixels)
            columns = [(logits.argmax(1) == batch.labels).double()]
        else:
            logits, maps = hx.input_gradient(model, pixels, batch.labels, create_graph=False)
            signed, largest = maps.mean(1), maps.abs().amax(1)
            human = batch.heatmaps[:, 0]
            columns = [
                (logits.argmax(1) == batch.labels).double(),
                alignment.spearman(largest, human),
                alignment.spearman(signed, human),
                signed.flatten(1).std(1, correction=0).double(),
            ]
            if index == 0 and panel_images and world.main:
                first = slice(0, min(panel_images, rows.stop))
                tensors = (batch.images, human, largest, columns[1], batch.labels, logits.argmax(1))
                panel = Panel(*(tensor[first].detach().float().cpu() for tensor in tensors))
        for column, values in enumerate(columns):
            values = values.detach().cpu().masked_fill(left_out, torch.nan)[rows]
            defined = ~values.isnan()
            sums[0, column] += values[defined].sum()
            sums[1, column] += defined.sum()
    totals = world.total(sums)
    kept = names if test.mapped else names[:1]
    measures = {name: (totals[0, i] / totals[1, i]).item() for i, name in enumerate(kept)}
    if test.mapped:
        measures["excluded"] = (totals[1, 0] - totals[1, 1]).item()
    return measures, panel
