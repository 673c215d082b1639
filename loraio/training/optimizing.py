"""One optimization: parameters, batches and a plan in; the parameters moved. What both training loops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraio.errors import ConfigError, TrainingError
from loraio.training.batches import drawn
from loraio.training.config import SCHEDULES, TrainConfig
from loraio.training.datasets import Dataset

REPORT_EVERY = 100
"""Steps between two reports of the running loss."""

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of mixed precision by the names in `loraio.training.config.AMP`."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one optimization is told; the meanings are those of `TrainConfig`.

    Attributes:
        steps: optimizer steps in all.
        label: for reports.
        on_progress: called every `REPORT_EVERY` steps and after the last.
    """

    steps: int
    lr: float
    seed: int
    label: str
    on_progress: OnProgress | None
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0
    lora_plus: float = 1
    clip_norm: float | None = None
    accumulate: int = 1
    amp: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise ConfigError(
                f"a warm-up of {self.warmup:,} steps leaves nothing of a run of {self.steps:,}",
                hint="a smaller --warmup, or more --steps",
            )

    @classmethod
    def of(cls, config: TrainConfig, *, steps: int, label: str, on_progress: OnProgress | None) -> Plan:
        """The plan of an adapter's training."""
        shared = set(cls.__slots__) & set(TrainConfig.__slots__) - {"steps"}
        settings: dict[str, Any] = {name: getattr(config, name) for name in shared}
        return cls(**settings, steps=steps, label=label, on_progress=on_progress)

    def rate(self, done: int) -> float:
        """Share of the learning rate that is used for the step after ``done`` steps.

        >>> plan = Plan(steps=8, lr=1.0, seed=1, label="", on_progress=None, warmup=4, schedule="cosine")
        >>> [round(plan.rate(done), 2) for done in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
        """
        if done < self.warmup:
            return (done + 1) / self.warmup
        return SCHEDULES[self.schedule]((done - self.warmup) / (self.steps - self.warmup))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What observers are told after a step.

    Attributes:
        step: steps done.
        last: whether this is the last step that was planned.
        loss: of this step, in nats; on the model's device.
        lr: that this step used, of the parameters without a rate of their own.
    """

    step: int
    last: bool
    loss: Tensor
    lr: float


class Observer(Protocol):
    """Something that looks on after every step: validation, a log, a side file."""

    def __call__(self, run: Optimization, moment: Moment) -> bool:
        """Look; True ends the run after this step, when every observer has looked."""
        ...


class Optimization:
    """A run under way: everything that changes while it goes on, but the parameters' own place in the model.

    Attributes:
        parameters: by name, exactly those that are trained.
        statistics: by name, buffers that the forward passes write to and that belong to what is learned.
        done: steps done.
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
        self.optimizer = _optimizer(self.parameters, plan)
        self._highest = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type) if plan.amp == "fp16" else None
        self._running, self._since = torch.zeros((), device=device), 0

    def step(self, model: Callable[[Tensor], Tensor], parts: Iterable[tuple[Tensor, Tensor]]) -> Moment:
        """One optimizer step over the gradients of ``accumulate`` batches."""
        lr = self.set_rates()
        loss = self.differentiate(model, parts)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self.count(loss, lr)

    def differentiate(self, model: Callable[[Tensor], Tensor], parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Give the parameters the gradients of ``accumulate`` batches, no longer than they may be; returns the loss."""
        plan = self.plan
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for images, labels in parts:
            with torch.autocast(self.device.type, dtype=AMP_DTYPES[plan.amp]) if plan.amp else nullcontext():
                part = F.cross_entropy(model(images), labels)
            part = part / plan.accumulate if plan.accumulate > 1 else part
            (part if self.scaler is None else self.scaler.scale(part)).backward()
            loss = loss + part.detach()
        if self.scaler is not None and plan.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
        if plan.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), plan.clip_norm)
        return loss

    def set_rates(self) -> float:
        """Give the optimizer its rates for the next step; returns that of parameters without one of their own."""
        share = self.plan.rate(self.done)
        for group, highest in zip(self.optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * share
        return self.plan.lr * share

    def count(self, loss: Tensor, lr: float) -> Moment:
        """Take note of a step that was done."""
        self.done += 1
        self._running += loss
        self._since += 1
        return Moment(step=self.done, last=self.done == self.plan.steps, loss=loss, lr=lr)

    def report(self) -> None:
        """Tell how far the run is.

        Raises:
            TrainingError: the loss since the last report is NaN or infinite.
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
        """All that a later process needs to go on from here with the same bits; plain values and tensors."""
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
        """Go on from where another process was."""
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
        """What was learned so far, by name: parameters and statistics; not copies."""
        return {name: value.detach() for name, value in {**self.parameters, **self.statistics}.items()}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the parameters and statistics of the same names."""
        with torch.no_grad():
            for name, value in {**self.parameters, **self.statistics}.items():
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
    """Adam on exactly these parameters, cross-entropy, one step for every ``accumulate`` batches.

    Args:
        model: on any device; its mode is the caller's.
        parameters: what is trained, by name.
        batches: index tensors into the data set; for a resumed run from its beginning all the same.
        dataset: moved to the model's device and dtype.
        plan: learning rate, steps and the rest.
        channels_last: whether the model gets images in that order of memory.
        statistics: buffers of the model that belong to what is learned, by name.
        observers: called after each step, in this order.
        start: called once before the first step; it may bring the run to where another process was, and says whether
            there is anything left to do.

    Returns:
        the run at its end.

    Raises:
        TrainingError: the loss became NaN or infinite, or torch.compile found no compiler.
        ConfigError: fp16 was asked for on a device without it.
    """
    first = next(model.parameters())
    device = first.device
    if plan.amp == "fp16" and device.type != "cuda":
        raise ConfigError(f"fp16 mixed precision is for CUDA, the model is on {device}", hint="--amp bf16")
    images, labels = dataset.images.to(device, first.dtype), dataset.labels.to(device)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if plan.compile else model
    with seeded(plan.seed, device), torch.enable_grad(), _compiler_errors(plan.compile):
        run = Optimization(parameters, plan, device, statistics=statistics)
        if start is not None and not start(run):
            return run
        for number, group in enumerate(_grouped(batches, plan.accumulate)):
            if number < run.done:
                continue
            rows = [part.to(device) for part in group]
            parts = (drawn(images, labels, part, channels_last=channels_last) for part in rows)
            moment = run.step(forward, parts)
            ends = [observer(run, moment) for observer in observers]
            if run.done % REPORT_EVERY == 0 or moment.last or any(ends):
                run.report()
            if any(ends):
                break
    return run


def _grouped(batches: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _optimizer(parameters: Mapping[str, nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """Adam, or AdamW where weights decay; parameters in groups only where they differ in rate or decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = plan.lr * plan.lora_plus if name.endswith("lora_B") else plan.lr
        decay = plan.weight_decay if parameter.ndim > 1 else 0.0  # lengths, biases and norms are not pulled to zero
        groups.setdefault((rate, decay), []).append(parameter)
    # one kernel for all parameters, not a dozen for each
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    if not plan.weight_decay:
        if len(groups) == 1:
            ((rate, _),) = groups
            return torch.optim.Adam(list(parameters.values()), lr=rate, fused=fused)
        return torch.optim.Adam(
            [{"params": group, "lr": rate} for (rate, _), group in groups.items()], lr=plan.lr, fused=fused
        )
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
        lr=plan.lr,
        fused=fused,
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators, from which dropout draws, seeded inside and as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _compiler_errors(compiled: bool) -> Iterator[None]:
    """Say in one line what keeps torch.compile from working here."""
    try:
        yield
    except Exception as error:
        if not compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"torch.compile does not work here: {line}", hint="install a C++ compiler, or train without --compile"
        ) from error
