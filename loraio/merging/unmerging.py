"""Merges taken back: a merged checkpoint gives its base again, proven by the digest in the receipt.

Either the base is there, and it is proven to be the one; or the merge was reversible, and the base is made anew from
the merged checkpoint, the adapter and the residue. Both ways the merged checkpoint must be what its receipts left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loraio.adapter import Adapter
from loraio.bases.checkpoints import BaseCheckpoint, base_document, fitted, is_pickle, read_base, scan_base
from loraio.bases.identity import state_sha256
from loraio.bases.receipts import Receipt
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FormatError,
    MissingFileError,
    OutputError,
    VerificationError,
)
from loraio.files import tensorfile
from loraio.files.atomic import staged
from loraio.files.copying import Inputs, Progress, Stored
from loraio.files.folders import staged_folder
from loraio.files.integrity import PENDING, unsealed
from loraio.files.sharded import INDEX_SUFFIX
from loraio.files.tensorfile import Header
from loraio.files.tensors import TORCH_DTYPES, dtype_code
from loraio.formats.conversion import load_for
from loraio.merging.checkpoint_writer import (
    TensorPlan,
    Written,
    counting,
    digests_of,
    one_thread_each,
    worker_count,
    write_tensors,
)
from loraio.merging.residue_files import ResidueFile, Unfolding, digest_of, index_text, read_residue, residue_beside

Groups = Mapping[str, Mapping[str, TensorPlan]]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergedFile:
    """What `unmerge_file` wrote.

    Attributes:
        path: the checkpoint; of a parted one the index.
        sha256: digest of its state dict, which is what the first receipt taken off says of its base.
        taken_off: receipts of the merges that were taken back, in the order in which they had been made.
        left: receipts of the merges that are still in it.
        parts: the files of a parted checkpoint; empty for others.
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
    """Write what a merged checkpoint was before its last merge, bit for bit; in memory that does not grow with it.

    With ``base`` its tensors are copied, and must have the digest that the receipt names. With ``adapter`` they are
    made from the merged checkpoint and the residue of a reversible merge, and must have it too. The output has the
    header of the base's file as far as that is known: of a file that the safetensors library or loraio wrote, the same
    bytes.

    Args:
        merged: a checkpoint with receipts, a file or a parted one.
        output: the file to make, or for a parted checkpoint a folder or an index, as for `merge_file`.
        base: what it was before.
        adapter: what was merged into it last.
        residue: of that merge; by default ``MERGED.residue``.
        every: take all merges back; with ``base`` only.
        overwrite: replace an existing file, but never an input.
        workers: threads, as for `merge_file`.
        model, model_args, alpha: for an adapter of another tool, as for `merge_file`.
        progress: called with the bytes that are done, and all that are to do.

    Raises:
        MissingFileError, FormatError, AdapterError: an input cannot be read, or has no receipts, or is another one.
        BaseMismatchError: the base is not what the receipt names.
        ConfigError: neither base nor adapter, or both.
        OutputExistsError, OutputError: the output cannot be written.
        VerificationError: the merged checkpoint is not what its receipts left, or the base does not come out.
    """
    if (base is None) == (adapter is None):
        raise ConfigError("a merge is taken back with its base, or with its adapter and the residue: one of the two")
    if adapter is None and residue is not None:
        raise ConfigError("a residue is used with the adapter, not with the base")
    if adapter is not None and every:
        raise ConfigError("only with the base are all merges taken back at once", hint="the last adapter first")
    count = worker_count(workers)
    if is_pickle(merged):
        raise FormatError(f"{os.fspath(merged)!r} is a pickle, which has no receipts")
    checkpoint, headers = scan_base(merged)
    checkpoint = checkpoint.for_network(model, model_args)
    receipts = checkpoint.receipts
    if not receipts:
        raise FormatError(
            f"{os.fspath(merged)!r} has no receipts: loraio has merged nothing into it", hint="loraio inspect FILE"
        )
    inputs = Inputs()
    first = 0 if every else len(receipts) - 1
    now = _Merged(
        checkpoint=checkpoint,
        receipts=receipts,
        first=first,
        groups=_groups(checkpoint, headers),
        metadata={header.path.name: header.metadata for header in headers},
    )
    with one_thread_each():
        if base is not None:
            job = _from_base(now, base)
        else:
            loaded = load_for(
                adapter or "",
                checkpoint,
                alpha=alpha,
                allow_base_mismatch=True,  # it is made for what comes out
            )
            job = _from_residue(now, loaded, merged, residue, inputs, count)
        files = [file for file in (merged, base, adapter, checkpoint.path, *checkpoint.parts) if file is not None]
        return _Writing(
            merged=now,
            job=job,
            inputs=inputs,
            files=(*files, *job.files),
            overwrite=overwrite,
            workers=count,
            report=progress,
        ).write(Path(output))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    """The merged checkpoint, and which of its receipts is the first to be taken off."""

    checkpoint: BaseCheckpoint
    receipts: tuple[Receipt, ...]
    first: int
    groups: Groups
    metadata: Mapping[str, Mapping[str, str]]

    @property
    def plans(self) -> dict[str, TensorPlan]:
        """Of all tensors."""
        return _joined(self.groups)

    @property
    def base_sha256(self) -> str:
        """What is to come out."""
        return self.receipts[self.first].base_sha256

    @property
    def named(self) -> str:
        """The receipt, for messages."""
        return f"receipt {self.first + 1} of {len(self.receipts)}"

    def problems(self, found: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
        """How it is not what its receipts left.

        Args:
            found: digest of each of its tensors.
            before: of each tensor of the base.
        """
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
class _Job:
    """Where the base comes from.

    Attributes:
        checkpoint: the base without values, or as far as it is known.
        groups: what its tensors are made of, by file.
        metadata: of each file's header; of one without an entry it is ours.
        index: of a parted base.
        wrong: the error where the digest is another.
        change: what makes those that are not copied; None where the base is there.
        originals: names of the tensors that the residue holds as they were.
        known: digest of each tensor of the base, as the residue says.
        files: that are read.
    """

    checkpoint: BaseCheckpoint
    groups: Groups
    metadata: Mapping[str, Mapping[str, str]]
    index: str | None
    wrong: Callable[[str], Exception]
    change: Unfolding | None = None
    originals: frozenset[str] = frozenset()
    known: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str | os.PathLike[str], ...] = ()


