"""The training loops: a base model from nothing, and adapters on a frozen base."""

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
from loraio.training.evaluation import Evaluation, evaluate, has_outputs, kept_modes, predict
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
    """A network by name, trained from fresh weights with Adam; in eval mode.

    Args:
        network: its name, as `loraio.bases.networks.find_network` takes it.
        config: epochs, batch size, learning rate, seed.
        dataset: what it learns; its classes must be as many as the network's.
        network_args: keyword options of the network: ``{"num_classes": 10}``.
        on_progress: called every `loraio.training.optimizing.REPORT_EVERY` steps and after the last.

    Raises:
        UnknownNameError: no such network.
        ConfigError: it cannot be built with these options.
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
    predict(model, dataset.images[:1], classes=dataset.classes)  # others take many sizes; whether this one, it says
    steps = config.epochs * math.ceil(len(dataset) / config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    batches = epoch_batches(len(dataset), config.batch_size, config.epochs, generator=generator)
    model.train()
    plan = Plan(steps=steps, lr=config.lr, seed=config.seed, label=network, on_progress=on_progress)
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
    """An adapter, trained on a frozen base; the model is given back as it was, to the bit.

    Args:
        model: the base model, on any device.
        config: digit, rank, targets, focus and the rest.
        dataset: what the batches, and the validation images, are drawn from.
        held_out: what the results before and after are counted on; by default the data set itself.
        before: the base's own results on it, when they are known already: spares a run over it for each adapter. A base
            that gives another number of outputs than the data have classes has none, if a new head takes its place.
        files: log and side file to write, and whether to resume.
        on_progress: called every `loraio.training.optimizing.REPORT_EVERY` steps and after the last.

    Returns:
        the adapter, on the CPU; ``training`` says how it was made and what it does.

    Raises:
        UnknownNameError: a target pattern matches nothing.
        ConfigError: a rank that the weights cannot have, a device that is not there, and so on.
        DataError: the data set lacks the digit, or the model does not fit it.
        StateError: the model carries an adapter already.
        TrainingError: the loss became NaN or infinite, or the factors did not move.
        OutputExistsError, OutputError, MissingFileError, FormatError: what ``files`` names cannot be written or read.
    """
    files = files or RunFiles()
    files.check()
    with placed(model, config.device):
        fresh = new_adapter(model, config)
        rows, held = _drawn(config, dataset)
        counted_on = dataset if held_out is None else held_out
        before = before or _results_of_base(model, config, counted_on)
        plan = _planned(config, rows, on_progress)
        with _frozen(model), attach(model, fresh, trainable=True) as live:
            if config.heads:
                predict(model, dataset.images[:1], classes=dataset.classes)
            with _Surroundings.of(model, config, dataset, held, plan, files, fresh) as around:
                run = optimize(
                    model,
                    _named(model, live),
                    rows,
                    dataset,
                    plan,
                    channels_last=_runs_plainly(config) and takes_channels_last(model, dataset.images[:2]),
                    statistics=live.statistics(),
                    observers=around.observers,
                    start=around.start,
                )
            if around.validation is not None:
                around.validation.give_best(run)
            _refuse_unmoved(fresh, live, plan.label)
            trained = live.adapter
        return _counted(model, trained, config, dataset, counted_on, before, plan, around.validation)


def _runs_plainly(config: TrainConfig) -> bool:
    """Whether steps compute as the model does by itself; torch.compile and mixed precision have orders of their own."""
    return config.amp is None and not config.compile


def _planned(config: TrainConfig, rows: Tensor, on_progress: OnProgress | None) -> Plan:
    label = "all classes" if config.digit is None else f"digit {config.digit}"
    return Plan.of(config, steps=len(rows) // config.accumulate, label=label, on_progress=on_progress)


def _counted(
    model: nn.Module,
    trained: Adapter,
    config: TrainConfig,
    dataset: Dataset,
    counted_on: Dataset,
    before: Evaluation | None,
    plan: Plan,
    validation: Validation | None,
) -> Adapter:
    """The adapter with the record of its training and of what it does."""
    with attach(model, trained):
        after = evaluate(model, counted_on)
    validated = None if validation is None else validation.to_json()
    record = adapter_record(
        config, dataset, counted_on, steps=plan.steps, before=before, after=after, validation=validated
    )
    return replace(trained, training=record)


def _drawn(config: TrainConfig, dataset: Dataset) -> tuple[Tensor, Dataset | None]:
    """The batches of the whole run as (steps * accumulate, batch_size) indices, and the images held out of them."""
    labels, held, kept = dataset.labels, None, None
    if config.val_share:
        split = torch.Generator().manual_seed(config.seed)
        kept, rest = stratified_split(labels, config.val_share, generator=split)
        if not len(rest):
            raise DataError("no class has two images, so that none can be held out", hint="without --val-share")
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


class _Surroundings:
    """The observers of a run in their order, and what they do before its first step; closes them at the end."""

    def __init__(self, files: RunFiles, validation: Validation | None, side: SideFile | None) -> None:
        self._files = files
        self.validation = validation
        self._side = side
        self._stack = ExitStack()
        self.observers: list[Observer] = []

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: TrainConfig,
        dataset: Dataset,
        held: Dataset | None,
        plan: Plan,
        files: RunFiles,
        fresh: Adapter,
    ) -> _Surroundings:
        """Of a run with these settings and files."""
        validation = None
        if held is not None:
            validation = Validation(model, held, every=config.val_every, patience=config.patience)
        side = None
        if files.checkpoint is not None:
            identity = run_identity(config, dataset, steps=plan.steps, base_sha256=fresh.base.sha256)
            side = SideFile(
                Path(files.checkpoint), every=files.checkpoint_every, identity=identity, validation=validation
            )
        return cls(files, validation, side)

    def __enter__(self) -> _Surroundings:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, run: Optimization) -> bool:
        """Resume if that was asked for, and open what is written; False when nothing is left to do."""
        if self._side is not None and self._files.resume:
            self._side.load(run)
        if self.validation is not None:
            self.observers.append(self.validation)
        wanted: tuple[tuple[Any, type[MetricsLog] | type[TensorBoardLog]], ...]
        wanted = ((self._files.log, MetricsLog), (self._files.tensorboard, TensorBoardLog))
        for path, log in wanted:
            if path is not None:
                opened = log(Path(path), validation=self.validation, done=run.done)
                self._stack.callback(opened.close)
                self.observers.append(opened)
        if self._side is not None:  # last: it keeps what the others found
            self.observers.append(self._side)
        return self.validation is None or self.validation.stopped is None


def _named(model: nn.Module, live: Attachment) -> dict[str, nn.Parameter]:
    """What is trained, by its name in the model as it stands, in the adapter's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for parameter in live.parameters()}


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
        digits: which; None among them is an adapter that fits all classes. By default every class of the data set.
        files: as for `train`; with several digits each has its own, named by `RunFiles.of`.
        on_trained: called with each digit and its adapter as soon as it is trained, to save it for example.

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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The base frozen and in training mode; gradient flags and modes are as before afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with kept_modes(model):
            model.train()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _results_of_base(model: nn.Module, config: TrainConfig, dataset: Dataset) -> Evaluation | None:
    """What the base itself does; None where a head is replaced because the base is for another number of classes."""
    return evaluate(model, dataset) if not config.heads or has_outputs(model, dataset) else None


def _refuse_unmoved(fresh: Adapter, live: Attachment, label: str) -> None:
    now = live.adapter.all_tensors
    heads = {name: fresh.tensors[name] for name, whole in fresh.whole.items() if whole.role == "head"}
    starts = {**fresh.factors, **heads}
    still = [f"{name!r} is where it started" for name, start in starts.items() if now[name].equal(start)]
    if still:
        raise TrainingError(
            f"{label}: the run learned nothing: {len(still)} of {len(starts)} tensors did not move",
            problems=still,
            hint="lora_A moves from the second step on, since lora_B starts at zero: more --steps",
        )
