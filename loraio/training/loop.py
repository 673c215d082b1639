"""The training loops: a base model from nothing, and adapters on a frozen base."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loraio
from loraio.adapter import Adapter, BaseReference, Target
from loraio.attachment import Attachment, attach, base_state_dict, refuse_attached
from loraio.bases import NETWORKS, build_network, network_of
from loraio.container import dtype_code
from loraio.errors import ConfigError, DataError, TrainingError
from loraio.identity import state_sha256, tensor_sha256
from loraio.kinds import KINDS
from loraio.layers import TargetModule, select_targets
from loraio.registry import lookup
from loraio.training.batches import epoch_batches, focused_batches
from loraio.training.config import SCHEDULES, PretrainConfig, TrainConfig
from loraio.training.data import Dataset
from loraio.training.evaluation import Evaluation, evaluate, kept_modes

REPORT_EVERY = 100
"""Steps between two reports of the running loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        label: what is being trained: "digit-cnn", "digit 3".
        step: steps done.
        steps: steps in all.
        loss: mean cross-entropy since the last report, in nats.
    """

    label: str
    step: int
    steps: int
    loss: float


OnProgress = Callable[[Progress], None]


def pretrain(
    network: str, config: PretrainConfig, dataset: Dataset, *, on_progress: OnProgress | None = None
) -> nn.Module:
    """A registered network, trained from fresh weights with Adam; in eval mode.

    Args:
        network: a name in `loraio.bases.NETWORKS`.
        config: epochs, batch size, learning rate, seed.
        dataset: what it learns; its classes must be as many as the network's.
        on_progress: called every `REPORT_EVERY` steps and after the last.

    Raises:
        UnknownNameError: no such network.
        DataError: the network is for other images, or for another number of classes.
        TrainingError: the loss became NaN or infinite.
    """
    entry = lookup(NETWORKS, network, what="network")
    found, needed = (tuple(dataset.images.shape[1:]), dataset.classes), (entry.input_shape, entry.classes)
    if found != needed:
        raise DataError(
            f"the data set has images {found[0]} of {found[1]} classes, {network!r} is for {needed[0]} of {needed[1]}"
        )
    model = build_network(network, seed=config.seed)
    steps = config.epochs * math.ceil(len(dataset) / config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    batches = epoch_batches(len(dataset), config.batch_size, config.epochs, generator=generator)
    model.train()
    run = _Run(steps=steps, lr=config.lr, seed=config.seed, label=network, on_progress=on_progress)
    _optimize(model, model.parameters(), batches, dataset, run)
    return model.eval()


def train(
    model: nn.Module,
    config: TrainConfig,
    dataset: Dataset,
    *,
    held_out: Dataset | None = None,
    before: Evaluation | None = None,
    on_progress: OnProgress | None = None,
) -> Adapter:
    """An adapter, trained on a frozen base; the model is given back as it was, to the bit.

    Args:
        model: the base model, on any device.
        config: digit, rank, targets, focus and the rest.
        dataset: what the batches are drawn from.
        held_out: what the results before and after are counted on; by default the data set itself.
        before: the base's own results on it, when they are known already: spares a run over it for each adapter.
        on_progress: called every `REPORT_EVERY` steps and after the last.

    Returns:
        the adapter, on the CPU; ``training`` says how it was made and what it does.

    Raises:
        UnknownNameError: a target pattern matches nothing.
        ConfigError: a rank that the weights cannot have.
        DataError: the data set lacks the digit, or the model does not fit it.
        StateError: the model carries an adapter already.
        TrainingError: the loss became NaN or infinite, or the factors did not move.
    """
    fresh = new_adapter(model, config)
    steps = config.steps or math.ceil(len(dataset) / config.batch_size)
    rows = focused_batches(
        dataset.labels,
        config.digit,
        focus=config.focus,
        batch_size=config.batch_size,
        steps=steps,
        generator=torch.Generator().manual_seed(config.seed),
    )
    counted_on = dataset if held_out is None else held_out
    before = before or evaluate(model, counted_on)
    with _frozen(model), attach(model, fresh, trainable=True) as live:
        run = _Run(
            steps=steps,
            lr=config.lr,
            schedule=config.schedule,
            seed=config.seed,
            label="all classes" if config.digit is None else f"digit {config.digit}",
            on_progress=on_progress,
        )
        _optimize(model, live.parameters(), rows, dataset, run)
        _refuse_unmoved(fresh, live)
        trained = live.adapter
    with attach(model, trained):
        after = evaluate(model, counted_on)
    return replace(trained, training=_adapter_record(config, dataset, counted_on, steps, before, after))


def train_each(
    model: nn.Module,
    config: TrainConfig,
    dataset: Dataset,
    *,
    digits: Iterable[int] | None = None,
    held_out: Dataset | None = None,
    on_progress: OnProgress | None = None,
    on_trained: Callable[[int, Adapter], None] | None = None,
) -> dict[int, Adapter]:
    """One adapter for each digit, all with the same settings; see `train`.

    Args:
        digits: which; by default every class of the data set.
        on_trained: called with each digit and its adapter as soon as it is done, to save it for example.

    Returns:
        the adapters by digit, in the order of ``digits``.
    """
    before = evaluate(model, dataset if held_out is None else held_out)
    adapters = {}
    for digit in range(dataset.classes) if digits is None else digits:
        one = replace(config, digit=digit)
        adapters[digit] = train(model, one, dataset, held_out=held_out, before=before, on_progress=on_progress)
        if on_trained is not None:
            on_trained(digit, adapters[digit])
    return adapters


def new_adapter(model: nn.Module, config: TrainConfig) -> Adapter:
    """An adapter with start values, which changes nothing yet.

    Raises:
        UnknownNameError: a target pattern matches nothing.
        ConfigError: the rank is larger than a weight matrix allows.
        StateError: a target is shared or parametrized, by an attached adapter for example.
    """
    refuse_attached(model)
    modules = select_targets(model, config.targets)
    state = model.state_dict()
    kind = KINDS[config.kind]
    generator = torch.Generator().manual_seed(config.seed)
    targets: dict[str, Target] = {}
    factors: dict[str, Tensor] = {}
    for name, module in modules.items():
        target = _target(module, config)
        if config.rank > min(target.matrix_shape):
            raise ConfigError(
                f"rank {config.rank} is more than {name!r} can use: as a matrix it is {target.matrix_shape}",
                hint=f"--rank {min(target.matrix_shape)} or less, or other --targets",
            )
        matrix = module.layer.to_matrix(module.weight.detach())
        start = kind.init(matrix, config.rank, method=config.init, generator=generator)
        targets[name] = target
        factors |= {f"{name}.{short}": factor for short, factor in start.items()}
    base = BaseReference(network=network_of(model), sha256=state_sha256(state))
    return Adapter(targets=targets, factors=factors, base=base)


def parameter_report(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """How many numbers the adapted layers hold, biases included, and how many the adapter adds.

    The adapter may be attached to the model.

    Returns:
        ``adapted`` and ``added`` as counts, ``percent`` as 100 * added / adapted.
    """
    owners = {name.rpartition(".")[0] for name in adapter.targets}
    state = base_state_dict(model)
    adapted = sum(tensor.numel() for name, tensor in state.items() if name.rpartition(".")[0] in owners)
    return {"adapted": adapted, "added": adapter.parameters, "percent": 100 * adapter.parameters / adapted}


def _target(module: TargetModule, config: TrainConfig) -> Target:
    weight = module.weight
    return Target(
        kind=config.kind,
        rank=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        scale_rule=config.scale_rule,
        shape=tuple(weight.shape),
        dtype=dtype_code(weight.dtype),
        layer=module.layer.name,
        groups=module.groups,
        base_sha256=tensor_sha256(weight),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What one optimization is told."""

    steps: int
    lr: float
    seed: int
    label: str
    on_progress: OnProgress | None
    schedule: str = "constant"


