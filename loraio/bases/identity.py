"""Tell base models apart: by digests of their tensors, each computed once for a live model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import STATISTICS
from loraio.adapter.metadata import FLOAT_DTYPES, BaseReference
from loraio.bases.networks import heads_of, network_args_of, network_of
from loraio.bases.sketches import distance, sketch
from loraio.bases.writes import TensorMark
from loraio.errors import BaseMismatchError, StateError
from loraio.files.integrity import state_digest
from loraio.files.tensors import dtype_code, tensor_bytes, tensor_sha256
from loraio.registry import nearest

RESOLUTION = 1e-5
"""Relative distance below which two sketches count as the same: they have six digits."""

SAME = 0.02
"""Relative distance up to which a cast or rounded weight counts as the same: bfloat16 rounds by 0.002."""

SAME_ORIGIN = 0.5
"""Relative distance up to which a weight counts as changed, not as a different one."""


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of every tensor, `tensor_sha256`, by name.

    Raises:
        StateError: an entry is not a tensor (a module's extra state), has no values (the meta device), or is sparse.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise StateError(f"{name!r} of the state dict is {type(tensor).__name__}, only tensors have an identity")
        if tensor.is_meta:
            raise StateError(f"{name!r} is on the meta device and has no values yet", hint="load the base model first")
        if tensor.layout != torch.strided:
            raise StateError(f"{name!r} is a tensor of layout {tensor.layout}, only dense ones have an identity")
    return {name: tensor_sha256(tensor) for name, tensor in state.items()}


def state_sha256(state: Mapping[str, Tensor], known: Mapping[str, str] | None = None) -> str:
    """Return the digest of a state dict, `loraio.files.integrity.state_digest`, with its tensors' ``known`` digests."""
    known = digests(state) if known is None else known
    return state_digest((name, dtype_code(state[name].dtype), tuple(state[name].shape), known[name]) for name in state)


class BaseIdentity:
    """The digests of a live model's tensors, each computed once until its tensor is written to.

    `loraio.bases.writes.TensorMark` says which writes are noticed; others go unseen until `forget`. Tensors that no
    mark can compare, such as those made under ``torch.inference_mode``, are hashed every time. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, TensorMark]] = {}
        self._whole: dict[tuple[tuple[str, str], ...], str] = {}

    def digests(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """Return `digests` of the model's state dict, and hash only tensors that are new or were written to."""
        with self._lock:
            stale = {name: tensor for name, tensor in state.items() if not self._is_known(name, tensor)}
            found = digests(stale)
            if stale or len(state) != len(self._known):
                self._whole.clear()
                self._known = {name: digest for name, digest in self._known.items() if name in state}
            self._learn(state, found)
            return {name: self._known[name][0] for name in state}

    def learn(self, state: Mapping[str, Tensor], read: Mapping[str, Tensor], known: Mapping[str, str]) -> None:
        """Take over digests from a file, of each tensor that still holds the bytes that were read from it."""
        same = [name for name in known if tensor_bytes(state[name]).equal(tensor_bytes(read[name]))]
        with self._lock:
            self._learn(state, {name: known[name] for name in same})

    def state_sha256(self, state: Mapping[str, Tensor], known: Mapping[str, str]) -> str:
        """Return `state_sha256`, cached until a digest changes."""
        rows = tuple(sorted((name, known[name]) for name in state))
        with self._lock:
            if rows not in self._whole:
                self._whole[rows] = state_sha256(state, known)
            return self._whole[rows]

    def forget(self) -> None:
        """Hash everything again next time."""
        with self._lock:
            self._known.clear()
            self._whole.clear()

    def _is_known(self, name: str, tensor: Tensor) -> bool:
        known = self._known.get(name)
        return known is not None and isinstance(tensor, Tensor) and known[1].same([tensor])

    def _learn(self, state: Mapping[str, Tensor], found: Mapping[str, str]) -> None:
        marks = TensorMark.each([state[name] for name in found])
        self._known |= {name: (sha256, mark) for (name, sha256), mark in zip(found.items(), marks, strict=True)}


def identity_of(model: nn.Module) -> BaseIdentity:
    """Return the `BaseIdentity` of a model, the same one for as long as the model lives; a copy has its own.

    ``identity_of(model).forget()`` makes the next attach or swap hash everything again.
    """
    with _IDENTITIES_LOCK:
        return _IDENTITIES.setdefault(model, BaseIdentity())


_IDENTITIES: weakref.WeakKeyDictionary[nn.Module, BaseIdentity] = weakref.WeakKeyDictionary()
"""Not an attribute of the model, so that the model keeps exactly the attributes that it had."""
_IDENTITIES_LOCK = threading.Lock()


