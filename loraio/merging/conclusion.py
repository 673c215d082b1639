"""Conclude a merge on files: judge what was written, and describe it in metadata and index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraio.bases.checkpoints import base_document
from loraio.bases.receipts import Receipt, made_receipt
from loraio.errors import ConfigError, VerificationError
from loraio.files import tensorfile
from loraio.files.integrity import PENDING, seal, with_integrity
from loraio.files.sharded import read_sharded_header
from loraio.files.tensors import tensor_sha256
from loraio.merging.checkpoint_writer import Written, document_metadata
from loraio.merging.effect import MergeEffect
from loraio.merging.folds import Fold
from loraio.merging.merge_plan import MergePlan
from loraio.merging.residue_writer import ResidueWriter
from loraio.merging.weight_check import FoldCheck, WeightReport


def judge(plan: MergePlan, written: Mapping[str, Written], *, allow_noop: bool) -> tuple[WeightReport, MergeEffect]:
    """Return the evidence for a merge, if everything that was written is right.

    Raises:
        VerificationError: a weight is wrong.
        ConfigError: no weight changes, and not ``allow_noop``.
    """
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
    checks = sum((fold.check for fold in folds.values()), FoldCheck())
    report = WeightReport(
        folded=len(folds),
        replaced=len(given),
        untouched=len(written) - len(folds) - len(given),
        values=checks.values,
        max_ulp=checks.max_ulp,
        not_correctly_rounded=checks.wrong,
        problems=(),
    )
    return report, effect


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


def shard_metadata(plan: MergePlan, file: str) -> Callable[[Mapping[str, Written]], Mapping[str, str]]:
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
