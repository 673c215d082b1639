"""A state dict and an adapter give a new state dict, with no model class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.bases.merge_checks import check_merge
from loraio.bases.receipts import Receipt
from loraio.merging.in_place import overwrite, planned


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
    """The weights with the adapter folded in for good: W + strength * scale * (B @ A) for every target.

    Accumulated in float64 and rounded once to the weight's own dtype: a folded weight is the float nearest to the sum.
    Tensors that the adapter replaces whole are replaced, whatever the strength. The bits are those that an attached
    model computes with, unless ``exact`` is false.

    Args:
        state_dict: the base model's, on any device; not changed, unless in place.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale.
        allow_base_mismatch: go on where values or dtypes of the base are others; names and shapes must fit.
        exact: false sums in float32, which is faster and no longer the nearest float; see `Target.fold`.
        receipts: what was merged into the state dict before. It does not say so itself: ``read_base(path).receipts``
            does for a file, and without them nothing but the base's digest stands against a second merge.
        force: merge the same adapter again, or one into a base in which others are.
        in_place: write the new weights over the old ones, which takes no further memory and less time; a model whose
            state dict this is is then the merged one. An exception that comes once this has begun, Ctrl-C for one, is
            raised when all is written. No forward pass may run meanwhile. `receipt` needs the base as it was, and so a
            merge into new tensors.

    Returns:
        a new dict, same names in the same order; what the adapter changes are new tensors, all others are the tensors
        passed in. In place all are.

    Raises:
        AlreadyMergedError: by its receipts, the state dict has this adapter in it, or others, and not ``force``.
        BaseMismatchError: the adapter was made for another base; every target that differs is listed.
        AdapterError: a sum overflows the weight's dtype.
        ConfigError: the strength is not a finite number.
        StateError: in place, and tensors that would be written over share memory, or a head is another one's size.
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
    if versions is not None:  # module versions, which load_state_dict looks at
        merged._metadata = versions  # type: ignore[attr-defined]  # as torch does it
    return merged
