"""Plan how a merged checkpoint gives its base again, from the base itself or from a residue, and check its receipts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraio.adapter import Adapter
from loraio.bases.checkpoints import BaseCheckpoint, fitted, is_pickle, read_base, scan_base
from loraio.bases.identity import state_sha256
from loraio.bases.receipts import Receipt
from loraio.errors import AdapterError, BaseMismatchError, FormatError, MissingFileError, VerificationError
from loraio.files.copying import Inputs
from loraio.files.tensors import TORCH_DTYPES
from loraio.merging.effect import Fold
from loraio.merging.plans import (
    Shards,
    TensorPlan,
    copy_plans,
    digests_of,
    facts_of,
    facts_sha256,
    index_text,
    joined,
    read_bytes,
    replanned,
    stored,
)
from loraio.merging.residue_files import ResidueFile, read_residue, residue_beside
from loraio.merging.residues import LENGTH, block_length, restored


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedCheckpoint:
    """A merged checkpoint without values, and its receipts; those from ``first`` on are to be taken off."""

    checkpoint: BaseCheckpoint
    receipts: tuple[Receipt, ...]
    first: int
    shards: Shards
    metadata: Mapping[str, Mapping[str, str]]

    @property
    def plans(self) -> dict[str, TensorPlan]:
        return joined(self.shards)

    @property
    def base_sha256(self) -> str:
        return self.receipts[self.first].base_sha256

    @property
    def named(self) -> str:
        """Name of the first receipt to take off, for messages."""
        return f"receipt {self.first + 1} of {len(self.receipts)}"

    def problems(self, found: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
        """List the differences between the receipts and the digests of the checkpoint (found) and the base (before)."""
        changed = {name: digest for one in self.receipts for name, digest in one.changed.items()}
        taken = {name for one in self.receipts[self.first :] for name in one.changed}
        problems = [f"{name!r} is missing" for name in before if name not in found]
        problems += [f"{name!r} is not in the base" for name in found if name not in before]
        for name in found if all(one.changed for one in self.receipts) else ():
            if name in changed and found[name] != changed[name]:
                problems.append(f"{name!r} is not what its last merge left")
            elif name not in taken and found[name] != before.get(name, found[name]):
                problems.append(f"{name!r} is not the base's, though no adapter was to change it")
        stated, is_now = self.checkpoint.document.get("sha256"), state_sha256(self.checkpoint.state, found)
        if not problems and stated != is_now:
            problems = [f"its tensors have the digest {is_now}, its metadata say {stated}"]
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergePlan:
    """How the base is made.

    Attributes:
        checkpoint: the base without values, as far as it is known.
        metadata: strings in the header of each file; a file without an entry gets ours.
        wrong: returns the error for a base with another digest.
        index: text of the index of a sharded base.
        change: restores the folded tensors; None if the base is at hand.
    """

    checkpoint: BaseCheckpoint
    shards: Shards
    metadata: Mapping[str, Mapping[str, str]]
    wrong: Callable[[str], Exception]
    index: str | None = None
    change: Unfolding | None = None
    files: tuple[str | os.PathLike[str], ...] = ()


def plan_from_base(merged: MergedCheckpoint, path: str | os.PathLike[str]) -> UnmergePlan:
    """Plan to copy the base, where it is at hand."""
    checkpoint, headers = (read_base(path), ()) if is_pickle(path) else scan_base(path)
    checkpoint = fitted(checkpoint, merged.checkpoint.state)

    def wrong(found: str) -> Exception:
        bases = [number for number, one in enumerate(merged.receipts, 1) if one.base_sha256 == found]
        return BaseMismatchError(
            f"the base has the digest {found[:12]}.., {merged.named} was merged into {merged.base_sha256[:12]}..",
            where=f"{os.fspath(path)!r}",
            hint="--all takes all merges back" if bases == [1] else None,
        )

    return UnmergePlan(
        checkpoint=checkpoint,
        shards=copy_plans(checkpoint, headers),
        metadata={header.path.name: header.metadata for header in headers},
        index=index_text(checkpoint.path) if checkpoint.parts else None,
        wrong=wrong,
        files=(checkpoint.path, *checkpoint.parts),
    )


def plan_from_residue(
    merged: MergedCheckpoint,
    adapter: Adapter,
    *,
    path: str | os.PathLike[str],
    residue: str | os.PathLike[str] | None,
    inputs: Inputs,
    workers: int,
) -> UnmergePlan:
    """Plan to restore the base from a residue; None looks for the residue beside the path that the user named.

    Raises:
        AdapterError: another adapter was merged last.
        MissingFileError: no residue is there.
        FormatError: the merge has no residue, or another one, or it is damaged.
    """
    _refuse_other_adapter(merged, adapter)
    if merged.receipts[-1].residue_sha256 is None:
        raise FormatError(
            f"{merged.named} has no residue: it was not merged with --reversible",
            where=f"{os.fspath(path)!r}",
            hint="--base BASE (base= in Python)",
        )
    found = read_residue(residue if residue is not None else _find_residue(merged.checkpoint, Path(path)))
    _refuse_damaged(found, merged, inputs, workers)
    _refuse_other_merge(found, merged, adapter)

    def planned(name: str, plan: TensorPlan) -> TensorPlan:
        if name in adapter.whole:
            return replace(plan, shape=found.header.tensors[name].shape, source=stored(found.header, name))
        return replace(plan, folded=name in adapter.targets)

    return UnmergePlan(
        checkpoint=_base_without_values(merged.checkpoint, found, adapter),
        shards=replanned(merged.shards, planned),
        change=Unfolding(adapter, found, inputs),
        metadata=_base_metadata(merged, found),
        index=found.index,
        wrong=lambda digest: VerificationError(
            f"the restored base has the digest {digest[:12]}.., {merged.named} names {merged.base_sha256[:12]}..; "
            "nothing was written"
        ),
        files=(found.header.path,),
    )


def _refuse_other_adapter(merged: MergedCheckpoint, adapter: Adapter) -> None:
    last, own = merged.receipts[-1], state_sha256(adapter.all_tensors)
    if own == last.adapter_sha256:
        return
    earlier = [number for number, one in enumerate(merged.receipts, 1) if one.adapter_sha256 == own]
    raise AdapterError(
        f"adapter {own[:12]}.. is not that of {merged.named}, {last.adapter_sha256[:12]}.."
        + (f", but that of receipt {earlier[-1]}" if earlier else ""),
        hint="the last adapter first" if earlier else "loraio inspect shows which adapter it was",
    )


def _find_residue(checkpoint: BaseCheckpoint, path: Path) -> Path:
    places = [residue_beside(path)]
    if checkpoint.parts:  # named as a folder, or by its index
        places += [residue_beside(checkpoint.path), residue_beside(checkpoint.path.resolve().parent)]
    for place in places:
        if place.exists():
            return place
    raise MissingFileError(
        f"{str(places[0])!r} does not exist: the residue of the merge",
        hint="--residue FILE (residue= in Python) where it is elsewhere, or --base BASE",
    )


def _refuse_damaged(residue: ResidueFile, merged: MergedCheckpoint, inputs: Inputs, workers: int) -> None:
    """Refuse a residue with another digest than the last receipt names."""
    tensors, wanted, found = residue.header.tensors, merged.receipts[-1].residue_sha256, None
    if all(info.dtype in TORCH_DTYPES for info in tensors.values()):
        plans = {
            name: TensorPlan(dtype=info.dtype, shape=info.shape, source=stored(residue.header, name))
            for name, info in tensors.items()
        }
        found = facts_sha256(facts_of(plans), digests_of(plans, inputs, workers=workers))
    if found != wanted:
        raise FormatError(
            f"the residue is not that of {merged.named}, or it is damaged: "
            f"its digest is {str(found)[:12]}.., not {str(wanted)[:12]}..",
            where=residue.where,
        )


def _refuse_other_merge(residue: ResidueFile, merged: MergedCheckpoint, adapter: Adapter) -> None:
    """Refuse a residue that does not fit the receipt, the checkpoint or the adapter; list all differences."""
    last, tensors, plans = merged.receipts[-1], residue.header.tensors, merged.plans
    facts = {
        "adapter_sha256": last.adapter_sha256,
        "base_sha256": last.base_sha256,
        "merged_sha256": merged.checkpoint.document.get("sha256"),
        "strength": last.strength,
    }
    problems = [
        f"{key} is {getattr(residue, key)}, the receipt has {value}"
        for key, value in facts.items()
        if getattr(residue, key) != value
    ]
    problems += [f"{name!r} is missing" for name in sorted({*adapter.targets, *adapter.whole} - tensors.keys())]
    problems += [f"{name!r} is not in the checkpoint" for name in sorted(residue.tensors.keys() ^ plans.keys())]
    for name in adapter.whole.keys() & tensors.keys() & plans.keys():
        info, wanted = tensors[name], (plans[name].dtype, adapter.whole[name].base_shape)
        if (info.dtype, info.shape) != wanted:
            problems.append(f"{name!r} is {info.dtype} {info.shape}, it must be {wanted[0]} {wanted[1]}")
    for name in adapter.targets.keys() & plans.keys():
        found, shape = plans[name].shape, adapter.targets[name].shape
        if found != shape:
            problems.append(f"{name!r} is {found} in the checkpoint, the adapter has {shape}")
    if merged.checkpoint.parts and residue.index is None:
        problems.append("it is of a merge into one file, and the checkpoint has shards")
    if problems:
        raise FormatError("the residue does not belong to this checkpoint", problems=problems, where=residue.where)


def _base_without_values(merged: BaseCheckpoint, residue: ResidueFile, adapter: Adapter) -> BaseCheckpoint:
    state = dict(merged.state)
    for name in adapter.whole:
        info = residue.header.tensors[name]
        state[name] = torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]), device="meta")
    heads = {name: count for name, count in merged.heads.items() if name not in adapter.heads}
    heads |= {name: count for name, count in adapter.base.heads.items() if name in adapter.heads}
    was_file = residue.metadata is not None or residue.index is not None
    stripped = residue.stripped if was_file else ""
    return replace(merged, state=state, heads=heads, stripped=stripped, document={}, digests={})


def _base_metadata(merged: MergedCheckpoint, residue: ResidueFile) -> Mapping[str, Mapping[str, str]]:
    """Return the strings in the base's headers: shards have kept them, of one file the residue has them."""
    if merged.checkpoint.parts:
        return merged.metadata
    return {} if residue.metadata is None else {next(iter(merged.shards)): residue.metadata}


