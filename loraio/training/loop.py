"""Train a base model from fresh weights, and adapters on a frozen base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraio.adapter import Adapter
from loraio.bases.networks import NETWORKS, build_network, find_network
from loraio.errors import DataError, TrainingError
from loraio.live.attachment import Attachment, attach
from loraio.training.batches import epoch_batches, focused_batches, refuse_missing, stratified_split
from loraio.training.config import PretrainConfig, TrainConfig
from loraio.training.datasets import Dataset
from loraio.training.evaluation import Evaluation, evaluate, has_outputs, predict, preserved_modes
from loraio.training.optimizing import Observer, OnProgress, Optimization, Plan, optimize
from loraio.training.placement import placed, takes_channels_last
from loraio.training.planning import new_adapter
from loraio.training.provenance import adapter_record
from loraio.training.resuming import SideFile, run_identity
from loraio.training.run_files import MetricsLog, RunFiles, TensorBoardLog
from loraio.training.validation import Validation


def pretrain(
    network: str,
    config: PretrainConfig,
    dataset: Dataset,
    *,
    network_args: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Train a network by name from fresh weights with Adam.

    Args:
        network: name, as for `loraio.bases.networks.find_network`.
        config: epochs, batch size, learning rate, seed.
        dataset: training images, of as many classes as the network has outputs.
        network_args: keyword options of the network, such as ``{"num_classes": 10}``.
        on_progress: called every `loraio.training.optimizing.REPORT_EVERY` steps and after the last.

    Returns:
        the network, in eval mode.

    Raises:
        UnknownNameError: no such network.
        ConfigError: the network cannot be built with these options.
        DataError: the network is for other images, or for another number of classes.
        TrainingError: the loss became NaN or infinite.
    """
    entry = find_network(network, network_args)
    found, needed = (tuple(dataset.images.shape[1:]), dataset.classes), (entry.input_shape, entry.classes)
    if network in NETWORKS and found != needed:
        raise DataError(
            f"the data set has images {found[0]} of {found[1]} classes, {network!r} is for {needed[0]} of {needed[1]}"
        )
    model = build_network(network, args=network_args, seed=config.seed)
    predict(model, dataset.images[:1], classes=dataset.classes)  # other networks take many sizes: try
    steps = config.epochs * math.ceil(len(dataset) / config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    batches = epoch_batches(len(dataset), config.batch_size, config.epochs, generator=generator)
    model.train()
    settings = TrainConfig(lr=config.lr, seed=config.seed)
    plan = Plan(settings=settings, steps=steps, label=network, on_progress=on_progress)
    optimize(model, dict(model.named_parameters()), batches, dataset, plan)
    return model.eval()


def train(
    model: nn.Module,
    config: TrainConfig,
    dataset: Dataset,
    *,
    held_out: Dataset | None = None,
    before: Evaluation | None = None,
    files: RunFiles | None = None,
    on_progress: OnProgress | None = None,
) -> Adapter:
    """Train an adapter on a frozen base; the model is given back unchanged, to the bit.

    Args:
        model: the base model, on any device.
        config: digit, rank, targets, focus and the rest.
        dataset: images to train on, and to hold out for validation.
        held_out: images for the results before and after; by default the data set itself.
        before: results of the base on them, if they are known: saves one run over them for each adapter. There are none
            where a new head replaces one for another number of classes.
        files: log and side file to write, and whether to resume.
        on_progress: called every `loraio.training.optimizing.REPORT_EVERY` steps and after the last.

    Returns:
        the adapter, on the CPU; its ``training`` records settings, versions and results.

    Raises:
        UnknownNameError: a target pattern matches nothing.
        ConfigError: a rank is too large for a weight, a device is missing, and so on.
        DataError: the data set lacks the digit, or the model does not fit it.
        StateError: the model carries an adapter already.
        TrainingError: the loss became NaN or infinite, or the factors did not move.
        OutputExistsError, OutputError, MissingFileError, FormatError: one of the ``files`` cannot be written or read.
    """
    files = files or RunFiles()
    files.check()
    with placed(model, config.device):
        fresh = new_adapter(model, config)
        rows, held = _drawn(config, dataset)
        counted_on = dataset if held_out is None else held_out
        before = before or _results_of_base(model, config, counted_on)
        label = "all classes" if config.digit is None else f"digit {config.digit}"
        plan = Plan(settings=config, steps=len(rows) // config.accumulate, label=label, on_progress=on_progress)
        validation = None if held is None else Validation(model, held, every=config.val_every, patience=config.patience)
        side = _side_file(files, dataset, fresh, plan, validation)
        with _frozen(model), attach(model, fresh, trainable=True) as live:
            if config.heads:
                predict(model, dataset.images[:1], classes=dataset.classes)
            run = _optimized(model, live, rows, dataset, plan, files=files, validation=validation, side=side)
            if validation is not None:
                validation.give_best(run)
            trained = live.adapter
            _refuse_unmoved(fresh, trained, label)
        with attach(model, trained):
            after = evaluate(model, counted_on)
    record = adapter_record(
        config, dataset, counted_on, steps=plan.steps, before=before, after=after, validation=validation
    )
    return replace(trained, training=record)


def train_each(
    model: nn.Module,
    config: TrainConfig,
    dataset: Dataset,
    *,
    digits: Iterable[int | None] | None = None,
    held_out: Dataset | None = None,
    files: RunFiles | None = None,
    on_progress: OnProgress | None = None,
    on_trained: Callable[[int | None, Adapter], None] | None = None,
) -> dict[int | None, Adapter]:
    """Train one adapter for each digit, one after another with the same settings; see `train`.

    Missing classes and files that cannot be written are refused before the first run.

    Args:
        digits: numbers of classes; None is an adapter for all classes. By default every class of the data set.
        files: as for `train`; each of several digits has files of its own, named by `RunFiles.of`.
        on_trained: called with each digit and its adapter as soon as it is trained, for example to save it.

    Returns:
        the adapters by digit, in the order of ``digits``.
    """
    chosen: list[int | None] = list(range(dataset.classes) if digits is None else digits)
    own = dict.fromkeys(chosen, files or RunFiles())
    if files is not None and len(chosen) > 1:
        own = {digit: files.of(f"digit-{digit}") for digit in chosen}
        if files.resume and not any(one.resume for one in own.values()):
            files.check()  # says that there is nothing to resume from
    for digit in chosen:
        own[digit].check()
        if digit is not None:
            refuse_missing(dataset.labels, digit)
    adapters: dict[int | None, Adapter] = {}
    with placed(model, config.device):
        before = _results_of_base(model, config, dataset if held_out is None else held_out)
        for digit in chosen:
            adapters[digit] = train(
                model,
                replace(config, digit=digit),
                dataset,
                held_out=held_out,
                before=before,
                files=own[digit],
                on_progress=on_progress,
            )
            if on_trained is not None:
                on_trained(digit, adapters[digit])
    return adapters


def _drawn(config: TrainConfig, dataset: Dataset) -> tuple[Tensor, Dataset | None]:
    """Draw the batches of the whole run, (steps * accumulate, batch_size) indices, and the validation images."""
    labels, held, kept = dataset.labels, None, None
    if config.val_share:
        split = torch.Generator().manual_seed(config.seed)
        kept, rest = stratified_split(labels, config.val_share, generator=split)
        if not len(rest):
            raise DataError("no class has two images, so none can be held out", hint="without --val-share")
        held = replace(dataset, images=dataset.images[rest], labels=labels[rest])
        labels = labels[kept]
    steps = config.steps or math.ceil(len(labels) / (config.batch_size * config.accumulate))
    rows = focused_batches(
        labels,
        config.digit,
        focus=config.focus,
        batch_size=config.batch_size,
        steps=steps * config.accumulate,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return (rows if kept is None else kept[rows]), held


def _side_file(
    files: RunFiles, dataset: Dataset, fresh: Adapter, plan: Plan, validation: Validation | None
) -> SideFile | None:
    if files.checkpoint is None:
        return None
    identity = run_identity(plan.settings, dataset, steps=plan.steps, base_sha256=fresh.base.sha256)
    return SideFile(Path(files.checkpoint), every=files.checkpoint_every, identity=identity, validation=validation)


def _optimized(
    model: nn.Module,
    live: Attachment,
    rows: Tensor,
    dataset: Dataset,
    plan: Plan,
    *,
    files: RunFiles,
    validation: Validation | None,
    side: SideFile | None,
) -> Optimization:
    """Resume the run if that was asked for, and take its steps; logs are open meanwhile."""
    observers: list[Observer] = [] if validation is None else [validation]
    logs: tuple[tuple[Any, type[MetricsLog] | type[TensorBoardLog]], ...]
    logs = ((files.log, MetricsLog), (files.tensorboard, TensorBoardLog))
    plain = (
        plan.settings.amp is None and not plan.settings.compile
    )  # the others choose an order of memory by themselves
    with ExitStack() as stack:

        def start(run: Optimization) -> bool:
            if side is not None and files.resume:
                side.load(run)
            for path, log in logs:
                if path is not None:
                    opened = log(Path(path), validation=validation, done=run.done)
                    stack.callback(opened.close)
                    observers.append(opened)
            if side is not None:  # last: it stores what validation found
                observers.append(side)
            return validation is None or validation.stopped is None

        return optimize(
            model,
            _named(model, live),
            rows,
            dataset,
            plan,
            channels_last=plain and takes_channels_last(model, dataset.images[:2]),
            statistics=live.statistics(),
            observers=observers,
            start=start,
        )


def _named(model: nn.Module, live: Attachment) -> dict[str, nn.Parameter]:
    """Return the trained parameters by their names in the model, in the adapter's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for parameter in live.parameters()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the base and set its training mode; restore gradient flags and modes after the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with preserved_modes(model):
            model.train()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _results_of_base(model: nn.Module, config: TrainConfig, dataset: Dataset) -> Evaluation | None:
    """Evaluate the base; None where a new head replaces one for another number of classes."""
    return evaluate(model, dataset) if not config.heads or has_outputs(model, dataset) else None


def _refuse_unmoved(fresh: Adapter, trained: Adapter, label: str) -> None:
    now = trained.all_tensors
    heads = {name: fresh.tensors[name] for name, whole in fresh.whole.items() if whole.role == "head"}
    starts = {**fresh.factors, **heads}
    still = [f"{name!r} is where it started" for name, start in starts.items() if now[name].equal(start)]
    if still:
        raise TrainingError(
            f"{label}: the run learned nothing: {len(still)} of {len(starts)} tensors did not move",
            problems=still,
            hint="lora_A moves from the second step on, since lora_B starts at zero: more --steps",
        )
