"""Merge on files: fold an adapter into a base checkpoint, and prove the output before it gets its name.

The base is read once and never held in memory. The digest of a copied tensor is taken from the output, that of a target
from the bytes that are folded. Together they give the digest of the base, which must be the one that the adapter names.
So the proof that this is the adapter's base is also the proof that it was copied right. Only where another base is
allowed, the base is hashed first, and each tensor must then have that digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraio.adapter.metadata import check_strength
from loraio.bases.checkpoints import fitted, is_pickle, read_base, scan_base
from loraio.bases.identity import state_sha256
from loraio.bases.receipts import Receipt, check_receipts
from loraio.errors import LoraioError, OutputError
from loraio.files.atomic import check_output, staged
from loraio.files.copying import Inputs
from loraio.files.folders import move_files, name_folder, remove_folder, working_folder
from loraio.files.sharded import INDEX_SUFFIX, checkpoint_files, is_sharded
from loraio.formats import dialects
from loraio.formats.conversion import load_for
from loraio.formats.sources import adapter_files
from loraio.merging.checkpoint_writer import CheckpointWriter, Written, document_metadata
from loraio.merging.effect import Folding, MergeEffect
from loraio.merging.finished_shards import FinishedShards
from loraio.merging.merge_plan import (
    MergePlan,
    judge,
    merge_plans,
    merge_receipt,
    merged_document,
    merged_index,
    shard_metadata,
)
from loraio.merging.plans import index_text
from loraio.merging.residue_files import Residue, ResidueWriter, residue_writer
from loraio.merging.weight_check import WeightReport
from loraio.merging.workers import counting, one_thread_each, worker_count
from loraio.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedFile:
    """The result of `merge_file`.

    Attributes:
        path: the merged checkpoint; of a sharded one the index.
        sha256: digest of its state dict.
        stripped: prefix of every name in the base, which was taken off; empty for most files.
        weights: the evidence, taken from the file itself.
        effect: how much the adapter changed the weights.
        receipt: the entry for this merge in the checkpoint.
        residue: size of the residue; None unless the merge is reversible.
        mismatch: how the base differs from the adapter's own, where that was allowed.
        parts: the shards of a sharded checkpoint; empty for others.
        reused: number of shards that an earlier run had finished before it was killed.
    """

    path: Path
    sha256: str
    weights: WeightReport
    effect: MergeEffect
    receipt: Receipt
    residue: Residue | None = None
    mismatch: tuple[str, ...] = ()
    stripped: str = ""
    parts: tuple[Path, ...] = ()
    reused: int = 0


def merge_file(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    overwrite: bool = False,
    allow_base_mismatch: bool = False,
    allow_noop: bool = False,
    force: bool = False,
    exact: bool = True,
    reversible: bool = False,
    workers: int | None = None,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    alpha: int | float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergedFile:
    """Write the base with the adapter folded in: `merge` for files, in memory that does not grow with them.

    Targets are folded one at a time; all other tensors are copied from file to file. Everything written is read back,
    and the weights are compared with the reference of `verify`, before the file gets its name. The new checkpoint says
    what was merged into what. Its bytes are those of `merge` and `save_base`.

    A sharded base gives a sharded checkpoint, unless the output is named ``*.safetensors``: then it is one file.
    Finished shards wait beside the output in a hidden folder. If a merge is killed, the next merge of the same files
    goes on from them.

    Args:
        base: a base checkpoint, ours or a plain state dict; see `read_base`. A pickle is read into memory whole.
        adapter: an adapter of any dialect, a file or a folder. Adapters of other tools need the whole base in memory.
        output: the safetensors file to make. For a sharded base: a folder, or the index in a folder,
            ``*.safetensors.index.json``; the shards keep their names.
        strength: multiplies the adapter's scale.
        overwrite: replace an existing file, but never an input.
        allow_base_mismatch: accept a base with other values or dtypes, and record that in the file. The base is then
            read twice.
        allow_noop: accept an adapter that changes no weight.
        force: merge an adapter that was merged into the base already, or merge into a base with other adapters in it,
            and record that in the file. The base is then read twice. An adapter made for this very file needs no force.
        exact: false sums in float32, see `Target.fold`; recorded in the file.
        reversible: also write a residue, ``OUTPUT.residue``. With it and the adapter, `unmerge_file` restores the base
            bit for bit; every slice is restored and compared before anything gets its name. Shards of an earlier run
            are not used.
        workers: threads, by default one for each processor, but at most four. The bytes do not depend on it.
        model, model_args: the base's network, where its file does not state it; adapters of other tools need it.
        alpha: of every layer, where an adapter of another tool does not say it.
        progress: called with the bytes done and all bytes to do.

    Raises:
        MissingFileError, FormatError, AdapterError: an input cannot be read, or changes while it is.
        AlreadyMergedError: the base has this adapter in it, or others, and not ``force``.
        BaseMismatchError: the adapter was made for another base.
        OutputExistsError, OutputError: the output cannot be written.
        ConfigError: no weight would change, or there are no workers.
        VerificationError: the written weights are wrong; the file was removed.
    """
    strength = check_strength(strength)
    count = worker_count(workers)
    sharded = _is_sharded_output(output, base)
    if not sharded:
        check_output(output, overwrite=overwrite, inputs=(*checkpoint_files(base), *adapter_files(adapter)))
    checkpoint, headers = (read_base(base), ()) if is_pickle(base) else scan_base(base)
    loaded = load_for(
        adapter,
        checkpoint.for_network(model, model_args),
        alpha=alpha,
        # receipts explain a mismatch, or it is refused below
        allow_base_mismatch=allow_base_mismatch or bool(checkpoint.receipts),
    )
    checkpoint = fitted(checkpoint, loaded.targets)
    forced = check_receipts(
        loaded,
        checkpoint.receipts,
        sha256=checkpoint.document.get("sha256"),
        force=force,
        allow_base_mismatch=allow_base_mismatch,
        names_base=_names_base(adapter),
    )
    plan = MergePlan(
        checkpoint=checkpoint,
        adapter=loaded,
        strength=strength,
        exact=exact,
        headers={header.path.name: header for header in headers},
        shards=merge_plans(checkpoint, headers, loaded),
        inputs=Inputs(),
        workers=count,
        forced=forced,
    )
    with one_thread_each():
        plan.check_headers()
        if allow_base_mismatch or forced or not plan.fits or not headers:
            plan = plan.with_hashed_base(allow_mismatch=allow_base_mismatch)
        files = (*adapter_files(adapter), checkpoint.path, *checkpoint.parts)
        output = Path(output)
        if sharded and not output.exists():  # or it is a link to where the folder is to be
            output = Path(os.path.realpath(output))
        kept: contextlib.AbstractContextManager[ResidueWriter | None] = contextlib.nullcontext()
        if reversible:
            kept = residue_writer(output, strength, overwrite=overwrite, inputs=files)
        with kept as residue:
            keep = None if residue is None else residue.keep
            writer = CheckpointWriter(
                inputs=plan.inputs,
                workers=count,
                progress=counting(progress, sum(each.made_size for each in plan.plans.values())),
                where=f"{str(output)!r}",
                change=Folding(adapter=loaded, strength=strength, exact=exact, keep=keep),
            )
            writing = _Writing(plan, output, files, overwrite, allow_noop, residue, writer)
            return writing.write_shards() if sharded else writing.write_file()


def _is_sharded_output(output: str | os.PathLike[str], base: str | os.PathLike[str]) -> bool:
    name = f"{os.fspath(output)!r}"
    if is_sharded(base):
        return Path(output).suffix != ".safetensors"
    if os.fspath(output).endswith(INDEX_SUFFIX):
        raise OutputError(f"{name} is an index, and the base is one file", hint="name a file, *.safetensors")
    return False


def _names_base(adapter: str | os.PathLike[str]) -> bool:
    """Return True if the adapter's file names its base: ours do, and those that loraio wrote for other tools."""
    found = dialects.identify(adapter)
    document = found.source.header.document() if found.source.header is not None else None
    return found.dialect is None or "exported" in (document or {})