def without_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the running statistics of its normalisation layers."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in STATISTICS}


def base_reference(state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> BaseReference:
    """Return the reference of an adapter to its base, with network, options and heads if ``model`` is a built one."""
    known = digests(state)
    parameters = without_statistics(state)
    facts: dict[str, Any] = {}
    if model is not None:
        facts = {"network": network_of(model), "network_args": network_args_of(model), "heads": heads_of(model)}
    without = state_sha256(parameters, known) if len(parameters) < len(state) else None
    return BaseReference(sha256=state_sha256(state, known), sha256_without_statistics=without, **facts)


def check_base(
    adapter: Adapter,
    state: Mapping[str, Tensor],
    *,
    allow_mismatch: bool = False,
    known: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Refuse a base model that the adapter was not made for.

    ``allow_mismatch`` lets values and dtypes differ; names and shapes never may. ``known`` are digests of the state's
    tensors, if the caller has them; those of the targets suffice if one of these differs.

    Every target and every tensor that is replaced is compared: present, same shape, same dtype, same bytes. If all
    agree, the rest of the network is compared by its digest.

    Returns:
        a line for each difference that was allowed; empty if there is none.

    Raises:
        BaseMismatchError: with a line for each target that differs, and how.
        StateError: as `digests`.
    """
    found = digests(state) if known is None else known
    problems: list[str] = []
    fits = True
    needed = {name: (target.shape, target.dtype, target.base_sha256) for name, target in adapter.targets.items()}
    needed |= {name: (whole.base_shape, whole.dtype, whole.base_sha256) for name, whole in adapter.whole.items()}
    for name, (shape, dtype, sha256) in needed.items():
        tensor = state.get(name)
        if tensor is None:
            fits = False
            problems.append(f"{name!r}: the model has no such tensor{nearest(name, state)}")
        elif tuple(tensor.shape) != shape:
            fits = False
            problems.append(f"{name!r}: the tensor is {tuple(tensor.shape)}, the adapter was made for {shape}")
        elif tensor.is_floating_point() != (dtype in FLOAT_DTYPES):
            fits = False
            problems.append(f"{name!r}: the tensor is {tensor.dtype}, the adapter was made for {dtype}")
        elif dtype_code(tensor.dtype) != dtype or found[name] != sha256:
            sketched = adapter.targets[name].sketch if name in adapter.targets else ()
            problems.append(f"{name!r}: {_difference(tensor, dtype, sketched)}")
    network = f" of network {adapter.base.network!r}" if adapter.base.network else ""
    hint = f"the base{network} with digest {adapter.base.sha256[:12]}.., on which the adapter was trained"
    if problems and not (fits and allow_mismatch):
        raise BaseMismatchError(
            f"the adapter does not belong to this base: {len(problems)} of {len(needed)} "
            f"{'targets and whole tensors' if adapter.whole else 'targets'} differ",
            problems=problems,
            hint=hint,
        )
    digest = state_sha256(state, found)
    if problems or digest == adapter.base.sha256:
        return tuple(problems)
    rest = f"digest {digest[:12]}.., not {adapter.base.sha256[:12]}.."
    if state_sha256(without_statistics(state), found) == adapter.base.sha256_without_statistics:
        line = f"only the running statistics of its normalisation layers differ ({rest})"
    else:
        line = f"its targets are the same, but other tensors of the network differ ({rest})"
    if not allow_mismatch:
        raise BaseMismatchError(f"the adapter does not belong to this base: {line}", hint=hint)
    return (line,)


def _difference(weight: Tensor, dtype: str, sketched: Sequence[float]) -> str:
    """Say how a tensor of the right shape differs from one with this dtype code and sketch."""
    code = dtype_code(weight.dtype)
    cast = f"cast to {str(weight.dtype).removeprefix('torch.')}" if code != dtype else None
    if not sketched:
        return f"a tensor of dtype {code}, not {dtype}" if cast else "other values"
    found = sketch(weight)
    if not found:
        return "other values, with NaN or infinity among them"
    apart = distance(sketched, found)
    told = f"relative distance {apart:.2g}" if apart >= RESOLUTION else f"relative distance below {RESOLUTION:g}"
    if cast is None:
        rounded = [half for half in (torch.bfloat16, torch.float16) if weight.to(half).to(weight.dtype).equal(weight)]
        cast = f"rounded to {str(rounded[0]).removeprefix('torch.')}" if rounded else None
    if cast and apart < SAME:
        return f"same weights {cast} ({told})"
    if apart < RESOLUTION:
        return f"other values, though hardly ({told})"
    other = f"other weights, {cast}" if cast else "other weights" if apart >= SAME_ORIGIN else "changed weights"
    return f"{other} ({told})"