def _copied(metadata: Mapping[str, str], _: object = None) -> dict[str, str]:
    """The strings of a header for a copy of its file."""
    return {key: unsealed(text) for key, text in metadata.items()}


def _joined(groups: Groups) -> dict[str, TensorPlan]:
    return {name: plan for group in groups.values() for name, plan in group.items()}


def _groups(checkpoint: BaseCheckpoint, headers: tuple[Header, ...]) -> dict[str, dict[str, TensorPlan]]:
    """All tensors of a checkpoint, copied, by the file that they are in."""
    groups: dict[str, dict[str, TensorPlan]] = {}
    for header in headers:
        start = 8 + header.header_bytes
        groups[header.path.name] = {
            name.removeprefix(checkpoint.stripped): TensorPlan(
                dtype=info.dtype,
                shape=info.shape,
                source=Stored(path=header.path, begin=start + info.begin, size=info.end - info.begin),
            )
            for name, info in header.tensors.items()
        }
    return groups


def _from_base(merged: _Merged, path: str | os.PathLike[str]) -> _Job:
    checkpoint, headers = (read_base(path), ()) if is_pickle(path) else scan_base(path)
    checkpoint = fitted(checkpoint, merged.checkpoint.state)
    if headers:
        groups = _groups(checkpoint, headers)
    else:
        tensors = checkpoint.state.items()
        groups = {
            "": {n: TensorPlan(dtype=dtype_code(t.dtype), shape=tuple(t.shape), source=t) for n, t in tensors}
        }  # fmt: skip

    def wrong(found: str) -> Exception:
        bases = [number for number, one in enumerate(merged.receipts, 1) if one.base_sha256 == found]
        return BaseMismatchError(
            f"the base has the digest {found[:12]}.., {merged.named} was merged into {merged.base_sha256[:12]}..",
            where=f"{os.fspath(path)!r}",
            hint="--all takes all merges back" if bases == [1] else None,
        )

    return _Job(
        checkpoint=checkpoint,
        groups=groups,
        metadata={header.path.name: header.metadata for header in headers},
        index=index_text(checkpoint.path) if checkpoint.parts else None,
        wrong=wrong,
        files=(checkpoint.path, *checkpoint.parts),
    )


