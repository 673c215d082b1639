"""Merge on files: a base checkpoint and an adapter give a merged checkpoint, proven before it gets its name.

The base is read once and never held in memory. While an untouched tensor is copied, what was written is hashed; the
digest of a target is taken from the bytes that are folded. Together they are the digest of the base, which must be the
one that the adapter names: the proof that this is the adapter's base is also the proof that it was copied right. Only
where another base is allowed, it is hashed before, and each tensor must then have that digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.bases.checkpoints import BaseCheckpoint, base_document, fitted, is_pickle, read_base, scan_base
from loraio.bases.identity import check_base, state_sha256
from loraio.bases.merge_checks import check_receipts, check_state
from loraio.bases.receipts import Receipt, made_receipt
from loraio.errors import ConfigError, LoraioError, OutputError, VerificationError
from loraio.files import tensorfile
from loraio.files.atomic import check_output, staged
from loraio.files.copying import Inputs, Progress, Stored, changed
from loraio.files.folders import move_files, name_folder, remove_folder, working_folder
from loraio.files.integrity import PENDING, seal, with_integrity
from loraio.files.sharded import INDEX_SUFFIX, checkpoint_files, is_sharded, read_sharded_header
from loraio.files.temporaries import owned_file
from loraio.files.tensorfile import Header
from loraio.files.tensors import TORCH_DTYPES, dtype_code, tensor_sha256
from loraio.formats import dialects
from loraio.formats.conversion import load_for
from loraio.formats.sources import adapter_files
from loraio.merging.checkpoint_writer import (
    Fold,
    Folding,
    SourceDiffersError,
    TensorPlan,
    Written,
    counting,
    digests_of,
    one_thread_each,
    read_source,
    worker_count,
    write_tensors,
)
from loraio.merging.effect import MergeEffect
from loraio.merging.finished_shards import FinishedShards
from loraio.merging.residue_files import Residue, ResidueWriter, index_text, residue_beside
from loraio.merging.weight_check import FoldCheck, WeightReport
from loraio.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedFile:
    """What `merge_file` wrote.

    Attributes:
        path: the merged checkpoint; of a parted one the index.
        sha256: digest of its state dict.
        stripped: what stood before every name of the base and was taken off; empty for most files.
        weights: the evidence, taken from the file itself.
        effect: how much the adapter changed the weights.
        receipt: what the checkpoint says of this merge.
        residue: what was kept to take it back; None unless the merge is reversible.
        mismatch: how the base differs from the adapter's own, where that was allowed.
        parts: the files of a parted checkpoint; empty for others.
        reused: how many of them an earlier run had finished, which was killed.
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
    """Write the base with the adapter folded in; `merge` for files, in memory that does not grow with them.

    Tensors that are no targets are copied from file to file, targets are folded one at a time. What was written is
    read again and compared, the weights with the reference of `verify`; only then does the file get its name. The new
    checkpoint says what was merged into what, and its bytes are those of `merge` and `save_base`.

    A parted base gives a parted checkpoint, unless the output is named ``*.safetensors``: then it is one file. Parts
    that are finished are kept beside the output, in a hidden folder, until all of them are; a merge of the same files
    that follows one that was killed goes on from them.

    Args:
        base: a base checkpoint, ours or a plain state dict; see `read_base`. A pickle is read into memory whole.
        adapter: an adapter of any dialect, a file or a folder. For those of other tools the base is read whole.
        output: the safetensors file to make. Of a parted base: a folder, or the index in a folder,
            ``*.safetensors.index.json``; the parts keep their names.
        strength: multiplies the adapter's scale.
        overwrite: replace an existing file, but never an input.
        allow_base_mismatch: go on where values or dtypes of the base are others; recorded in the file. The base is
            then read twice.
        allow_noop: go on where no weight changes.
        force: merge an adapter that was merged into the base already, or one into a base in which others are; recorded
            in the file. The base is then read twice. An adapter that was made for this very file needs none of it.
        exact: false sums in float32, see `Target.fold`; recorded in the file.
        reversible: also write a residue, ``OUTPUT.residue``, from which `unmerge_file` with the adapter gives the base
            back bit for bit; every slice is restored and compared before anything gets its name. Parts of an earlier
            run are then not used.
        workers: threads, by default one for each processor, but at most four. The bytes do not depend on it.
        model, model_args: the base's network, where its file does not state it; adapters of other tools need it.
        alpha: of every layer, where an adapter of another tool does not say it.
        progress: called with the bytes that are done, and all that are to do.

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
    parted = _is_parted_output(output, base)
    if not parted:
        check_output(output, overwrite=overwrite, inputs=(*checkpoint_files(base), *adapter_files(adapter)))
    checkpoint, headers = (read_base(base), ()) if is_pickle(base) else scan_base(base)
    loaded = load_for(
        adapter,
        checkpoint.for_network(model, model_args),
        alpha=alpha,
        allow_base_mismatch=allow_base_mismatch
        or bool(checkpoint.receipts),  # which explain it, or it is refused below
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
    job = _Merge(
        checkpoint=checkpoint,
        adapter=loaded,
        strength=strength,
        overwrite=overwrite,
        allow_noop=allow_noop,
        exact=exact,
        reversible=reversible,
        workers=count,
        inputs=Inputs(),
        files=(*adapter_files(adapter), checkpoint.path, *checkpoint.parts),
        groups=_groups(checkpoint, headers, loaded),
        metadata={header.path.name: header.metadata for header in headers},
        documents={header.path.name: header.document() for header in headers},
        report=progress,
        forced=forced,
    )
    with one_thread_each():
        job.check_headers(headers)
        if allow_base_mismatch or forced or not job.fits or not headers:
            job = job.hashed(allow_base_mismatch)
        return job.write_parts(Path(output)) if parted else job.write_file(Path(output))


def _is_parted_output(output: str | os.PathLike[str], base: str | os.PathLike[str]) -> bool:
    name = f"{os.fspath(output)!r}"
    if is_sharded(base):
        return Path(output).suffix != ".safetensors"
    if os.fspath(output).endswith(INDEX_SUFFIX):
        raise OutputError(f"{name} is an index, and the base is one file", hint="name a file, *.safetensors")
    return False


def _names_base(adapter: str | os.PathLike[str]) -> bool:
    """Whether the adapter's file says which base it is for: ours do, and those that loraio wrote for other tools."""
    found = dialects.identify(adapter)
    document = found.source.header.document() if found.source.header is not None else None
    return found.dialect is None or "exported" in (document or {})