@dataclass(frozen=True, slots=True)
class _Writing:
    """The output of a merge; nothing gets its name before it is proven."""

    plan: MergePlan
    output: Path
    files: tuple[str | os.PathLike[str], ...]
    overwrite: bool
    allow_noop: bool
    residue: ResidueWriter | None
    writer: CheckpointWriter

    def write_file(self) -> MergedFile:
        plan, residue = self.plan, self.residue
        only = None if plan.checkpoint.parts else next(iter(plan.headers.values()), None)
        base = {} if only is None else {"metadata": dict(only.metadata)}

        def metadata(written: Mapping[str, Written]) -> dict[str, str]:
            if residue is not None and written:
                plan.finish_residue(residue, written, **base)
            return document_metadata(
                merged_document(plan, written, residue), plan.plans, written, where=self.writer.where
            )

        with staged(self.output, overwrite=self.overwrite, inputs=self.files) as temporary, plan.explained():
            return self._conclude(self.writer.write(plan.plans, temporary, metadata), self.output)

    def write_shards(self) -> MergedFile:
        """Write the same shards as those of the base, and an index."""
        shards, output = self.plan.shards, self.output
        named = output.name.endswith(INDEX_SUFFIX)
        index = output if named else output / self.plan.checkpoint.path.name
        into, exists = index.parent, named or output.is_dir()
        for file in (*shards, index.name) if exists else ():
            check_output(into / file, overwrite=self.overwrite, inputs=self.files)
        if not exists:
            check_output(into)
        with working_folder(output) as work:
            finished = FinishedShards(work, self._identity())
            try:
                merged = self._fill(work, finished, index)
            except OutputError:  # such as a full disk: keep the finished shards
                raise
            except LoraioError:
                remove_folder(work)
                raise
            finished.forget()
            if exists:
                move_files(work, into, shards, last=index.name, overwrite=self.overwrite)
                remove_folder(work)
            else:
                name_folder(work, into)
        return replace(merged, parts=tuple(into / file for file in shards), reused=finished.reused)

    def _fill(self, work: Path, finished: FinishedShards, index: Path) -> MergedFile:
        """Write all shards and the index into the working folder."""
        plan, written = self.plan, dict[str, Written]()
        for file in plan.shards:
            written |= self._write_shard(work, file, finished)
        with plan.explained():
            plan.check_base(written)
        if self.residue is not None:
            plan.finish_residue(self.residue, written, index=index_text(plan.checkpoint.path))
        merged = self._conclude(written, index)
        with staged(work / index.name, overwrite=True) as temporary:
            temporary.write_bytes(merged_index(plan, written, work, self.residue))
        return merged

    def _write_shard(self, work: Path, file: str, finished: FinishedShards) -> dict[str, Written]:
        """Write one shard, unless an earlier run has finished it."""
        plan, plans = self.plan, self.plan.shards[file]
        source = plan.inputs.signature(plan.checkpoint.path.parent / file)
        found = finished.get(file, source) if self.residue is None else None
        if found is not None:
            self.writer.progress.add(sum(each.made_size for each in plans.values()))
            return found
        with staged(work / file, overwrite=True) as temporary, plan.explained():
            written = self.writer.write(plans, temporary, shard_metadata(plan, file))
        finished.add(file, source, written)
        return written

    def _conclude(self, written: Mapping[str, Written], path: Path) -> MergedFile:
        """Return the result, if everything that was written is right."""
        plan, residue = self.plan, self.residue
        weights, effect = judge(plan, written, allow_noop=self.allow_noop)
        base_bytes = sum(each.size for each in plan.plans.values())
        return MergedFile(
            path=path,
            sha256=plan.merged_sha256(written),
            weights=weights,
            effect=effect,
            receipt=merge_receipt(plan, written, residue),
            residue=None if residue is None else residue.size(weights=weights.values, base_bytes=base_bytes),
            mismatch=plan.mismatch,
            stripped=plan.checkpoint.stripped,
        )

    def _identity(self) -> dict[str, Any]:
        """Return everything that must be the same for a finished shard to be used."""
        plan = self.plan
        return {
            "adapter_sha256": state_sha256(plan.adapter.all_tensors),
            "base_sha256": plan.base_sha256,
            "exact": plan.exact,
            "loraio": __version__,
            "parts": list(plan.shards),
            "strength": plan.strength,
            "stripped": plan.checkpoint.stripped,
            "targets_sha256": hashlib.sha256(repr(sorted(plan.adapter.targets.items())).encode()).hexdigest(),
            "torch": torch.__version__,
        }
