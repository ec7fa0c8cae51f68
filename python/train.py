"""Trains a network whose input gradients agree with human maps: the reference training program.

Images with human maps (ClickMe) are mixed with images without; every update lowers cross entropy
and, where there is a map, the distance between it and the network's own. Flags have timm's names.

    python python/train.py --preset finetune --model vit_small_patch16_224 --no-freeze-norm \
        --clickme data/clickme/train --clickme-val data/clickme/val --data-dir data/imagenet

    torchrun --nproc-per-node 8 python/train.py --preset paper ...   # one machine; or many

The directory ``--output`` gets: ``last.pt``, from which the same command goes on, to the bit on a
CPU, after whatever stopped it; ``best_accuracy.pt`` and ``best_alignment.pt``; ``config.json``,
``summary.csv`` (a row per epoch), ``results.json``; TensorBoard's log; and a panel of images with
the maps of people and network. ``train(Config(...))`` does the same from Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import typing
from pathlib import Path

import command_line
import timm_networks
import torch
from torch import nn

import harmonizer_ext as hx
from harmonizer_ext.files.output import write_text
from harmonizer_ext.files.text import shown

try:
    timm_networks.import_timm()
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from training import checkpoint, config, data, evaluation, logbook, networks, panels, processes
    from training.ema import WeightAverage
except ImportError as error:
    raise ImportError(f"train.py: {error}; pip install harmonizer-ext[train]") from error

Config = config.Config
load_network = checkpoint.load_network

#: What is logged, and its mean over the updates of an epoch; the last one's over rows with a map.
TERMS = ("loss", "cross_entropy", "harmonization", "weight_penalty", "saliency_std")
#: Measures that a checkpoint is kept for, and which set decides: of the first that has it.
BEST = ("accuracy", "alignment")


def train(settings: Config) -> dict[str, typing.Any]:
    """Trains, evaluates, and writes to ``settings.output``.

    Returns:
        What ``results.json`` holds: "final" (the last ``evaluation.evaluate`` of each set),
        "history" (a dict per epoch), "seconds" of training, "images_per_second", "backend",
        "checkpoint", "config", "stopped_by" (the signal that ended it early, or 0).

    Raises:
        FileNotFoundError, ValueError, ImportError: bad input, before the first update.
        LockedError: another run writes to the same output.
        FloatingPointError: the loss is not finite; the last checkpoint is from before.
    """
    with (
        processes.join(settings.device) as world,
        processes.StopRequest(world) as stop,
        contextlib.ExitStack() as ended,
    ):
        # The weights are the same on every process.
        torch.manual_seed(settings.seed)
        model, form = networks.create(settings)
        training = data.open_training(settings, form.size, world)
        tests = data.open_tests(settings, form, world, training.folders)

        model = networks.prepare(model, settings, world)
        networks.training_mode(model, settings)
        step = networks.with_loss(model, settings, world)
        optimizer, set_learning_rate = create_optimizer(model, settings, training.updates_per_epoch)
        average = WeightAverage(model, settings.model_ema_decay) if settings.model_ema else None
        mixup = data.create_mixup(settings)
        run = checkpoint.Run(
            settings, world, form, training.images_per_update, model, optimizer, average,
            sources=training.sources,
        )  # fmt: skip
        # Dropout differs from process to process.
        torch.manual_seed(settings.seed + world.rank)
        ended.enter_context(processes.claim(settings.output, world))
        resume(run)
        progress = run.progress

        updates = settings.epochs * training.updates_per_epoch
        book = logbook.Logbook(settings, world, updates, progress.update)
        stopped_by = 0
        try:
            if progress.update == 0:
                rehearse(run, tests, book)
            while progress.epoch < settings.epochs and not stopped_by:
                stopped_by = train_epoch(run, step, training, mixup, set_learning_rate, stop, book)
                if not stopped_by:
                    run.save()  # an evaluation may be long
                    finish_epoch(run, training, tests, book)
        finally:
            book.close()
        return write_results(run, stopped_by)


def create_optimizer(
    model: nn.Module, settings: Config, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, typing.Callable[[int], None]]:
    """timm's optimizer, and what sets its learning rate for an update."""
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        layer_decay=settings.layer_decay,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        decay_epochs=settings.decay_epochs,
        decay_milestones=settings.decay_milestones,
        decay_rate=settings.decay_rate,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return optimizer, scheduler.step_update


def resume(run: checkpoint.Run) -> None:
    """Goes on from the checkpoint that the configuration asks for, if there is one."""
    last = Path(run.config.output) / "last.pt"
    exists = last.exists()
    finds = sum(run.world.gather(exists))
    config.expect(
        finds in (0, run.world.size),
        f"output: expected storage that all machines share, but {finds} of {run.world.size} "
        f"processes find {shown(last)}",
    )
    if run.config.resume == "none":
        message = f"resume: {shown(last)} exists already; name another --output, or --resume auto"
        config.expect(not exists, message)
    elif run.config.resume != "auto":
        run.load(Path(run.config.resume))
    elif exists:
        run.load(last)
    run.world.wait()