def _groups(
    checkpoint: BaseCheckpoint, headers: tuple[Header, ...], adapter: Adapter
) -> dict[str, dict[str, TensorPlan]]:
    """What becomes of every tensor, by the file that it is in; a pickle's have none."""
    if not headers:
        plans = {
            name: TensorPlan(
                dtype=dtype_code(tensor.dtype),
                shape=tuple(tensor.shape),
                source=tensor,
                folded=name in adapter.targets,
                given=_given(adapter, name, dtype_code(tensor.dtype)),
            )
            for name, tensor in checkpoint.state.items()
        }
        return {"": plans}
    groups: dict[str, dict[str, TensorPlan]] = {}
    for header in headers:
        start = header.file_bytes - max((info.end for info in header.tensors.values()), default=0)
        mine = groups.setdefault(header.path.name, {})
        for full, info in header.tensors.items():
            name = full.removeprefix(checkpoint.stripped)
            target = adapter.targets.get(name)
            mine[name] = TensorPlan(
                dtype=info.dtype,
                shape=info.shape,
                source=Stored(path=header.path, begin=start + info.begin, size=info.end - info.begin),
                folded=target is not None,
                given=_given(adapter, name, info.dtype),
                expected=target.base_sha256 if target else None,
            )
    return groups


def _given(adapter: Adapter, name: str, dtype: str) -> Tensor | None:
    """What the adapter replaces a tensor by, in the dtype of the base's."""
    if name not in adapter.whole:
        return None
    return adapter.replace(name, torch.empty(0, dtype=getattr(torch, TORCH_DTYPES[dtype])))


