"""Cache adapted weights for as long as everything that they were computed from is unchanged.

That is: base weight and factors in the same memory, to which nobody wrote since. The version counter
(``tensor._version``) tells, which every in-place operation raises, under ``no_grad`` too. Steps of fused optimizers do
not raise it, so the steps of all optimizers are counted besides. Writes through ``tensor.data``, a NumPy view or a raw
pointer are not noticed.

A forward pass checks all weights together when it begins, and in front of each layer only that layer's base weight
once more: by then other data have pushed the rest out of the processor's cache, and each look at memory costs more than
a look at all of it in a row. A write to factors during a pass is noticed by the next pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts the steps of all of torch's optimizers, from the first cached weight on."""

    count = 0
    _hook: Any = None

    def start(self) -> None:
        """Count from now on."""
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


STEPS = OptimizerSteps()


class CachedWeight:
    """An adapted weight, and everything that it was computed from.

    Attributes:
        folded: the adapted weight; the base weight itself where the part lets it through.
        given: the tensor that readers without gradients get: ``folded``, asking for gradients if the base weight does.
        given_version: its version counter.
        asks: True if the base weight asks for gradients.
        stack: the parametrizations on the weight.
        weight: the base weight.
        version, pointer, strides: of the base weight.
        factors: the dict that holds each factor, its key, the factor, and its version counter and address.
        steps: how many steps optimizers had made.
    """

    weight: Tensor
    folded: Tensor
    given: Tensor
    asks: bool

    __slots__ = (
        "_aliases",
        "_asking",
        "asks",
        "factors",
        "folded",
        "given",
        "given_version",
        "pointer",
        "stack",
        "steps",
        "strides",
        "version",
        "weight",
    )

    def __init__(self, stack: Any, part: Any) -> None:
        """Fold the weight of a ``ParametrizationList`` by a `loraio.live.parametrization.FoldedWeight`."""
        STEPS.start()
        self.stack, self.weight = stack, stack._parameters["original"]
        # all of this before the fold: a write during the fold is noticed
        self.steps, self.asks = STEPS.count, self.weight.requires_grad
        self.version, self.pointer, self.strides = _key(self.weight)
        held = part.held
        self.factors = [(held, name, factor, *_key(factor)[:2]) for name, factor in held.items() if factor is not None]
        # another tensor cannot get an address as long as these hold the memory
        self._aliases = [source.detach() for source in (self.weight, *(factor for _, _, factor, *_ in self.factors))]
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.detach()
            folded = part.computed(weight)
        if folded is weight:
            self.folded = self._asking = self.weight
        else:
            # torch.matmul sums in another order where the weight asks for gradients, even under no_grad: the folded
            # weight asks for gradients where the base weight does, as a merged Parameter would
            self.folded, self._asking = folded, folded.detach().requires_grad_()
            if folded.is_cuda:  # another thread may use it on another stream
                torch.cuda.current_stream(folded.device).synchronize()
        self.given = self._asking if self.asks else self.folded
        self.given_version = self.given._version

    def is_current(self) -> bool:
        """Return True if weight and factors are those that it was computed from, and nobody wrote to them."""
        weight = self.weight
        return (
            self.stack._parameters.get("original") is weight
            and self.steps == STEPS.count
            and _key(weight) == (self.version, self.pointer, self.strides)
            and all(
                held.get(name) is factor and _key(factor)[:2] == (version, pointer)
                for held, name, factor, version, pointer in self.factors
            )
        )

    def is_unwritten(self) -> bool:
        """Return True if nobody wrote to the tensor that was given to readers, nor changed what the base asks for."""
        return self.given._version == self.given_version and self.weight.requires_grad == self.asks

    def for_use(self) -> Tensor:
        """Return the tensor for a reader without gradients."""
        # autocast caches its cast of a tensor that asks for gradients: one for each forward pass
        if self.asks and self.weight.dtype == torch.float32 and torch.is_autocast_enabled(self.weight.device.type):
            return self.folded
        return self.given


def _key(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return tensor._version, tensor.data_ptr(), tensor.stride()


class WeightCache:
    """The adapted weights of one snapshot, computed when they are first read.

    Attributes:
        weights: by the weight's name. This dict is never changed, only replaced.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, CachedWeight] = {}
        self._check = _Check({})

    def valid_weights(self) -> Mapping[str, CachedWeight] | None:
        """Return the weights that hold, for a pass that begins now; None where a pass must check each by itself."""
        if torch.is_grad_enabled() or parametrize._cache_enabled or torch._C._len_torch_dispatch_stack():
            return None
        weights, check = self.weights, self._check
        if check.weights is not weights:
            self._check = check = _Check(weights)
        if check.holds():
            return weights
        valid = {name: cached for name, cached in weights.items() if cached.is_unwritten() and cached.is_current()}
        if len(valid) < len(weights):
            self.weights = valid
            self._check = check = _Check(valid)
            if check.holds():
                return valid
        return None

    def weight(self, name: str, stack: Any, part: Any) -> CachedWeight | None:
        """Return one adapted weight, computed now where it is not cached; None where it cannot be cached."""
        cached = self.weights.get(name)
        if cached is not None and cached.is_unwritten() and cached.is_current():
            return cached
        weight = stack._parameters.get("original")
        if weight is None or not _can_be_cached(weight, part.held.values()):
            return None
        cached = CachedWeight(stack, part)
        self.weights = {**self.weights, name: cached}
        return cached

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        memo[id(self)] = twin = WeightCache()  # a copy of the model computes its own
        return twin


class _Check:
    """Everything that must be unchanged for some cached weights to hold.

    It does not look at the addresses of factors: they are buffers here, and torch never gives those other memory. Each
    loop is one call, since a network has a hundred weights and factors.
    """

    def __init__(self, weights: Mapping[str, CachedWeight]) -> None:
        self.weights = weights
        each = list(weights.values())
        factors = [factor for cached in each for factor in cached.factors]
        self._stacks = [cached.stack._modules for cached in each]
        self._weights = [cached.weight for cached in each]
        self._tensors = [*self._weights, *(factor for _, _, factor, *_ in factors)]
        self._versions = [*(cached.version for cached in each), *(version for *_, version, _ in factors)]
        self._dicts = [*(cached.stack._parameters for cached in each), *(held for held, *_ in factors)]
        self._keys = [*("original" for _ in each), *(name for _, name, *_ in factors)]
        self._pointers = [cached.pointer for cached in each]
        self._asking = [cached.asks for cached in each]
        self._devices = {cached.weight.device.type for cached in each if cached.asks}
        self._steps = {cached.steps for cached in each}

    def holds(self) -> bool:
        """Return True if everything is unchanged."""
        try:
            return (
                all(map(is_, map(getitem, self._dicts, self._keys), self._tensors))
                and list(map(_VERSION, self._tensors)) == self._versions
                and list(map(Tensor.data_ptr, self._weights)) == self._pointers
                and list(map(_ASKS, self._weights)) == self._asking
                and all(map((1).__eq__, map(len, self._stacks)))
                and self._steps <= {STEPS.count}
                and not any(map(torch.is_autocast_enabled, self._devices))
            )
        except KeyError:  # someone else has taken something off
            return False


_VERSION, _ASKS = attrgetter("_version"), attrgetter("requires_grad")


def _can_be_cached(weight: Tensor, factors: Iterable[Tensor | None]) -> bool:
    """Return True if writes to these tensors are counted, and no transform or mode looks on."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and torch._C._len_torch_dispatch_stack() == 0
        and not weight.is_meta
        and not any(tensor is not None and tensor.is_inference() for tensor in (weight, *factors))
    )