def _from_residue(
    merged: _Merged,
    adapter: Adapter,
    path: str | os.PathLike[str],
    residue: str | os.PathLike[str] | None,
    inputs: Inputs,
    workers: int,
) -> _Job:
    last = merged.receipts[-1]
    own = state_sha256(adapter.all_tensors)
    if own != last.adapter_sha256:
        earlier = [number for number, one in enumerate(merged.receipts, 1) if one.adapter_sha256 == own]
        raise AdapterError(
            f"adapter {own[:12]}.. is not that of {merged.named}, {last.adapter_sha256[:12]}.."
            + (f", but that of receipt {earlier[-1]}" if earlier else ""),
            hint="the last adapter first" if earlier else "loraio inspect shows which adapter it was",
        )
    if last.residue_sha256 is None:
        raise FormatError(
            f"{merged.named} has no residue: it was not merged with --reversible",
            where=f"{os.fspath(path)!r}",
            hint="--base BASE (base= in Python)",
        )
    found = read_residue(residue if residue is not None else _find_residue(merged.checkpoint, Path(path)))
    _check_residue(found, merged, adapter, inputs, workers)
    groups = {
        file: {
            name: TensorPlan(
                dtype=plan.dtype,
                shape=plan.shape if name not in adapter.whole else found.header.tensors[name].shape,
                source=plan.source if name not in adapter.whole else found.place(name),
                folded=name in adapter.targets,
            )
            for name, plan in group.items()
        }
        for file, group in merged.groups.items()
    }
    single = next(iter(groups))
    metadata = {} if found.metadata is None else {single: found.metadata}
    if merged.checkpoint.parts:
        metadata = dict(merged.metadata)
    kept = found.metadata is not None or found.index is not None
    state = dict(merged.checkpoint.state)
    for name in adapter.whole:
        info = found.header.tensors[name]
        state[name] = torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]), device="meta")
    heads = {name: count for name, count in merged.checkpoint.heads.items() if name not in adapter.heads}
    heads |= {name: count for name, count in adapter.base.heads.items() if name in adapter.heads}
    return _Job(
        checkpoint=BaseCheckpoint(
            path=merged.checkpoint.path,
            state=state,
            network=merged.checkpoint.network,
            network_args=merged.checkpoint.network_args,
            heads=heads,
            stripped=found.stripped if kept else "",
            parts=merged.checkpoint.parts,
        ),
        groups=groups,
        change=Unfolding(adapter, found, inputs),
        metadata=metadata,
        index=found.index,
        wrong=lambda digest: VerificationError(
            f"what comes out has the digest {digest[:12]}.., {merged.named} names {merged.base_sha256[:12]}..; "
            "nothing was written"
        ),
        originals=frozenset(adapter.whole),
        known=found.tensors,
        files=(found.header.path,),
    )


def _find_residue(checkpoint: BaseCheckpoint, path: Path) -> Path:
    """The residue, if nobody has moved it."""
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


