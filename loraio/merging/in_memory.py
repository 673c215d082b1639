"""Merge an adapter into a state dict, without a model class."""

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
