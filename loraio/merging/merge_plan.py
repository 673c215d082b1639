"""Plan a merge on files, prove that its base is the one that the adapter names, and judge and describe the result."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.bases.checkpoints import BaseCheckpoint, base_document
from loraio.bases.identity import check_base, state_sha256
from loraio.bases.receipts import Receipt, check_state, made_receipt
from loraio.errors import ConfigError, VerificationError
from loraio.files import tensorfile
from loraio.files.copying import Inputs, changed
from loraio.files.integrity import PENDING, seal, with_integrity
from loraio.files.sharded import read_sharded_header
from loraio.files.tensorfile import Header
from loraio.files.tensors import TORCH_DTYPES, tensor_sha256
from loraio.merging.checkpoint_writer import Metadata, SourceDiffersError, Written, document_metadata
from loraio.merging.effect import Fold, MergeEffect
from loraio.merging.plans import Shards, TensorPlan, copy_plans, digests_of, joined, opened, replanned
from loraio.merging.residue_files import ResidueWriter
from loraio.merging.weight_check import FoldCheck, WeightReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """One merge: its inputs, the plan of every tensor, and the facts known of the base.

    Attributes:
        checkpoint: the base without values, or a pickle's with them.
        headers: of the base's files, by name; empty for a pickle.
        forced: what was forced, in words.
        mismatch: how the base differs from the adapter's own, where that is allowed.
        hashed_sha256: digest of a base that was hashed before; None if it must be the adapter's own.
    """

    checkpoint: BaseCheckpoint
    adapter: Adapter
    strength: float
    exact: bool
    headers: Mapping[str, Header]
    shards: Shards
    inputs: Inputs
    workers: int
    forced: tuple[str, ...] = ()
    mismatch: tuple[str, ...] = ()
    hashed_sha256: str | None = None

    @property
    def plans(self) -> dict[str, TensorPlan]:
        return joined(self.shards)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter changes."""
        return (*self.adapter.targets, *self.adapter.whole)

    @property
    def given(self) -> dict[str, Tensor]:
        return {name: plan.given for name, plan in self.plans.items() if plan.given is not None}

    @property
    def base_sha256(self) -> str:
        """Digest that the base must have."""
        return self.hashed_sha256 or self.adapter.base.sha256

    @property
    def fits(self) -> bool:
        """True if names, shapes and dtypes of the base are those of the adapter's own."""
        plans = self.plans
        needed = {name: (target.shape, target.dtype) for name, target in self.adapter.targets.items()}
        needed |= {name: (whole.base_shape, whole.dtype) for name, whole in self.adapter.whole.items()}
        return all(name in plans and (plans[name].shape, plans[name].dtype) == fact for name, fact in needed.items())

    def check_headers(self) -> None:
        """From here on the base's files must not change; raise FormatError if they have since they were read."""
        for header in self.headers.values():
            self.inputs.signature(header.path)
            now = tensorfile.read_header(header.path)
            if (now.sha256, now.file_bytes) != (header.sha256, header.file_bytes):
                raise changed(header.path)

    def with_hashed_base(self, *, allow_mismatch: bool) -> MergePlan:
        """Hash the base and compare it with the adapter; return the plan that expects these digests."""
        plans = self.plans
        wanted = plans
        if not (self.fits or allow_mismatch or self.forced):
            wanted = {name: plans[name] for name in self.changed if name in plans}
        known = digests_of(wanted, self.inputs, workers=self.workers)
        mismatch = check_state(
            self.adapter,
            _DifferingValues(self, known),
            self.checkpoint.receipts if self.forced else (),
            known=known,
            allow_base_mismatch=allow_mismatch,
            stated_sha256=self.checkpoint.document.get("sha256"),
        )
        return replace(
            self,
            mismatch=mismatch,
            hashed_sha256=state_sha256(self.checkpoint.state, known),
            shards=replanned(self.shards, lambda name, plan: replace(plan, expected=known[name])),
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a `SourceDiffersError` into the error that says how the base differs."""
        try:
            yield
        except SourceDiffersError as error:
            self.inputs.check()
            if self.hashed_sha256 is None:
                plans, name = self.plans, str(error)
                known = digests_of(
                    {name: plans[name] for name in self.changed} if name else plans, self.inputs, workers=self.workers
                )
                check_base(self.adapter, _DifferingValues(self, known), known=known)
            raise VerificationError(
                "what was read or copied differs from what the base holds; nothing was written",
                where=f"{str(self.checkpoint.path)!r}",
                hint="try again: the base may have changed meanwhile",
            ) from error

    def check_base(self, written: Mapping[str, Written]) -> None:
        """Raise SourceDiffersError unless the tensors that were read are those of the right base."""
        found = state_sha256(self.checkpoint.state, {name: tensor.source_sha256 for name, tensor in written.items()})
        if found != self.base_sha256:
            raise SourceDiffersError("")

    def finish_residue(self, residue: ResidueWriter, written: Mapping[str, Written], **base: object) -> None:
        """Write the residue; ``base`` is what the base's files hold beside their tensors."""
        plans = self.plans
        residue.write(
            {name: plans[name] for name in self.adapter.whole},
            {
                "adapter_sha256": state_sha256(self.adapter.all_tensors),
                "base_sha256": self.base_sha256,
                "merged_sha256": self.merged_sha256(written),
                "strength": self.strength,
                "tensors": {name: tensor.source_sha256 for name, tensor in written.items()},
                "stripped": self.checkpoint.stripped,
                **base,
            },
            inputs=self.inputs,
        )

    def merged_sha256(self, written: Mapping[str, Written]) -> str:
        """Return the digest of the merged state dict."""
        state = {**self.checkpoint.state, **self.given}
        return state_sha256(state, {name: tensor.sha256 for name, tensor in written.items()})


def merge_plans(
    checkpoint: BaseCheckpoint, headers: tuple[Header, ...], adapter: Adapter
) -> dict[str, dict[str, TensorPlan]]:
    """Plan to copy the base's tensors, fold the adapter's targets, and replace its whole tensors."""

    def planned(name: str, plan: TensorPlan) -> TensorPlan:
        if name in adapter.targets:
            expected = adapter.targets[name].base_sha256 if headers else None
            return replace(plan, folded=True, expected=expected)
        if name in adapter.whole:
            like = torch.empty(0, dtype=getattr(torch, TORCH_DTYPES[plan.dtype]))
            return replace(plan, given=adapter.replace(name, like))
        return plan

    return replanned(copy_plans(checkpoint, headers), planned)


class _DifferingValues(Mapping[str, Tensor]):
    """A state dict with values only where a weight differs from the adapter's, to say how."""

    def __init__(self, merge: MergePlan, known: Mapping[str, str]) -> None:
        self._state, self._merge, self._known = merge.checkpoint.state, merge, known

    def __getitem__(self, name: str) -> Tensor:
        described = self._state[name]
        target = self._merge.adapter.targets.get(name)
        if target is None or self._known.get(name) == target.base_sha256:
            return described
        plan = self._merge.plans[name]
        with opened(plan.source, self._merge.inputs) as source:
            return source.read(0, plan.size).view(described.dtype).view(described.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def judge(plan: MergePlan, written: Mapping[str, Written], *, allow_noop: bool) -> tuple[WeightReport, MergeEffect]:
    """Return the evidence for a merge; raise VerificationError for wrong weights, and ConfigError for a no-op."""
    plan.check_base(written)
    folds = {name: written[name].fold or Fold() for name in plan.adapter.targets}
    given = plan.given
    problems = [line for name, fold in folds.items() for line in fold.check.problems(name)]
    problems += [
        f"{name!r} is not the adapter's" for name in given if written[name].sha256 != tensor_sha256(given[name])
    ]
    if problems:
        raise VerificationError("the merged weights are wrong; nothing was written", problems=problems)
    replaced = sum(written[name].sha256 != written[name].source_sha256 for name in given)
    effect = MergeEffect.of(plan.adapter, [fold.change for fold in folds.values()], replaced=replaced)
    if effect.is_noop and not allow_noop:
        raise ConfigError(
            "the adapter is a no-op here: no weight changes", hint="--force (allow_noop=True in Python) merges it"
        )
    total = sum((fold.check for fold in folds.values()), FoldCheck())
    return total.report(plan.adapter, len(written)), effect


def merge_receipt(plan: MergePlan, written: Mapping[str, Written], residue: ResidueWriter | None) -> Receipt:
    """Return the receipt of a merge; without tensors a stand-in of the same length."""
    return made_receipt(
        plan.adapter,
        plan.base_sha256,
        plan.strength,
        changed={name: written[name].sha256 if written else PENDING for name in plan.changed},
        exact=plan.exact,
        base_mismatch=plan.mismatch,
        forced=plan.forced,
        residue_sha256=None if residue is None else residue.sha256,
    )


def merged_document(plan: MergePlan, written: Mapping[str, Written], residue: ResidueWriter | None) -> dict[str, Any]:
    """Return the document of a merged checkpoint; without tensors a stand-in of the same length."""
    named = plan.checkpoint if plan.checkpoint.network else plan.adapter.base
    return base_document(
        plan.merged_sha256(written) if written else PENDING,
        network=named.network,
        network_args=named.network_args,
        heads={**named.heads, **plan.adapter.heads},
        merged=[*plan.checkpoint.document.get("merged", []), merge_receipt(plan, written, residue).document()],
    )


def shard_metadata(plan: MergePlan, file: str) -> Metadata:
    """Return the metadata of a shard: those of the base's, with new digests if it has a document of loraio."""
    header = plan.headers[file]
    document = header.document()

    def metadata(written: Mapping[str, Written]) -> Mapping[str, str]:
        if document is None:
            return header.metadata
        return {**header.metadata, **document_metadata(document, plan.shards[file], written, where=f"{file!r}")}

    return metadata


def merged_index(plan: MergePlan, written: Mapping[str, Written], folder: Path, residue: ResidueWriter | None) -> bytes:
    """Return the base's index with the merged document, given the folder of the finished shards."""
    sharded = read_sharded_header(plan.checkpoint.path)
    metadata, plans = dict(sharded.metadata), plan.plans.values()
    grown = {
        "total_size": sum(each.made_size - each.size for each in plans),
        "total_parameters": sum(math.prod(each.made[1]) - math.prod(each.shape) for each in plans),
    }
    metadata |= {key: metadata[key] + more for key, more in grown.items() if isinstance(metadata.get(key), int)}
    document = with_integrity(
        merged_document(plan, written, residue),
        (written[name].sha256 for name in sorted(written)),
        shards={file: tensorfile.read_header(folder / file).sha256 for file in plan.shards},
    )
    index = {
        "metadata": {**metadata, tensorfile.METADATA_KEY: document},
        "weight_map": {name.removeprefix(plan.checkpoint.stripped): file for name, file in sharded.places.items()},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    return seal(text.encode("utf-8"), where=f"{str(plan.checkpoint.path)!r}")