def _optimize(
    model: nn.Module, parameters: Iterable[nn.Parameter], batches: Iterable[Tensor], dataset: Dataset, run: _Run
) -> None:
    """Adam on exactly these parameters, cross-entropy, one step for each batch."""
    optimizer = torch.optim.Adam(parameters, lr=run.lr)
    share = SCHEDULES[run.schedule]
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step / run.steps))
    first = next(model.parameters())
    images, labels = dataset.images.to(first.device, first.dtype), dataset.labels.to(first.device)
    running, since = torch.zeros((), device=first.device), 0
    with _seeded(run.seed, first.device), torch.enable_grad():
        for step, rows in enumerate(batches, start=1):
            rows = rows.to(first.device)
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            running += loss.detach()
            since += 1
            if step % REPORT_EVERY == 0 or step == run.steps:
                mean = float(running) / since
                if not math.isfinite(mean):
                    raise TrainingError(f"the loss is {mean} at step {step}", hint="a smaller --lr")
                if run.on_progress is not None:
                    run.on_progress(Progress(label=run.label, step=step, steps=run.steps, loss=mean))
                running, since = torch.zeros((), device=first.device), 0


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators, from which dropout draws, seeded inside and as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The base frozen, normalisation statistics too; gradient flags and modes are as before afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with kept_modes(model):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _refuse_unmoved(fresh: Adapter, live: Attachment) -> None:
    now = live.adapter.factors
    still = [f"{name!r} is where it started" for name, start in fresh.factors.items() if now[name].equal(start)]
    if still:
        raise TrainingError(
            f"the run learned nothing: {len(still)} of {len(fresh.factors)} factors did not move",
            problems=still,
            hint="lora_A moves from the second step on, since lora_B starts at zero: more --steps",
        )


def base_record(config: PretrainConfig, dataset: Dataset, counted_on: Dataset, result: Evaluation) -> dict[str, Any]:
    """What a base checkpoint says about its making; the ``training`` of `loraio.save_base`."""
    hyperparameters = asdict(config) | {"optimizer": "adam"}
    seed = hyperparameters.pop("seed")
    return {
        **_provenance(dataset, seed),
        "hyperparameters": hyperparameters,
        "results": {**_counted_on(counted_on), "after": result.to_json()},
    }


def _adapter_record(
    config: TrainConfig, dataset: Dataset, counted_on: Dataset, steps: int, before: Evaluation, after: Evaluation
) -> dict[str, Any]:
    """What an adapter file says about its making."""
    named = ("init", "focus", "lr", "schedule", "batch_size", "targets")  # rank, alpha and kind stand with each target
    hyperparameters = {key: value for key, value in asdict(config).items() if key in named}
    return {
        **_provenance(dataset, config.seed),
        "digit": config.digit,
        "steps": steps,
        "hyperparameters": hyperparameters | {"optimizer": "adam", "targets": list(config.targets)},
        "results": {**_counted_on(counted_on), "before": before.to_json(), "after": after.to_json()},
    }


def _provenance(dataset: Dataset, seed: int) -> dict[str, Any]:
    """No dates and no host names: two runs of one training on one machine say the same."""
    versions = {"loraio": loraio.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"dataset": dataset.name, "split": dataset.split, "images": len(dataset), "seed": seed, "versions": versions}


def _counted_on(dataset: Dataset) -> dict[str, Any]:
    return {"dataset": dataset.name, "split": dataset.split, "images": len(dataset)}