def rehearse(run: checkpoint.Run, tests: dict[str, data.Test], book: logbook.Logbook) -> None:
    """Does once, on a batch, what the end of an epoch does: what would fail there, fails here.

    Raises:
        OSError: there is no room for the checkpoints to come.
    """
    output = Path(run.config.output)
    for name, test in tests.items():
        evaluate(run, name, test, book, batches=1)
    run.save()
    if run.world.main:
        # A smaller one than the next, which has the optimizer's state.
        size, free = (output / "last.pt").stat().st_size, shutil.disk_usage(output).free
        count = 1 + (len(BEST) if tests else 0)
        config.expect(
            free >= count * size,
            f"output: expected room for {count} more checkpoints of {size / 1e6:.1f} MB or more, "
            f"{output} has {free / 1e6:.1f} MB",
            OSError,
        )


def train_epoch(
    run: checkpoint.Run,
    step: nn.Module,
    training: data.Training,
    mixup: typing.Any,
    set_learning_rate: typing.Callable[[int], None],
    stop: processes.StopRequest,
    book: logbook.Logbook,
) -> int:
    """The rest of an epoch. Returns the signal that asked to stop, after a checkpoint, or 0."""
    settings, world, progress, model = run.config, run.world, run.progress, run.model
    device, parts = world.device, settings.accumulation(world.size)
    networks.training_mode(model, settings)
    sums = torch.tensor(progress.sums or [0.0] * (len(TERMS) + 1), device=device)
    training.sampler.set_epoch(progress.epoch, start_batch=progress.batch)
    batches = iter(training.batches)
    waited, logged_at, logged_update = 0.0, time.perf_counter(), progress.update
    while progress.batch < training.updates_per_epoch:
        start = time.perf_counter()
        set_learning_rate(progress.update)
        for part in range(parts):
            asked = time.perf_counter()
            collated = next(batches)
            waited += time.perf_counter() - asked
            collated, readable = data.readable(collated)
            batch = data.to_device(collated, settings.num_classes, device)
            if settings.lambda_harmonization == 0:
                batch = batch._replace(tokens=torch.zeros_like(batch.tokens))
            if mixup is not None:
                batch = data.Batch(*mixup(*batch, step=progress.update * parts + part))
            images = run.form(batch.images, settings.channels_last)
            with networks.without_exchange(step, model, last=part == parts - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                    out = step(images, batch.labels, batch.heatmaps, batch.tokens)
                (out.loss / parts if readable else out.loss * 0).backward()
            terms = summands(out) * readable
            sums += terms / parts
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if run.average is not None:
            run.average.update()
        progress.batch += 1
        progress.update += 1
        stopped_by = stop.after_update()
        progress.epoch_seconds += time.perf_counter() - start

        values = None
        if progress.update % settings.log_interval == 0:  # reading a value waits for the GPU
            values = means(mean_over_processes(terms, world), 1)
            check_finite(values["loss"], run)
            seconds = time.perf_counter() - logged_at
            images_done = (progress.update - logged_update) * training.images_per_update
            values |= {"images_per_second": images_done / seconds, "waiting": waited / seconds}
            values |= {"learning_rate": run.optimizer.param_groups[0]["lr"]}
            waited, logged_at, logged_update = 0.0, time.perf_counter(), progress.update
        book.update(progress.update, values)
        interval = settings.checkpoint_interval
        if stopped_by or (interval and progress.update % interval == 0):
            progress.sums = mean_over_processes(sums, world)
            check_finite(progress.sums[0], run)
            run.save()
        if stopped_by:
            book.note(f"stopped by {signal.Signals(stopped_by).name}; the same command goes on")
            return stopped_by
    progress.sums = mean_over_processes(sums, world)
    check_finite(progress.sums[0], run)
    return 0


def summands(out: hx.HarmonizerOutput) -> torch.Tensor:
    """The terms of a batch, and the number of its rows with a human map."""
    terms = [getattr(out, term) for term in TERMS[:-1]]
    terms += [out.row_saliency_std.sum(), out.mapped_rows]
    return torch.stack([term.detach().float() for term in terms])


def means(sums: list[float], batches: int) -> dict[str, float]:
    """Means of summed ``summands``; a batch without a mapped row has no part in the last one."""
    *terms, stds, rows = sums
    values = {term: total / batches for term, total in zip(TERMS, terms, strict=False)}
    return values | {TERMS[-1]: stds / rows if rows else 0.0}


def mean_over_processes(terms: torch.Tensor, world: processes.World) -> list[float]:
    return (world.total(terms.double()) / world.size).tolist()


def check_finite(loss: float, run: checkpoint.Run) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss: expected a finite value, got {loss} near update {run.progress.update}; lower "
            f"--lr or set --clip-grad. {run.config.output}/last.pt is from before"
        )


