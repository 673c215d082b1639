"""Plan how a base is restored from the merged checkpoint, the adapter and the residue of a reversible merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from loraio.adapter import Adapter
from loraio.bases.checkpoints import BaseCheckpoint
from loraio.bases.identity import state_sha256
from loraio.errors import AdapterError, FormatError, MissingFileError, VerificationError
from loraio.files.copying import Inputs
from loraio.files.tensors import TORCH_DTYPES
from loraio.merging.plans import TensorPlan, digests_of, facts_of, facts_sha256, stored
from loraio.merging.residue_files import ResidueFile, read_residue, residue_beside
from loraio.merging.unfolding import Unfolding
from loraio.merging.unmerge_plan import MergedCheckpoint, UnmergePlan


def plan_from_residue(
    merged: MergedCheckpoint,
    adapter: Adapter,
    *,
    path: str | os.PathLike[str],
    residue: str | os.PathLike[str] | None,
    inputs: Inputs,
    workers: int,
) -> UnmergePlan:
    """Plan to restore the base without it.

    Args:
        merged: the merged checkpoint.
        adapter: what was merged into it last.
        path: of the merged checkpoint, as the user named it.
        residue: the residue file; None looks for it beside ``path``.
        inputs: opens the residue.
        workers: number of threads.

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

    shards = {
        file: {name: planned(name, plan) for name, plan in plans.items()} for file, plans in merged.shards.items()
    }
    return UnmergePlan(
        checkpoint=_base_without_values(merged.checkpoint, found, adapter),
        shards=shards,
        change=Unfolding(adapter, found, inputs),
        metadata=_base_metadata(merged, found),
        index=found.index,
        wrong=lambda digest: VerificationError(
            f"the restored base has the digest {digest[:12]}.., {merged.named} names {merged.base_sha256[:12]}..; "
            "nothing was written"
        ),
        originals=frozenset(adapter.whole),
        known=found.tensors,
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
    """Find the residue beside the checkpoint."""
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
    return BaseCheckpoint(
        path=merged.path,
        state=state,
        network=merged.network,
        network_args=merged.network_args,
        heads=heads,
        stripped=residue.stripped if was_file else "",
        parts=merged.parts,
    )


def _base_metadata(merged: MergedCheckpoint, residue: ResidueFile) -> Mapping[str, Mapping[str, str]]:
    """Return the strings in the base's headers: shards have kept them, of one file the residue has them."""
    if merged.checkpoint.parts:
        return merged.metadata
    return {} if residue.metadata is None else {next(iter(merged.shards)): residue.metadata}
