"""Take merges back: write the base of a merged checkpoint again, proven by the digest in the receipt.

Either the base is at hand, and is proven to be the one; or the merge was reversible, and the base is restored from the
merged checkpoint, the adapter and the residue. In both ways the merged checkpoint must be what its receipts left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraio.bases.checkpoints import base_document, is_pickle, scan_base
from loraio.bases.identity import state_sha256
from loraio.bases.receipts import Receipt
from loraio.errors import ConfigError, FormatError, OutputError, VerificationError
from loraio.files.atomic import staged
from loraio.files.copying import Inputs
from loraio.files.folders import staged_folder
from loraio.files.integrity import unsealed
from loraio.files.sharded import INDEX_SUFFIX
from loraio.formats.conversion import load_for
from loraio.merging.checkpoint_writer import CheckpointWriter, Written, document_metadata
from loraio.merging.plans import copy_plans, digests_of, joined
from loraio.merging.unmerge_plan import MergedCheckpoint, UnmergePlan, plan_from_base, plan_from_residue
from loraio.merging.workers import counting, one_thread_each, worker_count


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergedFile:
    """The result of `unmerge_file`.

    Attributes:
        path: the checkpoint; of a sharded one the index.
        sha256: digest of its state dict, as the first receipt taken off names it.
        taken_off: receipts of the merges that were taken back, in the order of the merges.
        left: receipts of the merges that are still in it.
        parts: the shards of a sharded checkpoint; empty for others.
    """

    path: Path
    sha256: str
    taken_off: tuple[Receipt, ...]
    left: tuple[Receipt, ...]
    parts: tuple[Path, ...] = ()


def unmerge_file(
    merged: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    residue: str | os.PathLike[str] | None = None,
    every: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    alpha: int | float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> UnmergedFile:
    """Write a merged checkpoint as it was before its last merge, bit for bit, in memory that does not grow with it.

    With ``base`` its tensors are copied, and must have the digest that the receipt names. With ``adapter`` the base is
    restored from the merged checkpoint and the residue of a reversible merge, and must have the same digest. The output
    has the header of the base's file as far as it is known. A base that the safetensors library or loraio wrote comes
    back with the same bytes.

    Args:
        merged: a checkpoint with receipts, a file or a sharded one.
        output: the file to make, or for a sharded checkpoint a folder or an index, as for `merge_file`.
        base: the checkpoint before the merge.
        adapter: the adapter that was merged into it last.
        residue: residue of that merge; by default ``MERGED.residue``.
        every: take all merges back; with ``base`` only.
        overwrite: replace an existing file, but never an input.
        workers: threads, as for `merge_file`.
        model, model_args, alpha: for an adapter of another tool, as for `merge_file`.
        progress: called with the bytes done and all bytes to do.

    Raises:
        MissingFileError, FormatError, AdapterError: an input cannot be read, or has no receipts, or is another one.
        BaseMismatchError: the base is not the one that the receipt names.
        ConfigError: neither base nor adapter, or both.
        OutputExistsError, OutputError: the output cannot be written.
        VerificationError: the merged checkpoint is not what its receipts left, or the restored base is wrong.
    """
    if (base is None) == (adapter is None):
        raise ConfigError("a merge is taken back with its base, or with its adapter and the residue: one of the two")
    if adapter is None and residue is not None:
        raise ConfigError("a residue is used with the adapter, not with the base")
    if adapter is not None and every:
        raise ConfigError("only with the base are all merges taken back at once", hint="the last adapter first")
    count, inputs = worker_count(workers), Inputs()
    now = _read_merged(merged, every=every)
    with one_thread_each():
        if base is not None:
            plan = plan_from_base(now, base)
        else:
            loaded = load_for(
                adapter or "",
                now.checkpoint.for_network(model, model_args),
                alpha=alpha,
                allow_base_mismatch=True,  # it is made for the base, which is not here yet
            )
            plan = plan_from_residue(now, loaded, path=merged, residue=residue, inputs=inputs, workers=count)
        named = [file for file in (merged, base, adapter) if file is not None]
        files = (*named, now.checkpoint.path, *now.checkpoint.parts, *plan.files)
        writer = CheckpointWriter(
            inputs=inputs,
            workers=count,
            progress=counting(progress, sum(each.size for each in joined(plan.shards).values())),
            where=f"{str(Path(output))!r}",
            change=plan.change,
        )
        return _Writing(now, plan, files, overwrite, writer).write(Path(output))


def _read_merged(path: str | os.PathLike[str], *, every: bool) -> MergedCheckpoint:
    """Read the headers of a merged checkpoint; raise FormatError if it has no receipts."""
    if is_pickle(path):
        raise FormatError(f"{os.fspath(path)!r} is a pickle, which has no receipts")
    checkpoint, headers = scan_base(path)
    receipts = checkpoint.receipts
    if not receipts:
        raise FormatError(
            f"{os.fspath(path)!r} has no receipts: loraio has merged nothing into it", hint="loraio inspect FILE"
        )
    return MergedCheckpoint(
        checkpoint=checkpoint,
        receipts=receipts,
        first=0 if every else len(receipts) - 1,
        shards=copy_plans(checkpoint, headers),
        metadata={header.path.name: header.metadata for header in headers},
    )


@dataclass(frozen=True, slots=True)
class _Writing:
    """The output of an unmerge; nothing gets its name before it is proven."""

    merged: MergedCheckpoint
    plan: UnmergePlan
    files: tuple[str | os.PathLike[str], ...]
    overwrite: bool
    writer: CheckpointWriter

    def write(self, output: Path) -> UnmergedFile:
        """Write one file, or as many as the base has."""
        is_index = output.name.endswith(INDEX_SUFFIX)
        if self.plan.checkpoint.parts and output.suffix != ".safetensors":
            return self._write_shards(output if is_index else output / self.plan.checkpoint.path.name)
        if is_index:
            raise OutputError(f"{str(output)!r} is an index, and this is one file", hint="name a file, *.safetensors")
        return self._write_file(output)

    def _write_file(self, output: Path) -> UnmergedFile:
        plans = joined(self.plan.shards)
        (file, *more) = self.plan.shards
        kept = None if more else self.plan.metadata.get(file)

        def metadata(written: Mapping[str, Written]) -> Mapping[str, str]:
            if kept is not None:
                return _copied(kept)
            return document_metadata(self._document(), plans, written, where=self.writer.where)

        prefix = self.plan.checkpoint.stripped if kept is not None else ""
        with staged(output, overwrite=self.overwrite, inputs=self.files) as temporary:
            return self._conclude(self.writer.write(plans, temporary, metadata, prefix=prefix), output)

    def _write_shards(self, index: Path) -> UnmergedFile:
        plan, into = self.plan, index.parent
        names, written = [*plan.shards, index.name], dict[str, Written]()
        with staged_folder(into, names, last=index.name, overwrite=self.overwrite, inputs=self.files) as work:
            for file, plans in plan.shards.items():
                (work / file).touch()
                metadata = partial(_copied, plan.metadata[file])
                written |= self.writer.write(plans, work / file, metadata, prefix=plan.checkpoint.stripped)
            done = self._conclude(written, index)
            (work / index.name).write_bytes((plan.index or "").encode("utf-8"))
        return replace(done, parts=tuple(into / file for file in plan.shards))

    def _conclude(self, written: Mapping[str, Written], path: Path) -> UnmergedFile:
        """Return the result, if the checkpoint is what its receipts left and the output is the base."""
        plan, merged = self.plan, self.merged
        after = {name: tensor.sha256 for name, tensor in written.items()}
        digest = state_sha256(plan.checkpoint.state, after)
        if plan.change is None and digest != merged.base_sha256:
            raise plan.wrong(digest)
        before = after if plan.change is None else plan.change.residue.tensors
        problems = merged.problems(self._merged_digests(written), before)
        if problems:
            raise VerificationError(
                "the merged checkpoint is not what its receipts left; nothing was written",
                problems=problems,
                where=f"{str(merged.checkpoint.path)!r}",
            )
        if plan.change is not None:
            plan.change.finish()
        if digest != merged.base_sha256:
            raise plan.wrong(digest)
        self.writer.inputs.check()
        return UnmergedFile(
            path=path, sha256=digest, taken_off=merged.receipts[merged.first :], left=merged.receipts[: merged.first]
        )

    def _merged_digests(self, written: Mapping[str, Written]) -> dict[str, str]:
        """Return the digest of each tensor of the merged checkpoint; those that were not read yet are read now."""
        plans, change, read = self.merged.plans, self.plan.change, dict[str, str]()
        if change is not None:
            read = {name: one.source_sha256 for name, one in written.items() if name not in change.adapter.whole}
        rest = {name: plan for name, plan in plans.items() if name not in read}
        read |= digests_of(rest, self.writer.inputs, workers=self.writer.workers)
        return {name: read[name] for name in plans}

    def _document(self) -> dict[str, Any]:
        """Return the document of a base whose own header is not known."""
        base, merged, first = self.plan.checkpoint, self.merged.checkpoint, self.merged.first
        named = base if base.network else merged
        return base_document(
            self.merged.base_sha256,
            network=named.network,
            network_args=named.network_args,
            heads=base.heads,
            **({"merged": merged.document["merged"][:first]} if first else {}),
        )


def _copied(metadata: Mapping[str, str], _: object = None) -> dict[str, str]:
    return {key: unsealed(text) for key, text in metadata.items()}
