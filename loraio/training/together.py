"""Several adapters trained in one loop over one network: each on its own batches, to the bits of its own run.

The network runs for one adapter at a time: activations of several side by side leave a processor's caches, and
convolutions gain nothing from more images. Shared are the optimizer's kernel over all factors, and what is read, hashed
and counted before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraio.errors import TrainingError
from loraio.training.batches import MAX_DRAWS, drawn
from loraio.training.config import TrainConfig
from loraio.training.datasets import Dataset
from loraio.training.optimizing import REPORT_EVERY, Observer, Optimization, Plan, seeded


def reason_to_part(
    config: TrainConfig, digits: Sequence[int | None], dataset: Dataset, device: torch.device
) -> str | None:
    """Why these adapters have to be trained one after another, in words; None where the settings allow one loop.

    Args:
        config: the settings of all of them.
        digits: one adapter each.
        dataset: what the batches are drawn from.
        device: that the model trains on.
    """
    draws = max(len(dataset), (config.steps or 0) * config.accumulate * config.batch_size)
    reasons = {
        "there is only one": len(digits) < 2,
        "a class comes twice": len(set(digits)) < len(digits),
        "all batches together are more than are drawn at once": draws * len(digits) > MAX_DRAWS,
        f"kind {config.kind}": config.kind != "lora",
        f"norm {config.norm}": config.norm != "frozen",
        "mixed precision": config.amp is not None,
        "torch.compile": config.compile,
        f"device {device.type}": device.type != "cpu",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One of the adapters that are trained together.

    Attributes:
        rows: (steps * accumulate, batch_size), indices into the data set.
        places: for each parameter the module that holds it, its name there, and the adapter's own parameter.
        run: its optimization.
        observers: called after each of its steps.
        random: state of torch's generator, from which dropout draws.
    """

    rows: Tensor
    places: list[tuple[nn.Module, str, nn.Parameter]]
    run: Optimization
    random: Tensor
    observers: Sequence[Observer] = ()

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, nn.Parameter], plan: Plan, rows: Tensor) -> Member:
        """At its start, with a copy of the parameters that the model has."""
        own = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
        places = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], value)
            for name, value in own.items()
        ]
        run = Optimization(own, plan, torch.device("cpu"))
        return cls(rows=rows, places=places, run=run, random=torch.get_rng_state())

    def start(self, start: Callable[[Optimization], bool]) -> bool:
        """Whether there is anything left to do, once ``start`` has brought the run to where another process was."""
        with seeded(self.run.plan.seed, self.run.device):
            going = start(self.run)
            self.random = torch.get_rng_state()
        return going and self.run.done < self.run.plan.steps

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, the model has this adapter's parameters, and torch draws its random numbers."""
        self.put_on()
        torch.set_rng_state(self.random)
        yield
        self.random = torch.get_rng_state()

    def put_on(self) -> None:
        """Let the model have this adapter's parameters."""
        for module, name, parameter in self.places:
            module._parameters[name] = parameter

    def batches(self, images: Tensor, labels: Tensor, *, channels_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the next step."""
        size = self.run.plan.accumulate
        rows = self.rows[self.run.done * size :][:size]
        return (drawn(images, labels, row, channels_last=channels_last) for row in rows)


def optimize_together(
    model: nn.Module, members: Sequence[Member], dataset: Dataset, *, channels_last: bool = False
) -> None:
    """As `loraio.training.optimizing.optimize` for each of them, with the same bits.

    Args:
        model: with an adapter on it, whose parameters the members take turns to be.
        members: those that have something left to do.
        dataset: moved to the model's dtype.
        channels_last: whether the model gets images in that order of memory.

    Raises:
        TrainingError: a loss became NaN or infinite.
    """
    images, labels = dataset.images.to(next(model.parameters()).dtype), dataset.labels

    def differentiate(member: Member) -> Tensor:
        with member.in_turn():
            return member.run.differentiate(model, member.batches(images, labels, channels_last=channels_last))

    cohorts: dict[int, list[Member]] = {}
    for member in members:  # after a kill some may be further than others
        cohorts.setdefault(member.run.done, []).append(member)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for cohort in cohorts.values():
            while cohort:
                cohort = _until_one_ends(cohort, differentiate)


def _until_one_ends(members: list[Member], differentiate: Callable[[Member], Tensor]) -> list[Member]:
    """Steps of members that have gone equally many, until some of them are done; gives the others."""
    joint = _JointOptimizer([member.run.optimizer for member in members])
    going = members
    while len(going) == len(members):
        taken: list[tuple[Tensor, float]] = []
        for member in members:
            lr = member.run.set_rates()
            taken.append((differentiate(member), lr))
        joint.step()
        going = [member for member, (loss, lr) in zip(members, taken, strict=True) if _goes_on(member, loss, lr)]
    return going


def _goes_on(member: Member, loss: Tensor, lr: float) -> bool:
    """Let the observers look at a step that was done, and report; whether another follows."""
    moment = member.run.count(loss, lr)
    ended = moment.last
    if member.observers:
        with member.in_turn():
            for observer in member.observers:
                ended |= observer(member.run, moment)
    if ended or member.run.done % REPORT_EVERY == 0:
        try:
            member.run.report()
        except TrainingError as error:
            raise TrainingError(f"{member.run.plan.label}: {error.message}", hint=error.hint) from error
    return not ended


class _JointOptimizer:
    """One optimizer over the parameters of several that are alike. Their states stay theirs: they are the same tensors.

    Args:
        optimizers: with the same groups in the same order, each after equally many steps.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        groups: list[dict[str, Any]] = []
        for alike in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            groups.append({**alike[0], "params": [parameter for group in alike for parameter in group["params"]]})
        kind: Any = type(optimizers[0])
        self._joint: torch.optim.Optimizer = kind(groups)
        for optimizer in optimizers:
            self._joint.state.update(optimizer.state)

    def step(self) -> None:
        """A step of all, at the rates of the first."""
        for group, own in zip(self._joint.param_groups, self._optimizers[0].param_groups, strict=True):
            group["lr"] = own["lr"]
        self._joint.step()
        for optimizer in self._optimizers:
            if not optimizer.state:
                own_parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
                states = self._joint.state.items()
                optimizer.state.update({parameter: state for parameter, state in states if parameter in own_parameters})