def count_skipped(world: processes.World, *stored: typing.Any) -> int:
    """Records and images that were left out since the start of the program, by any process."""
    return sum(
        len({record for records in world.gather(part.skipped) for record in records})
        for part in stored
        if part is not None
    )


def finish_epoch(
    run: checkpoint.Run,
    training: data.Training,
    tests: dict[str, data.Test],
    book: logbook.Logbook,
) -> None:
    """Evaluates, logs and keeps what the epoch has led to."""
    settings, progress = run.config, run.progress
    seconds = progress.epoch_seconds
    row: dict[str, typing.Any] = {"epoch": progress.epoch, "update": progress.update}
    row |= {"learning_rate": run.optimizer.param_groups[0]["lr"], "seconds": seconds}
    if settings.skip_corrupt:
        row["skipped"] = count_skipped(run.world, *training.stored)
    count = training.updates_per_epoch
    row |= {"images_per_second": count * training.images_per_update / seconds}
    row |= means(progress.sums, count)
    names = []
    ends = progress.epoch + 1
    evaluated = ends % settings.val_interval == 0 or ends == settings.epochs
    if evaluated:
        measures = {name: evaluate(run, name, test, book) for name, test in tests.items()}
        progress.measures = measures
        for name, values in measures.items():
            row |= {f"{name}_{key}": value for key, value in values.items()}
        for key in BEST:
            # Accuracy is of the images of the task where there are any.
            order = sorted(measures, key=lambda name: name != "images")
            value = next((measures[n][key] for n in order if key in measures[n]), math.nan)
            if value > progress.best.get(key, -math.inf):
                progress.best[key] = value
                names.append(f"best_{key}")
    progress.history.append(row)
    progress.seconds += seconds
    progress.epoch, progress.batch, progress.sums, progress.epoch_seconds = (
        progress.epoch + 1, 0, [], 0.0,
    )  # fmt: skip
    book.epoch(progress.update, row, progress.history, told=evaluated)
    run.save(*names)


def evaluate(
    run: checkpoint.Run,
    name: str,
    test: data.Test,
    book: logbook.Logbook,
    batches: int | None = None,
) -> dict[str, float]:
    """``evaluation.evaluate`` of the averaged weights, if there are; draws the panel."""
    swapped = run.average.swapped_in() if run.average is not None else contextlib.nullcontext()
    settings = run.config
    with swapped:
        measures, panel = evaluation.evaluate(
            run.model,
            test,
            run.form,
            run.world,
            channels_last=settings.channels_last,
            classes=settings.num_classes,
            panel_images=settings.panel_images,
            batches=batches,
        )
    if settings.skip_corrupt:
        measures["skipped"] = count_skipped(run.world, test.stored)
    if panel is not None:
        path = Path(settings.output) / f"panel_{panels.file_name(name)}.png"
        title = (
            f"{name}, epoch {run.progress.epoch + 1}" if batches is None else f"{name}, untrained"
        )
        try:
            book.picture(run.progress.update, f"panel_{name}", panels.draw(panel, path, title))
        except Exception as error:
            if batches is not None:  # the rehearsal, which is there to fail
                raise
            book.note(f"the picture of {shown(name)} could not be drawn: {shown(error)}")
    return measures


def write_results(run: checkpoint.Run, stopped_by: int) -> dict[str, typing.Any]:
    """Writes and returns ``results.json``."""
    progress, output = run.progress, Path(run.config.output)
    seconds = progress.seconds + progress.epoch_seconds
    results: dict[str, typing.Any] = {
        "final": progress.measures,
        "history": progress.history,
        "seconds": seconds,
        "images_per_second": progress.update * run.images_per_update / max(seconds, 1e-9),
        "backend": run.config.backend or hx.available_backends(run.world.device.type)[0],
        "checkpoint": str(output / "last.pt"),
        "stopped_by": stopped_by,
        "processes": run.world.size,
        "config": dataclasses.asdict(run.config),
        "version": hx.__version__,
    }
    if run.world.main:
        write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def main() -> None:
    try:
        results = train(config.parse())
    except command_line.EXPECTED as error:
        raise SystemExit(f"train.py: error: {command_line.message(error)}") from error
    if results["stopped_by"]:
        sys.exit(128 + results["stopped_by"])
    if int(os.environ.get("RANK", 0)):
        return  # of several processes the first one tells
    for name, measures in results["final"].items():
        values = (f"{key} {value:.4g}" for key, value in measures.items())
        print(shown(name), *values, sep="  ")


if __name__ == "__main__":
    main()
