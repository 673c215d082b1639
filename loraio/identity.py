"""The identity of a base model: digests of its weights, and how a model differs from an adapter's own base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from loraio.adapter import Adapter
from loraio.container import dtype_code, tensor_bytes
from loraio.errors import BaseMismatchError, StateError
from loraio.registry import nearest


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, little-endian, in C order, as 64 hexadecimal digits.

    >>> import torch
    >>> tensor_sha256(torch.zeros(2))[:16]
    'af5570f5a1810b7a'
    """
    return hashlib.sha256(tensor_bytes(tensor).numpy().data).hexdigest()


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_sha256` of every tensor, by name.

    Raises:
        StateError: an entry is no tensor (a module's extra state), or has no values (the meta device).
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise StateError(f"{name!r} of the state dict is {type(tensor).__name__}, only tensors have an identity")
        if tensor.is_meta:
            raise StateError(f"{name!r} is on the meta device and has no values yet", hint="load the base model first")
    return {name: tensor_sha256(tensor) for name, tensor in state.items()}


def state_sha256(state: Mapping[str, Tensor], known: Mapping[str, str] | None = None) -> str:
    """One digest for a whole state dict, whatever the order of its names.

    SHA-256 over one line for each tensor, lines sorted by the name's code points: the JSON array
    ``["name","F32",[32,1,3,3],"<tensor_sha256>"]`` without spaces, non-ASCII characters escaped, and a newline.

    Args:
        state: the state dict, parameters and buffers.
        known: digests of its tensors, when the caller has them already.
    """
    known = digests(state) if known is None else known
    whole = hashlib.sha256()
    for name in sorted(state):
        row = [name, dtype_code(state[name].dtype), list(state[name].shape), known[name]]
        whole.update(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
    return whole.hexdigest()


def check_base(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Refuse a base model that is not the one the adapter was made for.

    Every target is looked at before anything is said: present, same shape, same dtype, same bytes. If all targets
    agree, the rest of the network is compared by its digest.

    Raises:
        BaseMismatchError: with a line for each target that differs.
        StateError: as `digests`.
    """
    found = digests(state)
    problems = []
    for name, target in adapter.targets.items():
        weight = state.get(name)
        if weight is None:
            problems.append(f"{name!r}: the model has no such weight{nearest(name, state)}")
        elif tuple(weight.shape) != target.shape:
            problems.append(f"{name!r}: the weight is {tuple(weight.shape)}, the adapter was made for {target.shape}")
        elif dtype_code(weight.dtype) != target.dtype:
            problems.append(f"{name!r}: the weight is {weight.dtype}, the adapter was made for {target.dtype}")
        elif found[name] != target.base_sha256:
            problems.append(f"{name!r}: other values (sha256 {found[name][:12]}.., not {target.base_sha256[:12]}..)")
    network = f" of network {adapter.base.network!r}" if adapter.base.network else ""
    hint = f"the base{network} with digest {adapter.base.sha256[:12]}.., on which the adapter was trained"
    if problems:
        total = len(adapter.targets)
        raise BaseMismatchError(
            f"the adapter does not belong to this base: {len(problems)} of {total} targets differ",
            problems=problems,
            hint=hint,
        )
    digest = state_sha256(state, found)
    if digest != adapter.base.sha256:
        raise BaseMismatchError(
            f"the adapter does not belong to this base: its targets are the same, but other tensors of the network "
            f"differ (digest {digest[:12]}.., not {adapter.base.sha256[:12]}..)",
            hint=hint,
        )
