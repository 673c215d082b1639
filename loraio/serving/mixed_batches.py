"""One batch with an adapter for each sample: sort it by adapter, run it on the cheaper route, put the rows back.

*By groups*: the samples of each adapter run through the network together, with that adapter's folded weights in place
of the base's. This is right for every layer type, and for every network with independent samples.

*By layers*: the whole batch runs through the network at once, and only the layers with targets split it. This is
cheaper where activations are small and the calls cost more than the sums; see `loraio.serving.layer_route`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from loraio.adapter.metadata import check_strength
from loraio.bases.identity import identity_of
from loraio.bases.targets import TargetModule, target_modules
from loraio.errors import ShapeError, StateError
from loraio.live.attachment import attach
from loraio.live.base_state import base_state_dict, refuse_attached
from loraio.serving.layer_route import LayerRoute, UnfitError, find_route, run_layers
from loraio.serving.residents import FoldedWeights, Pick, Residents, Version
from loraio.serving.sources import normal_name

CACHE_BYTES = 1 << 22
"""Inputs and outputs of layers up to this size, 4 MiB, are cheap to move: a few times a core's own cache."""

Choice = tuple[str | None, float]
"""Name and strength of a sample's adapter; (None, 0.0) for the base."""


def choices_of(x: Tensor, names: Sequence[str | None], strength: float | Sequence[float]) -> list[Choice]:
    """Return the choice of each sample.

    Raises:
        ShapeError: not as many names or strengths as samples.
        ConfigError: a strength is not a finite number.
    """
    if x.ndim == 0 or isinstance(names, str) or len(names) != len(x):
        count = "one name" if isinstance(names, str) else f"{len(names)} names"
        raise ShapeError(f"{count} for samples of shape {tuple(x.shape)}; pass a name, or None, for each row")
    if isinstance(strength, int | float):
        power = check_strength(strength)
        own = {name: (normal_name(name), 0.0 if name is None else power) for name in dict.fromkeys(names)}
        return [own[name] for name in names]
    strengths = [check_strength(value) for value in strength]
    if len(strengths) != len(x):
        raise ShapeError(f"{len(strengths)} strengths for {len(x)} samples")
    return [(normal_name(name), 0.0 if name is None else power) for name, power in zip(names, strengths, strict=True)]


@dataclass(frozen=True, slots=True)
class SortedBatch:
    """The samples of a batch, those of one adapter next to each other.

    Attributes:
        x: (n, ...), the samples.
        rows: (n,), the row that each of them had before.
        sizes: how many samples each adapter has.
        picks: the adapters in the same order; None is the base.
    """

    x: Tensor
    rows: Tensor
    sizes: list[int]
    picks: list[Pick | None]

    @classmethod
    def of(cls, x: Tensor, choices: Sequence[Choice], picks: Mapping[Choice, Pick | None]) -> SortedBatch:
        """Sort a batch by the choice of each sample."""
        members: dict[Choice, list[int]] = {choice: [] for choice in picks}
        for row, choice in enumerate(choices):
            members[choice].append(row)
        rows = torch.tensor([row for group in members.values() for row in group], device=x.device)
        return cls(x.index_select(0, rows), rows, [len(group) for group in members.values()], list(picks.values()))

    def gathered(self, outputs: Any) -> Any:
        """Return outputs of this batch in the order in which its samples came."""
        return _mapped(lambda found: torch.empty_like(found).index_copy_(0, self.rows, found), outputs)


@dataclass(frozen=True, slots=True)
class BaseNow:
    """The base of a model now.

    Attributes:
        digest: of the state dict.
        targets: the weights that an adapter can change, by name.
    """

    digest: str
    targets: Mapping[str, TargetModule]

    @classmethod
    def of(cls, model: nn.Module) -> BaseNow:
        """Look at a model.

        Raises:
            StateError: it carries an adapter or is in training mode.
        """
        refuse_attached(model)
        if any(module.training for module in model.modules()):
            raise StateError("the model is in training mode", hint="model.eval()")
        identity, state = identity_of(model), base_state_dict(model)
        return cls(identity.state_sha256(state, identity.digests(state)), target_modules(model))

    @property
    def version(self) -> tuple[str, tuple[torch.device, ...]]:
        """Equal as long as folded weights hold."""
        return self.digest, tuple(target.weight.device for target in self.targets.values())


class ModelFacts:
    """The routes of a model's batches, and the adapters that were found to fit it.

    Nothing in it refers to the model, which that would keep alive.

    Attributes:
        routes: by the targets and the form of a batch; None where the layer route is not possible.
    """

    def __init__(self) -> None:
        self.routes: dict[tuple[Any, ...], LayerRoute | None] = {}
        self._fitting: dict[str, tuple[Version, str]] = {}

    def check_fit(self, model: nn.Module, pick: Pick, digest: str) -> None:
        """Refuse an adapter that does not belong to the model; once for each version of adapter and base."""
        if self._fitting.get(pick.name) != (pick.version, digest):
            attach(model, pick.adapter).detach()
            self._fitting[pick.name] = (pick.version, digest)


