"""Optimize parameters over batches after a plan; base models and adapters are trained by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraio.errors import ConfigError, TrainingError
from loraio.training.batches import in_order
from loraio.training.config import SCHEDULES, TrainConfig
from loraio.training.datasets import Dataset

REPORT_EVERY = 100
"""Steps between two reports of the running loss."""

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of mixed precision, by the names in `loraio.training.config.AMP`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a run for its user.

    Attributes:
        label: name of the run, such as "digit-cnn" or "digit 3".
        step: number of steps done.
        steps: number of steps planned.
        loss: mean cross-entropy since the last report, in nats.
    """

    label: str
    step: int
    steps: int
    loss: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings of one optimization, with the facts that its data decide.

    Attributes:
        settings: learning rate, schedule and the rest; its ``steps`` are not used.
        steps: number of optimizer steps.
        label: name of the run in reports and errors.
        on_progress: called every `REPORT_EVERY` steps and after the last.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """

    settings: TrainConfig
    steps: int
    label: str
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        if self.settings.warmup >= self.steps:
            raise ConfigError(
                f"a warm-up of {self.settings.warmup:,} steps leaves nothing of a run of {self.steps:,}",
                hint="a smaller --warmup, or more --steps",
            )

    def rate(self, done: int) -> float:
        """Return the share of the learning rate for the step after ``done`` steps.

        >>> plan = Plan(settings=TrainConfig(warmup=4, schedule="cosine"), steps=8, label="")
        >>> [round(plan.rate(done), 2) for done in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
        """
        warmup = self.settings.warmup
        if done < warmup:
            return (done + 1) / warmup
        return SCHEDULES[self.settings.schedule]((done - warmup) / (self.steps - warmup))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Facts about the step that was just done.

    Attributes:
        step: number of steps done.
        last: True after the last planned step.
        loss: loss of this step, in nats, on the model's device.
        lr: learning rate of this step, for parameters without their own.
    """

    step: int
    last: bool
    loss: Tensor
    lr: float


class Observer(Protocol):
    """A callable for after every step: validation, a log, a side file."""

    def __call__(self, run: Optimization, moment: Moment) -> bool:
        """Return True to end the run after this step. The other observers are still called."""
        ...


class Optimization:
    """The changing state of a run.

    Attributes:
        parameters: the trained parameters, by name.
        statistics: buffers that forward passes write and that are part of the result, by name.
        done: number of steps done.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        device: torch.device,
        *,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.statistics = dict(statistics or {})
        self.plan = plan
        self.device = device
        self.done = 0
        self.optimizer = _optimizer(self.parameters, plan.settings)
        self._highest = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type) if plan.settings.amp == "fp16" else None
        self._running, self._since = torch.zeros((), device=device), 0

    def step(self, model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Moment:
        """Take one optimizer step over the gradients of ``accumulate`` batches of images and labels."""
        settings, share = self.plan.settings, self.plan.rate(self.done)
        for group, highest in zip(self.optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * share
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for images, labels in batches:
            with torch.autocast(self.device.type, dtype=AMP_DTYPES[settings.amp]) if settings.amp else nullcontext():
                part = F.cross_entropy(model(images), labels)
            part = part / settings.accumulate if settings.accumulate > 1 else part
            (part if self.scaler is None else self.scaler.scale(part)).backward()
            loss = loss + part.detach()
        if settings.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.done += 1
        self._running += loss
        self._since += 1
        return Moment(step=self.done, last=self.done == self.plan.steps, loss=loss, lr=settings.lr * share)

    def report(self) -> None:
        """Report the mean loss since the last report.

        Raises:
            TrainingError: that loss is NaN or infinite.
        """
        if not self._since:
            return
        mean = float(self._running) / self._since
        if not math.isfinite(mean):
            raise TrainingError(f"{self.plan.label}: the loss is {mean} at step {self.done}", hint="a smaller --lr")
        if self.plan.on_progress is not None:
            self.plan.on_progress(Progress(label=self.plan.label, step=self.done, steps=self.plan.steps, loss=mean))
        self._running, self._since = torch.zeros((), device=self.device), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the plain values and tensors from which another process can continue to the same bits."""
        state = {
            "done": self.done,
            "parameters": self.values(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "running": self._running,
            "since": self._since,
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another process."""
        self.restore(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.done = state["done"]
        if self.done % REPORT_EVERY:  # else it was reported after the state was taken
            self._running, self._since = state["running"].to(self.device, copy=True), state["since"]
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)

    def values(self) -> dict[str, Tensor]:
        """Return parameters and statistics by name, not copied."""
        return {name: value.detach() for name, value in {**self.parameters, **self.statistics}.items()}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters and statistics of the same names."""
        with torch.no_grad():
            for name, value in self.values().items():
                value.copy_(values[name])


def optimize(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Tensor],
    dataset: Dataset,
    plan: Plan,
    *,
    channels_last: bool = False,
    statistics: Mapping[str, Tensor] | None = None,
    observers: Iterable[Observer] = (),
    start: Callable[[Optimization], bool] | None = None,
) -> Optimization:
    """Minimise the cross-entropy with Adam, over exactly these parameters; one step for ``accumulate`` batches.

    Args:
        model: on any device, in the mode to train in.
        parameters: parameters to train, by name.
        batches: index tensors into the data set. A resumed run needs them from its beginning too.
        dataset: moved to the model's device and dtype.
        plan: learning rate, steps and the rest.
        channels_last: give the model images with their channels last in memory.
        statistics: buffers of the model that are part of the result, by name.
        observers: called after each step, in this order.
        start: called once before the first step. It may load the state of another process; False ends the run.

    Returns:
        the run at its end.

    Raises:
        TrainingError: the loss became NaN or infinite, or torch.compile found no compiler.
        ConfigError: fp16 was asked for on a device without it.
    """
    settings, first = plan.settings, next(model.parameters())
    device = first.device
    if settings.amp == "fp16" and device.type != "cuda":
        raise ConfigError(f"fp16 mixed precision is for CUDA, the model is on {device}", hint="--amp bf16")
    images, labels = dataset.images.to(device, first.dtype), dataset.labels.to(device)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if settings.compile else model
    with _seeded(settings.seed, device), torch.enable_grad(), _compiler_errors(settings.compile):
        run = Optimization(parameters, plan, device, statistics=statistics)
        if start is not None and not start(run):
            return run
        for number, group in enumerate(_grouped(batches, settings.accumulate)):
            if number < run.done:
                continue
            rows = [batch.to(device) for batch in group]
            pairs = ((in_order(images[row], channels_last=channels_last), labels[row]) for row in rows)
            moment = run.step(forward, pairs)
            answers = [observer(run, moment) for observer in observers]  # all are called before one ends the run
            ended = any(answers)
            if run.done % REPORT_EVERY == 0 or moment.last or ended:
                run.report()
            if ended:
                break
    return run


def _grouped(batches: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    left = iter(batches)
    return iter(lambda: list(islice(left, size)), [])


def _optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """Return Adam, or AdamW with weight decay; parameters of the same rate and decay share a group."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = settings.lr * settings.lora_plus if name.endswith("lora_B") else settings.lr
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0  # magnitudes and biases do not decay
        groups.setdefault((rate, decay), []).append(parameter)
    # fused: one kernel for all parameters, not a dozen for each
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    if not settings.weight_decay and len(groups) == 1:
        return torch.optim.Adam(list(parameters.values()), lr=next(iter(groups))[0], fused=fused)
    options = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    optimizer = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
    return optimizer(options, lr=settings.lr, fused=fused)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore them after it. Dropout draws from them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _compiler_errors(compiled: bool) -> Iterator[None]:
    """Turn an error of torch.compile into one line."""
    try:
        yield
    except Exception as error:
        if not compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"torch.compile does not work here: {line}", hint="install a C++ compiler, or train without --compile"
        ) from error
