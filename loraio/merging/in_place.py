"""New weights over the old ones, in the same memory: all of them, or none.

Each slice of a weight is written by one operation, and torch counts the operations that write to a tensor. So what has
been done is known at any moment, and whatever breaks in, Ctrl-C for one, the rest can still be written.
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
    """One tensor that is to be written over.

    Attributes:
        tensor: it.
        steps: by how many operations.
        write: does those from one on.
    """

    tensor: Tensor
    steps: int
    write: Callable[[int], object]
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.tensor._version

    @property
    def done(self) -> int:
        """How many of the operations were made."""
        return self.tensor._version - self._before

    def go_on(self) -> None:
        """Make those that are left."""
        if self.done < self.steps:
            self.write(self.done)


def planned(state: Mapping[str, Tensor], adapter: Adapter, *, strength: float, exact: bool) -> list[Overwrite]:
    """What a merge in place will write; checks all of it, and writes nothing.

    Args:
        state: the base's state dict, to which the adapter belongs.
        adapter, strength, exact: as `loraio.merge` takes them.

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
            "tensors of another shape cannot take the place of these", problems=problems, hint="merge into new ones"
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


@torch.inference_mode(False)  # in which torch would not count
@torch.no_grad()
def overwrite(plan: Sequence[Overwrite]) -> None:
    """Write all of it.

    An exception that comes before the first operation leaves everything as it was; one that comes later is raised when
    all is written.

    Raises:
        BaseException: what broke in.
    """
    caught: BaseException | None = None
    while True:
        before = [each.done for each in plan] if caught else []
        try:
            for each in plan:
                each.go_on()
        except BaseException as error:
            now = [each.done for each in plan]
            if not any(now) or now == before:  # what fails twice at the same place will not be done at all
                raise
            caught = error
        else:
            break
    if caught is not None:
        raise caught


def refuse_unwritable(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse tensors that cannot be written over without others being changed, or that torch counts no writes of.

    Args:
        state: all tensors.
        names: of those to be written to.

    Raises:
        StateError: some cannot; all are listed.
    """
    chosen = set(names)
    problems = [f"{name!r}: {why}" for name in chosen if (why := _why_not(state[name])) is not None]
    problems = problems or _shared(state, chosen)
    if problems:
        raise StateError("these tensors cannot be written over", problems=sorted(problems), hint="merge into new ones")


def _why_not(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return f"it is a {type(tensor).__name__}, which stands for something else"
    if tensor.is_inference():
        return "it was made in inference mode"
    return None if is_dense(tensor) else "its memory has holes or is used twice"


def _shared(state: Mapping[str, Tensor], chosen: set[str]) -> list[str]:
    """A line for each tensor to be written to whose memory, and torch's count with it, is that of another too."""
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