def run_sorted(model: nn.Module, batch: SortedBatch, *, facts: ModelFacts, base: BaseNow, residents: Residents) -> Any:
    """Run a sorted batch on the route that the network and the size of the batch ask for."""
    modules, version = base.targets, base.version
    adapters = [pick.adapter for pick in batch.picks if pick is not None]
    bases = {name: modules[name].weight for name in dict.fromkeys(chain.from_iterable(a.targets for a in adapters))}
    nbytes = {name: weight.nbytes for name, weight in bases.items()}
    folded = (residents.folded(facts, bases, pick, version) for pick in batch.picks)
    needed = sum(nbytes[name] for adapter in adapters for name in adapter.targets)
    key = (frozenset(bases), batch.x.shape[1:], batch.x.dtype, batch.x.device)
    route = None
    # the layer route holds all folded weights at once, and again in oneDNN's order
    if len(batch.picks) > 1 and 2 * needed <= residents.cache.limit:
        if key not in facts.routes:
            facts.routes[key] = find_route(model, [modules[name] for name in bases], batch.x)
        route = facts.routes[key]
    if route is None or not takes_layers(route, len(batch.x), sum(nbytes.values())):
        return run_groups(model, modules, batch, folded)
    held, plain = list(folded), residents.folded(facts, bases, None, version)
    before = [len(one.reordered) for one in (*held, plain)]
    try:
        outputs = run_layers(model, modules, batch.x, batch.sizes, held, base=plain, reorder=route.reorder)
    except UnfitError:
        facts.routes[key] = None
        return run_groups(model, modules, batch, held)
    for pick, one, count in zip((*batch.picks, None), (*held, plain), before, strict=True):
        if len(one.reordered) > count:
            residents.update(facts, pick, version, one)
    return outputs


def takes_layers(route: LayerRoute, samples: int, weight_bytes: int) -> bool:
    """Return True if the layer route is cheaper: if moving activations costs less than reading the weights again.

    Groups read every weight once for each adapter, and bring it into the order that convolutions want, but move the
    activations in chunks small enough for a cache. Layers do the opposite. So layers win where the largest input or
    output of a target, for the whole batch, is no larger than the targets' weights together, or than `CACHE_BYTES`.
    """
    return route.row_bytes * samples <= max(CACHE_BYTES, weight_bytes)


def run_groups(
    model: nn.Module, modules: Mapping[str, TargetModule], batch: SortedBatch, folded: Iterable[FoldedWeights]
) -> Any:
    """Run a sorted batch one adapter after the other; each one's weights are folded when its samples' turn comes.

    Raises:
        StateError: the outputs are not tensors, or tuples, lists or dicts of them, with a row for each sample.
    """
    outputs = []
    for samples, one in zip(batch.x.split(batch.sizes), folded, strict=True):
        with _in_place(modules, one.weights):
            outputs.append(model(samples))
    return _joined(outputs, batch.sizes)


@contextmanager
def _in_place(modules: Mapping[str, TargetModule], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put folded weights in the place of the model's Parameters, and the Parameters back at the end, in order."""
    places = [(modules[name].module._parameters, modules[name].parameter, weight) for name, weight in weights.items()]
    before = [parameters[name] for parameters, name, _ in places]
    try:
        for parameters, name, weight in places:
            parameters[name] = weight  # type: ignore[assignment]  # a plain tensor, as functional_call does it
        yield
    finally:
        for (parameters, name, _), parameter in zip(places, before, strict=True):
            parameters[name] = parameter


def _joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        for rows, size in zip(outputs, sizes, strict=True):
            if rows.ndim == 0 or len(rows) != size:
                raise StateError(f"an output of shape {tuple(rows.shape)} has no row for each of {size} samples")
        return torch.cat(list(outputs))
    if isinstance(first, Mapping):
        return {key: _joined([one[key] for one in outputs], sizes) for key in first}
    if type(first) in (tuple, list):
        return type(first)(_joined(list(each), sizes) for each in zip(*outputs, strict=True))
    raise _no_rows(first)


def _mapped(change: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping):
        return {key: _mapped(change, one) for key, one in outputs.items()}
    if type(outputs) in (tuple, list):
        return type(outputs)(_mapped(change, one) for one in outputs)
    raise _no_rows(outputs)


def _no_rows(output: Any) -> StateError:
    return StateError(f"the network gives a {type(output).__name__}, not tensors, or tuples, lists or dicts of them")