class _Values(Mapping[str, Tensor]):
    """A state dict with values only where a weight differs from the adapter's, to say how."""

    def __init__(self, job: _Merge, known: Mapping[str, str]) -> None:
        self._job = job
        self._known = known

    def __getitem__(self, name: str) -> Tensor:
        described = self._job.checkpoint.state[name]
        target = self._job.adapter.targets.get(name)
        if target is None or self._known.get(name) == target.base_sha256:
            return described
        raw = read_source(self._job.plans[name], self._job.inputs)
        return raw.view(described.dtype).view(described.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._job.checkpoint.state)

    def __len__(self) -> int:
        return len(self._job.checkpoint.state)


@dataclass(slots=True, kw_only=True)
class _Kept:
    """The residue of a merge that is going on; ``sha256`` is known when it is finished."""

    path: Path
    temporary: Path
    writer: ResidueWriter
    sha256: str = PENDING

    def finish(self, merge: _Merge, written: Mapping[str, Written], base: Mapping[str, Any]) -> None:
        """Write it; ``base`` is what of the base's file is not in its tensors."""
        document = {
            "adapter_sha256": state_sha256(merge.adapter.all_tensors),
            "base_sha256": merge.base_sha256 or merge.adapter.base.sha256,
            "merged_sha256": merge._sha256(written),
            "strength": merge.strength,
            "tensors": {name: tensor.source_sha256 for name, tensor in written.items()},
            "stripped": merge.checkpoint.stripped,
            **base,
        }
        originals = {name: merge.plans[name] for name in merge.adapter.whole}
        where = f"{str(self.path)!r}"
        self.sha256 = self.writer.write(self.temporary, originals, document, inputs=merge.inputs, where=where)

    def size(self, weights: int, base_bytes: int) -> Residue:
        """How large it is."""
        size, coded = self.writer.file_bytes, self.writer.coded
        return Residue(path=self.path, bytes=size, weights=weights, coded=coded, share=size / base_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """One merge; ``mismatch`` and ``base_sha256`` are set where the base was hashed before."""

    checkpoint: BaseCheckpoint
    adapter: Adapter
    strength: float
    overwrite: bool
    allow_noop: bool
    exact: bool
    reversible: bool
    workers: int
    inputs: Inputs
    files: tuple[str | os.PathLike[str], ...]
    groups: Mapping[str, Mapping[str, TensorPlan]]
    metadata: Mapping[str, Mapping[str, str]]
    documents: Mapping[str, dict[str, Any] | None]
    report: Callable[[int, int], None] | None
    forced: tuple[str, ...] = ()
    mismatch: tuple[str, ...] = ()
    base_sha256: str | None = None

    @property
    def plans(self) -> dict[str, TensorPlan]:
        """All of them."""
        return {name: plan for group in self.groups.values() for name, plan in group.items()}

    @property
    def fits(self) -> bool:
        """Whether the base looks like the adapter's own, as far as names, shapes and dtypes go."""
        plans = self.plans
        needed = {name: (target.shape, target.dtype) for name, target in self.adapter.targets.items()}
        needed |= {name: (whole.base_shape, whole.dtype) for name, whole in self.adapter.whole.items()}
        return all(name in plans and (plans[name].shape, plans[name].dtype) == fact for name, fact in needed.items())

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter changes."""
        return (*self.adapter.targets, *self.adapter.whole)

    def check_headers(self, headers: Sequence[Header]) -> None:
        """From here on the files must not change; say so if they have since their headers were read."""
        for header in headers:
            self.inputs.signature(header.path)
            now = tensorfile.read_header(header.path)
            if (now.sha256, now.file_bytes) != (header.sha256, header.file_bytes):
                raise changed(header.path)

    def hashed(self, allow_mismatch: bool) -> _Merge:
        """The same merge, of a base whose digests are known and have been compared with the adapter's."""
        plans = self.plans
        wanted = (
            plans if self.fits or allow_mismatch or self.forced else {n: plans[n] for n in self.changed if n in plans}
        )
        known = digests_of(wanted, self.inputs, workers=self.workers, progress=Progress())
        mismatch = check_state(
            self.adapter,
            _Values(self, known),
            self.checkpoint.receipts if self.forced else (),
            known=known,
            allow_base_mismatch=allow_mismatch,
            stated_sha256=self.checkpoint.document.get("sha256"),
        )
        return replace(
            self,
            mismatch=mismatch,
            base_sha256=state_sha256(self.checkpoint.state, known),
            groups={
                file: {name: replace(plan, expected=known[name]) for name, plan in group.items()}
                for file, group in self.groups.items()
            },
        )

    def write_file(self, output: Path) -> MergedFile:
        """One file."""
        plans, progress = self.plans, self._progress()

        def metadata(written: Mapping[str, Written]) -> dict[str, str]:
            if kept is not None and written:
                kept.finish(self, written, self._header_metadata())
            facts = {name: plan.made for name, plan in plans.items()}
            digests = {name: tensor.sha256 for name, tensor in written.items()} or dict.fromkeys(plans, PENDING)
            document = self._document(written, kept)
            return tensorfile.metadata_of(document, facts, digests.__getitem__, where=f"{str(output)!r}")

        with (
            self._kept(output) as kept,
            staged(output, overwrite=self.overwrite, inputs=self.files) as temporary,
            self._explained(),
        ):
            written = self._write(plans, temporary, metadata, progress, output, kept)
            merged = self._conclude(written, output, kept)
        return merged

    def write_parts(self, output: Path) -> MergedFile:
        """The same parts as those of the base, and an index."""
        if not output.exists():  # or it is a link to where the folder is to be
            output = Path(os.path.realpath(output))
        named = output.name.endswith(INDEX_SUFFIX)
        index = output if named else output / self.checkpoint.path.name
        into, there = index.parent, named or output.is_dir()
        files = [*self.groups, index.name]
        if there:
            for file in files:
                check_output(into / file, overwrite=self.overwrite, inputs=self.files)
        else:
            check_output(into)
        with self._kept(output) as kept, working_folder(output) as work:
            try:
                finished = FinishedShards(work, self._identity())
                written = self._parts(work, finished, output, kept)
                if kept is not None:
                    kept.finish(self, written, {"index": index_text(self.checkpoint.path)})
                merged = self._conclude(written, index, kept)
                with staged(work / index.name, overwrite=True) as temporary:
                    temporary.write_bytes(self._index(written, work, kept))
            except OutputError:  # such as a disk that is full: what is finished is of use
                raise
            except LoraioError:
                remove_folder(work)
                raise
            finished.forget()
            if there:
                move_files(work, into, self.groups, last=index.name, overwrite=self.overwrite)
                remove_folder(work)
            else:
                name_folder(work, into)
        return replace(merged, parts=tuple(into / file for file in self.groups), reused=finished.reused)

    @contextlib.contextmanager
    def _kept(self, output: Path) -> Iterator[_Kept | None]:
        """Where the residue goes; it gets its name when the block ends well.

        That is after the checkpoint has its name: in between there may be a new checkpoint, whose base is at hand, but
        never an old one that has lost its residue to the new one's.
        """
        if not self.reversible:
            yield None
            return
        path = residue_beside(output)
        with (
            staged(path, overwrite=self.overwrite, inputs=self.files) as temporary,
            owned_file(path) as spool,
            contextlib.closing(ResidueWriter(spool, self.strength)) as writer,
        ):
            yield _Kept(path=path, temporary=temporary, writer=writer)

    def _header_metadata(self) -> dict[str, Any]:
        """The strings in the header of a base that is one file."""
        single = [] if self.checkpoint.parts else list(self.metadata.values())
        return {"metadata": dict(single[0])} if single else {}

    def _parts(self, work: Path, finished: FinishedShards, output: Path, kept: _Kept | None) -> dict[str, Written]:
        progress = self._progress()
        everything: dict[str, Written] = {}
        for file, plans in self.groups.items():
            source = self.inputs.signature(self.checkpoint.path.parent / file)
            written = finished.get(file, source) if kept is None else None
            if written is None:
                with staged(work / file, overwrite=True) as temporary, self._explained():
                    written = self._write(plans, temporary, self._metadata_of(file), progress, output, kept)
                finished.add(file, source, written)
            else:
                progress.add(sum(plan.made_size for plan in plans.values()))
            everything |= written
        with self._explained():
            self._compare(everything)
        return everything

    def _metadata_of(self, file: str) -> Callable[[Mapping[str, Written]], Mapping[str, str]]:
        """The metadata of a part: what the base's part has, with digests anew where it has a document of loraio."""
        document, strings = self.documents[file], self.metadata[file]
        if document is None:
            return lambda _: strings
        plans = self.groups[file]
        facts = {name: plan.made for name, plan in plans.items()}

        def metadata(written: Mapping[str, Written]) -> Mapping[str, str]:
            digests = {name: tensor.sha256 for name, tensor in written.items()} or dict.fromkeys(plans, PENDING)
            return {**strings, **tensorfile.metadata_of(document, facts, digests.__getitem__, where=f"{file!r}")}

        return metadata

    def _write(
        self,
        plans: Mapping[str, TensorPlan],
        path: Path,
        metadata: Callable[[Mapping[str, Written]], Mapping[str, str]],
        progress: Progress,
        output: Path,
        kept: _Kept | None,
    ) -> dict[str, Written]:
        keep = None if kept is None else kept.writer.keep
        return write_tensors(
            plans,
            path,
            metadata=metadata,
            change=Folding(adapter=self.adapter, strength=self.strength, exact=self.exact, keep=keep),
            inputs=self.inputs,
            workers=self.workers,
            progress=progress,
            where=f"{str(output)!r}",
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say how the base differs when it does."""
        try:
            yield
        except SourceDiffersError as error:
            self.inputs.check()
            if self.base_sha256 is None:
                name = str(error)
                plans = {name: self.plans[name] for name in self.changed} if name else self.plans
                known = digests_of(plans, self.inputs, workers=self.workers, progress=Progress())
                check_base(self.adapter, _Values(self, known), known=known)
            raise VerificationError(
                "what was read or copied is not what the base holds; nothing was written",
                where=f"{str(self.checkpoint.path)!r}",
                hint="try again: the base may have changed meanwhile",
            ) from error

    def _compare(self, written: Mapping[str, Written]) -> str:
        """The base's digest, from what was written; it must be that of the base which was hashed, or the adapter's."""
        found = state_sha256(self.checkpoint.state, {name: tensor.source_sha256 for name, tensor in written.items()})
        if found != (self.base_sha256 or self.adapter.base.sha256):
            raise SourceDiffersError("")
        return found

    def _conclude(self, written: Mapping[str, Written], path: Path, kept: _Kept | None) -> MergedFile:
        """The result, if everything that was written is right."""
        self._compare(written)
        folds = {name: written[name].fold or Fold() for name in self.adapter.targets}
        problems = [line for name, fold in folds.items() for line in fold.check.problems(name)]
        given = {name: plan.given for name, plan in self.plans.items() if plan.given is not None}
        problems += [
            f"{name!r} is not the adapter's" for name in given if written[name].sha256 != tensor_sha256(given[name])
        ]
        if problems:
            raise VerificationError("the merged weights are wrong; nothing was written", problems=problems)
        checks = sum((fold.check for fold in folds.values()), FoldCheck())
        changes = [fold.change for fold in folds.values()]
        replaced = sum(written[name].sha256 != written[name].source_sha256 for name in given)
        effect = MergeEffect.of(self.adapter, changes, replaced=replaced)
        if effect.is_noop and not self.allow_noop:
            raise ConfigError(
                "the adapter is a no-op here: no weight changes", hint="--force (allow_noop=True in Python) merges it"
            )
        return MergedFile(
            path=path,
            sha256=self._sha256(written),
            weights=WeightReport(
                folded=len(folds),
                replaced=len(given),
                untouched=len(written) - len(folds) - len(given),
                values=checks.values,
                max_ulp=checks.max_ulp,
                not_correctly_rounded=checks.wrong,
                problems=(),
            ),
            effect=effect,
            receipt=self._receipt(written, kept),
            residue=None if kept is None else kept.size(checks.values, sum(plan.size for plan in self.plans.values())),
            mismatch=self.mismatch,
            stripped=self.checkpoint.stripped,
        )

    def _sha256(self, written: Mapping[str, Written]) -> str:
        given = {name: plan.given for name, plan in self.plans.items() if plan.given is not None}
        state = {**self.checkpoint.state, **given}
        return state_sha256(state, {name: tensor.sha256 for name, tensor in written.items()})

    def _document(self, written: Mapping[str, Written], kept: _Kept | None) -> dict[str, Any]:
        """The metadata of the merged checkpoint; without tensors a stand-in of the same length."""
        named = self.checkpoint if self.checkpoint.network else self.adapter.base
        return base_document(
            self._sha256(written) if written else PENDING,
            network=named.network,
            network_args=named.network_args,
            heads={**named.heads, **self.adapter.heads},
            merged=[*self.checkpoint.document.get("merged", []), self._receipt(written, kept).document()],
        )

    def _receipt(self, written: Mapping[str, Written], kept: _Kept | None) -> Receipt:
        """What is said of this merge; without tensors a stand-in of the same length."""
        return made_receipt(
            self.adapter,
            self.base_sha256 or self.adapter.base.sha256,
            self.strength,
            changed={name: written[name].sha256 if written else PENDING for name in self.changed},
            exact=self.exact,
            base_mismatch=self.mismatch,
            forced=self.forced,
            residue_sha256=None if kept is None else kept.sha256,
        )

    def _index(self, written: Mapping[str, Written], work: Path, kept: _Kept | None) -> bytes:
        """The base's index, with what was merged into the parts in that folder, and the digests of all."""
        parted = read_sharded_header(self.checkpoint.path)
        metadata = dict(parted.metadata)
        grown = {
            "total_size": sum(plan.made_size - plan.size for plan in self.plans.values()),
            "total_parameters": sum(math.prod(plan.made[1]) - math.prod(plan.shape) for plan in self.plans.values()),
        }
        metadata |= {key: metadata[key] + more for key, more in grown.items() if isinstance(metadata.get(key), int)}
        document = with_integrity(
            self._document(written, kept),
            (written[name].sha256 for name in sorted(written)),
            shards={file: tensorfile.read_header(work / file).sha256 for file in self.groups},
        )
        index = {
            "metadata": {**metadata, tensorfile.METADATA_KEY: document},
            "weight_map": {name.removeprefix(self.checkpoint.stripped): file for name, file in parted.places.items()},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        return seal(text.encode("utf-8"), where=f"{str(self.checkpoint.path)!r}")

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a finished part to be of use."""
        targets = hashlib.sha256(repr(sorted(self.adapter.targets.items())).encode()).hexdigest()
        return {
            "adapter_sha256": state_sha256(self.adapter.all_tensors),
            "base_sha256": self.base_sha256 or self.adapter.base.sha256,
            "exact": self.exact,
            "loraio": __version__,
            "parts": list(self.groups),
            "strength": self.strength,
            "stripped": self.checkpoint.stripped,
            "targets_sha256": targets,
            "torch": torch.__version__,
        }

    def _progress(self) -> Progress:
        return counting(self.report, sum(plan.made_size for plan in self.plans.values()))