class Unfolding:
    """Restores base weights from folded ones and their residue, slice by slice."""

    def __init__(self, adapter: Adapter, residue: ResidueFile, inputs: Inputs) -> None:
        self.adapter, self.residue, self._inputs = adapter, residue, inputs
        self._read: dict[str, int] = {}

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        where = f"{name!r} of {self.residue.where}"
        return restored(part, weight, self.residue.strength, self._next(name, where), where=where)

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Fold) -> Fold:
        return so_far  # nothing: the digest of the state dict proves the base

    def finish(self) -> None:
        """Raise FormatError if a residue has more blocks than its weight has slices."""
        for name in self.adapter.targets:
            if self._read.get(name) != stored(self.residue.header, name).size:
                raise FormatError(f"the residue of {name!r} is longer than it should be", where=f"{name!r}")

    def _next(self, name: str, where: str) -> bytes:
        place, done = stored(self.residue.header, name), self._read.get(name, 0)
        with self._inputs.open(place.path) as file:
            head = bytes(read_bytes(file, place.begin + done, min(LENGTH, place.size - done)).numpy().data)
            size = block_length(head, where=where)
            if done + size > place.size:
                raise FormatError("the residue is damaged: a block is longer than its tensor", where=where)
            block = bytes(read_bytes(file, place.begin + done, size).numpy().data)
        self._read[name] = done + size
        return block
