"""Merge an adapter into a state dict, without a model class: into new tensors, or in place.

In place, all weights are written or none. One operation writes each slice of a weight, and torch counts operations on a
tensor in its version counter. So after an exception such as Ctrl-C the rest can still be written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.adapter.overflow import refuse_overflow
from loraio.bases.receipts import Receipt, check_merge
from loraio.bases.writes import is_dense
from loraio.errors import StateError


def merge(
    state_dict: Mapping[str, Tensor],
    adapter: Adapter,
    strength: float = 1.0,
    *,
    allow_base_mismatch: bool = False,
    exact: bool = True,
    receipts: Sequence[Receipt] = (),
    force: bool = False,
    in_place: bool = False,
) -> dict[str, Tensor]:
    """Fold an adapter into weights for good: W + strength * scale * (B @ A) for every target.

    Sums are float64 and are rounded once to the weight's own dtype, so a folded weight is the float nearest to the sum.
    Whole tensors are replaced at any strength. An attached model computes with the same bits, unless ``exact``
    is false.

    Args:
        state_dict: the base model's, on any device; not changed, unless in place.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale.
        allow_base_mismatch: accept a base with other values or dtypes; names and shapes must fit.
        exact: false sums in float32, which is faster and no longer the nearest float; see `Target.fold`.
        receipts: the merges that the state dict has in it; of a file ``read_base(path).receipts``. Without them only
            the base's digest prevents a second merge.
        force: merge an adapter again, or merge into a base with other adapters in it.
        in_place: write the new weights over the old ones, which takes no more memory and less time. A model with this
            state dict then is the merged model. An exception after the first write, such as Ctrl-C, is raised when all
            is written. No forward pass may run meanwhile. `receipt` needs the base as it was: merge into new tensors.

    Returns:
        a new dict with the same names in the same order. Tensors that the adapter changes are new, unless in place; all
        others are the tensors passed in.

    Raises:
        AlreadyMergedError: by its receipts, the state dict has this adapter in it, or others, and not ``force``.
        BaseMismatchError: the adapter was made for another base; every target that differs is listed.
        AdapterError: a sum overflows the weight's dtype.
        ConfigError: the strength is not a finite number.
        StateError: in place, tensors to write over share memory, or a head has another size.
    """
    strength = check_strength(strength)
    check_merge(adapter, state_dict, receipts, force=force, allow_base_mismatch=allow_base_mismatch)
    folded: dict[str, Tensor] = {}
    if in_place:
        overwrite(planned(state_dict, adapter, strength=strength, exact=exact))
    else:
        with torch.no_grad():
            folded |= {
                name: adapter.fold(name, state_dict[name], strength=strength, exact=exact) for name in adapter.targets
            }
            folded |= {name: adapter.replace(name, state_dict[name]) for name in adapter.whole}
    merged: dict[str, Tensor] = OrderedDict((name, folded.get(name, tensor)) for name, tensor in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:  # load_state_dict reads these module versions
        merged._metadata = versions  # type: ignore[attr-defined]  # as torch does it
    return merged


@dataclass(slots=True)
class Overwrite:
    """One tensor to write over; ``write`` runs its ``steps`` operations from the given one on."""

    tensor: Tensor
    steps: int
    write: Callable[[int], object]
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.tensor._version

    @property
    def done(self) -> int:
        """Number of operations that have run."""
        return self.tensor._version - self._before


def planned(state: Mapping[str, Tensor], adapter: Adapter, *, strength: float, exact: bool) -> list[Overwrite]:
    """Plan what a merge in place writes, and check all of it; write nothing.

    Raises:
        AdapterError: a sum overflows the weight's dtype.
        StateError: a tensor cannot be written over.
    """
    refuse_unwritable(state, [*adapter.targets, *adapter.whole])
    problems = [
        f"{name!r} is {tuple(state[name].shape)}, the adapter's is {whole.shape}"
        for name, whole in adapter.whole.items()
        if state[name].shape != whole.shape
    ]
    if problems:
        raise StateError(
            "these tensors have another shape than the adapter's", problems=problems, hint="merge into new tensors"
        )
    weights = {name: state[name].detach() for name in adapter.targets}
    refuse_overflow(adapter.targets, adapter.factors, weights, strength=strength, exact=exact)
    plan = [] if strength == 0 else [_fold(adapter, name, weight, strength, exact) for name, weight in weights.items()]
    return plan + [_replace(adapter.replace(name, state[name]), state[name].detach()) for name in adapter.whole]


def _fold(adapter: Adapter, name: str, weight: Tensor, strength: float, exact: bool) -> Overwrite:
    target = adapter.targets[name]
    factors = {short: factor.to(weight.device) for short, factor in adapter.factors_of(name).items()}
    sliced = target.sliced_fold(weight, factors, strength=strength, exact=exact)
    if sliced is not None:
        return Overwrite(weight, len(sliced.slices), lambda start: sliced.write(sliced.weight, start))
    return Overwrite(weight, 1, lambda _: weight.copy_(target.fold(weight, factors, strength=strength, exact=exact)))


def _replace(new: Tensor, old: Tensor) -> Overwrite:
    return Overwrite(old, 1, lambda _: old.copy_(new))


@torch.inference_mode(False)  # there torch has no version counters
@torch.no_grad()
def overwrite(plan: Sequence[Overwrite]) -> None:
    """Write all tensors.

    Raises:
        BaseException: any exception meanwhile. Before the first operation it leaves everything as it was; later it is
            raised when all is written.
    """
    caught: BaseException | None = None
    while True:
        before = [each.done for each in plan] if caught else []
        try:
            for each in plan:
                if each.done < each.steps:
                    each.write(each.done)
        except BaseException as error:
            now = [each.done for each in plan]
            if not any(now) or now == before:  # it fails twice at the same place
                raise
            caught = error
        else:
            break
    if caught is not None:
        raise caught


def refuse_unwritable(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise StateError if any of these tensors share memory with others or have no version counter; list them all."""
    chosen = set(names)
    problems = [f"{name!r}: {why}" for name in chosen if (why := _why_not(state[name])) is not None]
    problems = problems or _shared(state, chosen)
    if problems:
        raise StateError(
            "these tensors cannot be written over", problems=sorted(problems), hint="merge into new tensors"
        )


def _why_not(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return f"it is a {type(tensor).__name__}, which stands for something else"
    if tensor.is_inference():
        return "it was made in inference mode"
    return None if is_dense(tensor) else "its memory has holes or is used twice"


def _shared(state: Mapping[str, Tensor], chosen: set[str]) -> list[str]:
    """Describe each chosen tensor that shares its memory, and so its version counter, with another."""
    storages: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.layout == torch.strided and tensor.numel():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [
        f"{name!r} shares memory with {', '.join(repr(other) for other in names if other != name)}"
        for names in storages.values()
        if len(names) > 1
        for name in names
        if name in chosen
    ]
