"""Merge receipts: entries of a merged checkpoint that say which adapter was merged into which base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.bases.identity import digests, state_sha256
from loraio.bases.merge_checks import check_merge
from loraio.errors import ConfigError, FormatError
from loraio.files.integrity import is_sha256
from loraio.version import __version__

FAST_SUMS = "float32"
"""The value of a receipt's key "sums" for sums that are not exact."""

LABELS = ("dataset", "digit", "class", "seed", "steps")
"""Keys of an adapter's training that a receipt repeats, for people to recognise the adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One merge, as the merged checkpoint states it.

    The same inputs give the same receipt, whatever their files are called, except for the versions.

    Attributes:
        adapter_sha256: digest of the adapter's tensors, as a state dict.
        base_sha256: digest of the state dict before.
        strength: factor on the adapter's scale.
        adapter: facts for people: kinds, ranks, and the training's purpose, as plain JSON values; see `label`.
        changed: digest of each tensor that the adapter changes, after the merge, by name.
        exact: false if the new weights are float32 sums.
        base_mismatch: differences of the base from the adapter's own that were allowed.
        forced: objections to the merge that were overruled.
        residue_sha256: digest of the residue's tensors, if the merge is reversible.
        versions: of loraio and torch.
        extra: keys that this version of loraio does not know.
    """

    adapter_sha256: str
    base_sha256: str
    strength: float
    adapter: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    base_mismatch: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    residue_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the receipt as plain JSON values."""
        found: dict[str, Any] = {key: getattr(self, key) for key in ("adapter_sha256", "base_sha256", "strength")}
        found |= {key: dict(value) for key in ("adapter", "changed", "versions") if (value := getattr(self, key))}
        found |= {key: list(lines) for key in ("base_mismatch", "forced") if (lines := getattr(self, key))}
        if not self.exact:
            found["sums"] = FAST_SUMS
        if self.residue_sha256 is not None:
            found["residue_sha256"] = self.residue_sha256
        return {**self.extra, **found}


def receipt(
    state_dict: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    adapter: Adapter,
    strength: float = 1.0,
    *,
    exact: bool = True,
    allow_base_mismatch: bool = False,
    receipts: Sequence[Receipt] = (),
    force: bool = False,
) -> Receipt:
    """Return the receipt of a merge in memory, as `merge_file` would write it; for ``save_base(..., receipts=)``.

    Args:
        state_dict: the base model's.
        merged: the result of `loraio.merge`.
        adapter: the adapter that was merged.
        strength, exact, allow_base_mismatch, receipts, force: as the merge was told.

    Raises:
        AlreadyMergedError, BaseMismatchError: as `loraio.merge`.
    """
    known = digests(state_dict)
    forced, mismatch = check_merge(
        adapter, state_dict, receipts, force=force, allow_base_mismatch=allow_base_mismatch, known=known
    )
    after = digests({name: merged[name] for name in (*adapter.targets, *adapter.whole)})
    return made_receipt(
        adapter,
        state_sha256(state_dict, known),
        check_strength(strength),
        changed=after,
        exact=exact,
        base_mismatch=mismatch,
        forced=forced,
    )


def made_receipt(adapter: Adapter, base_sha256: str, strength: float, **facts: Any) -> Receipt:
    """Return the receipt of an adapter by this version of loraio; ``facts`` are further attributes."""
    return Receipt(
        adapter_sha256=state_sha256(adapter.all_tensors),
        base_sha256=base_sha256,
        strength=strength,
        adapter=label(adapter),
        versions={"loraio": __version__, "torch": str(torch.__version__)},
        **facts,
    )


def label(adapter: Adapter) -> dict[str, Any]:
    """Return facts of an adapter for people: kinds, ranks, number of targets, network, and purpose of the training."""
    targets = adapter.targets.values()
    made: dict[str, Any] = {
        "kinds": sorted({target.kind for target in targets}),
        "ranks": sorted({target.rank for target in targets}),
        "targets": len(adapter.targets),
    }
    if adapter.whole:
        made["whole"] = len(adapter.whole)
    if adapter.base.network is not None:
        made["network"] = adapter.base.network
    told = {key: adapter.training.get(key) for key in LABELS}
    return made | {key: value for key, value in told.items() if isinstance(value, int | str)}


def read_receipts(document: Mapping[str, Any], *, where: str) -> tuple[Receipt, ...]:
    """Read the receipts of a base checkpoint's document, in order.

    Raises:
        FormatError: an entry is not one that loraio writes.
    """
    return tuple(_read(entry, number, where) for number, entry in enumerate(merged_entries(document, where=where), 1))


def merged_entries(document: Mapping[str, Any], *, where: str) -> list[dict[str, Any]]:
    """Return the receipts of a document as JSON objects, unchecked.

    Raises:
        FormatError: they are not a list of objects.
    """
    entries = document.get("merged", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(f"the receipts are {entries!r}, not a list of objects", where=where)
    return entries


def _read(entry: Mapping[str, Any], number: int, where: str) -> Receipt:
    rest = dict(entry)
    facts: dict[str, Any] = {key: rest.pop(key, None) for key in ("adapter_sha256", "base_sha256")}
    residue = rest.pop("residue_sha256", None)
    objects = {key: rest.pop(key, {}) for key in ("adapter", "changed", "versions")}
    lines = {key: rest.pop(key, []) for key in ("base_mismatch", "forced")}
    sums, strength = rest.pop("sums", None), rest.pop("strength", None)
    try:
        strength = check_strength(strength)
    except ConfigError as error:
        raise FormatError(f"receipt {number}: {error.message}", where=where) from error
    problems = [f"{key} is {value!r}, not a digest" for key, value in facts.items() if not is_sha256(value)]
    if residue is not None and not is_sha256(residue):
        problems.append(f"residue_sha256 is {residue!r}, not a digest")
    problems += [f"{key} is {value!r}, not an object" for key, value in objects.items() if not isinstance(value, dict)]
    problems += [f"{key} is {value!r}, not a list of lines" for key, value in lines.items() if not _are_texts(value)]
    if isinstance(objects["changed"], dict):
        problems += [f"changed: {name!r} has no digest" for name, d in objects["changed"].items() if not is_sha256(d)]
    if sums not in (None, FAST_SUMS):
        problems.append(f"sums is {sums!r}, not {FAST_SUMS!r}")
    if problems:
        raise FormatError(f"receipt {number} is not one that loraio writes", problems=problems, where=where)
    facts |= objects | {key: tuple(value) for key, value in lines.items()}
    return Receipt(**facts, strength=strength, exact=sums is None, residue_sha256=residue, extra=rest)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)
