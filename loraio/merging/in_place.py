"""Write new weights over the old ones, in the same memory: all of them, or none.

One operation writes each slice of a weight, and torch counts operations on a tensor in its version counter. So it is
always known how much is written, and after an exception such as Ctrl-C the rest can still be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraio.adapter import Adapter
from loraio.adapter.overflow import refuse_overflow
from loraio.bases.writes import is_dense
from loraio.errors import StateError


@dataclass(slots=True)
class Overwrite:
    """One tensor to write over.

    Attributes:
        tensor: the tensor.
        steps: number of operations that write all of it.
        write: runs the operations from the given one on.
    """

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

    def go_on(self) -> None:
        """Run the operations that are left."""
        if self.done < self.steps:
            self.write(self.done)


def planned(state: Mapping[str, Tensor], adapter: Adapter, *, strength: float, exact: bool) -> list[Overwrite]:
    """Plan what a merge in place writes, and check all of it; write nothing.

    Args:
        state: state dict of the adapter's base.
        adapter, strength, exact: as for `loraio.merge`.

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
                each.go_on()
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
    """Refuse tensors that share memory with others, or that have no version counter.

    Args:
        state: all tensors.
        names: names of the tensors to write to.

    Raises:
        StateError: some cannot be written over; all are listed.
    """
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