def _check_residue(residue: ResidueFile, merged: _Merged, adapter: Adapter, inputs: Inputs, workers: int) -> None:
    """It must be that of the last receipt, to the byte."""
    last, where = merged.receipts[-1], f"{str(residue.header.path)!r}"
    tensors = residue.header.tensors
    plans = {
        name: TensorPlan(dtype=info.dtype, shape=info.shape, source=residue.place(name))
        for name, info in tensors.items()
    }  # fmt: skip
    unknown = [name for name, info in tensors.items() if info.dtype not in TORCH_DTYPES]
    found = None
    if not unknown:
        known = digests_of(plans, inputs, workers=workers, progress=Progress())
        found = digest_of({name: (info.dtype, info.shape) for name, info in tensors.items()}, known)
    if found != last.residue_sha256:
        raise FormatError(
            f"the residue is not that of {merged.named}, or it is damaged: "
            f"its digest is {str(found)[:12]}.., not {str(last.residue_sha256)[:12]}..",
            where=where,
        )
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
    missing = sorted((adapter.targets.keys() | adapter.whole.keys()) - tensors.keys())
    problems += [f"{name!r} is missing" for name in missing]
    problems += [f"{name!r} is not in the checkpoint" for name in sorted(residue.tensors.keys() ^ merged.plans.keys())]
    for name, whole in adapter.whole.items():
        if name in tensors and name in merged.plans:
            made = (merged.plans[name].dtype, whole.base_shape)
            if (tensors[name].dtype, tensors[name].shape) != made:
                problems.append(
                    f"{name!r} is {tensors[name].dtype} {tensors[name].shape}, it must be {made[0]} {made[1]}"
                )
    for name, target in adapter.targets.items():
        if name in merged.plans and merged.plans[name].shape != target.shape:
            problems.append(f"{name!r} is {merged.plans[name].shape} in the checkpoint, the adapter has {target.shape}")
    if merged.checkpoint.parts and residue.index is None:
        problems.append("it is of a merge into one file, and the checkpoint is in parts")
    if problems:
        raise FormatError("the residue does not belong to this checkpoint", problems=problems, where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writing:
    """The base is written, and nothing gets its name before it is proven."""

    merged: _Merged
    job: _Job
    inputs: Inputs
    files: tuple[str | os.PathLike[str], ...]
    overwrite: bool
    workers: int
    report: Callable[[int, int], None] | None

    def write(self, output: Path) -> UnmergedFile:
        """In one file, or in as many as the base has."""
        if not self.job.checkpoint.parts or output.suffix == ".safetensors":
            if output.name.endswith(INDEX_SUFFIX):
                raise OutputError(
                    f"{str(output)!r} is an index, and this is one file", hint="name a file, *.safetensors"
                )
            return self._single(output)
        return self._parts(output)

    def _single(self, output: Path) -> UnmergedFile:
        plans = _joined(self.job.groups)
        (file, *more) = self.job.groups
        kept = None if more else self.job.metadata.get(file)

        def metadata(written: Mapping[str, Written]) -> Mapping[str, str]:
            if kept is not None:
                return _copied(kept)
            facts = {name: plan.made for name, plan in plans.items()}
            digests = {name: tensor.sha256 for name, tensor in written.items()} or dict.fromkeys(plans, PENDING)
            return tensorfile.metadata_of(self._document(), facts, digests.__getitem__, where=f"{str(output)!r}")

        prefix = self.job.checkpoint.stripped if kept is not None else ""
        with staged(output, overwrite=self.overwrite, inputs=self.files) as temporary:
            written = self._write(plans, temporary, metadata, self._progress(), output, prefix)
            return self._conclude(written, output)

    def _parts(self, output: Path) -> UnmergedFile:
        index = output if output.name.endswith(INDEX_SUFFIX) else output / self.job.checkpoint.path.name
        into, names = index.parent, [*self.job.groups, index.name]
        with staged_folder(into, names, last=index.name, overwrite=self.overwrite, inputs=self.files) as work:
            progress, prefix = self._progress(), self.job.checkpoint.stripped
            everything: dict[str, Written] = {}
            for file, plans in self.job.groups.items():
                (work / file).touch()
                metadata = partial(_copied, self.job.metadata[file])
                everything |= self._write(plans, work / file, metadata, progress, output, prefix)
            done = self._conclude(everything, index)
            (work / index.name).write_bytes((self.job.index or "").encode("utf-8"))
        return replace(done, parts=tuple(into / file for file in self.job.groups))

    def _write(
        self,
        plans: Mapping[str, TensorPlan],
        path: Path,
        metadata: Callable[[Mapping[str, Written]], Mapping[str, str]],
        progress: Progress,
        output: Path,
        prefix: str,
    ) -> dict[str, Written]:
        return write_tensors(
            plans,
            path,
            metadata=metadata,
            change=self.job.change,
            inputs=self.inputs,
            workers=self.workers,
            progress=progress,
            where=f"{str(output)!r}",
            prefix=prefix,
        )

    def _conclude(self, written: Mapping[str, Written], path: Path) -> UnmergedFile:
        """The result, if the merged checkpoint is what its receipts left and what was written is the base."""
        plans, change = self.merged.plans, self.job.change
        after = {name: tensor.sha256 for name, tensor in written.items()}
        digest = state_sha256(self.job.checkpoint.state, after)
        if change is None and digest != self.merged.base_sha256:
            raise self.job.wrong(digest)
        read = {} if change is None else {n: w.source_sha256 for n, w in written.items() if n not in self.job.originals}
        rest = {name: plan for name, plan in plans.items() if name not in read}
        read |= digests_of(rest, self.inputs, workers=self.workers, progress=Progress())
        problems = self.merged.problems({name: read[name] for name in plans}, self.job.known or after)
        if problems:
            raise VerificationError(
                "the merged checkpoint is not what its receipts left; nothing was written",
                problems=problems,
                where=f"{str(self.merged.checkpoint.path)!r}",
            )
        if change is not None:
            change.finish()
        if digest != self.merged.base_sha256:
            raise self.job.wrong(digest)
        self.inputs.check()
        return UnmergedFile(
            path=path,
            sha256=digest,
            taken_off=self.merged.receipts[self.merged.first :],
            left=self.merged.receipts[: self.merged.first],
        )

    def _document(self) -> dict[str, Any]:
        """What is said of a base of which nothing else is known."""
        base, merged = self.job.checkpoint, self.merged.checkpoint
        entries: dict[str, Any] = {}
        if self.merged.first:
            entries["merged"] = merged.document["merged"][: self.merged.first]
        named = base if base.network else merged
        return base_document(
            self.merged.base_sha256,
            network=named.network,
            network_args=named.network_args,
            heads=base.heads,
            **entries,
        )

    def _progress(self) -> Progress:
        return counting(self.report, sum(plan.size for plan in _joined(self.job.groups).values()))
