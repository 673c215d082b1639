"""A state dict and an adapter give a new state dict, with no model class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from loraio.adapter import Adapter, check_strength
from loraio.identity import check_base


def merge(state_dict: Mapping[str, Tensor], adapter: Adapter, strength: float = 1.0) -> dict[str, Tensor]:
    """The weights with the adapter folded in for good: W + strength * scale * (B @ A) for every target.

    Accumulated in float64 and rounded once to the weight's own dtype: a folded weight is the float nearest to the sum.
    The bits are those that an attached model computes with.

    Args:
        state_dict: the base model's, on any device; not changed.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale.

    Returns:
        a new dict, same names in the same order; targets are new tensors, all others are the tensors passed in.

    Raises:
        BaseMismatchError: the adapter was made for another base; every target that differs is listed.
        AdapterError: a sum overflows the weight's dtype.
        ConfigError: the strength is not a finite number.
    """
    strength = check_strength(strength)
    check_base(adapter, state_dict)
    with torch.no_grad():
        folded = {name: adapter.fold(name, state_dict[name], strength=strength) for name in adapter.targets}
    merged: dict[str, Tensor] = OrderedDict((name, folded.get(name, tensor)) for name, tensor in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:  # module versions, which load_state_dict looks at
        merged._metadata = versions  # type: ignore[attr-defined]  # as torch does it
    return merged
