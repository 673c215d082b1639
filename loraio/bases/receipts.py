"""Merge receipts: they say which adapter was merged into which base, and refuse a second merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.bases.identity import check_base, digests, state_sha256
from loraio.errors import AlreadyMergedError, ConfigError, FormatError
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


def check_merge(
    adapter: Adapter,
    state: Mapping[str, Tensor],
    receipts: Sequence[Receipt] = (),
    *,
    force: bool = False,
    allow_base_mismatch: bool = False,
    known: Mapping[str, str] | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Refuse a second merge, and a merge into another base than the adapter was made for.

    ``force`` permits a second merge only if the receipts explain every tensor that the adapter changes: the adapter's
    base is the base of a receipt, and each tensor is as it was there or as a receipt left it. For any other difference
    use ``allow_base_mismatch``.

    Returns:
        lines on objections that ``force`` overruled, and on differences of the base that were allowed.

    Raises:
        AlreadyMergedError: it needs ``force``.
        BaseMismatchError, StateError: as `loraio.bases.identity.check_base`.
    """
    known = digests(state) if known is None else known
    sha256 = state_sha256(state, known)
    forced = check_receipts(adapter, receipts, sha256=sha256, force=force, allow_base_mismatch=allow_base_mismatch)
    lines = check_state(
        adapter, state, receipts if forced else (), allow_base_mismatch=allow_base_mismatch, known=known
    )
    return forced, lines


def check_state(
    adapter: Adapter,
    state: Mapping[str, Tensor],
    receipts: Sequence[Receipt],
    *,
    known: Mapping[str, str],
    allow_base_mismatch: bool = False,
    stated_sha256: str | None = None,
) -> tuple[str, ...]:
    """Refuse a base that differs from the adapter's own, except for differences that receipts explain.

    ``receipts`` are those of a forced merge, and empty without one; then ``known`` needs only the targets.
    ``stated_sha256`` is the digest of the base as its file states it.

    Returns:
        a line for each difference that was allowed; empty if the receipts explain all.

    Raises:
        BaseMismatchError, StateError: as `loraio.bases.identity.check_base`.
    """
    explained = _explain(adapter, receipts, known) and stated_sha256 in (None, state_sha256(state, known))
    lines = check_base(adapter, state, allow_mismatch=allow_base_mismatch or explained, known=known)
    return () if explained else lines


def check_receipts(
    adapter: Adapter,
    receipts: Sequence[Receipt],
    *,
    sha256: str | None,
    force: bool = False,
    allow_base_mismatch: bool = False,
    names_base: bool = True,
) -> tuple[str, ...]:
    """Refuse a second merge by the receipts alone, without looking at a tensor.

    An adapter that was made for this very file, with its digest, needs no force. `check_base` refuses an adapter with
    a base that no receipt names. ``names_base`` is false for an adapter of another tool, whose file names no base.

    Returns:
        a line on the objection that ``force`` overruled; empty if there was none.

    Raises:
        AlreadyMergedError: it needs ``force``.
    """
    if not receipts:
        return ()
    own, count = state_sha256(adapter.all_tensors), len(receipts)
    repeats = [number for number, one in enumerate(receipts, 1) if one.adapter_sha256 == own]
    before = [number for number, one in enumerate(receipts, 1) if one.base_sha256 == adapter.base.sha256]
    named = f"adapter {own[:12]}.."
    if repeats:
        line = f"{named} was merged into this file already (receipt {repeats[-1]} of {count})"
    elif names_base and adapter.base.sha256 == sha256:
        return ()
    elif before:
        line = f"{named} was made for what this file was before receipt {before[-1]} of {count}"
    elif allow_base_mismatch or not names_base:
        line = f"this file is not a base as it was trained: it has {count} receipt{'s' if count > 1 else ''} of merges"
    else:
        return ()
    if not force:
        raise AlreadyMergedError(
            line, hint="loraio inspect shows what is in it; --force (force=True in Python) merges it on top"
        )
    return (line,)


def _explain(adapter: Adapter, receipts: Sequence[Receipt], known: Mapping[str, str]) -> bool:
    """Return True if the receipts account for every tensor that differs from the adapter's own base."""
    if adapter.base.sha256 not in {one.base_sha256 for one in receipts}:
        return False
    left = {name: sha256 for one in receipts for name, sha256 in one.changed.items()}
    needed = {name: target.base_sha256 for name, target in adapter.targets.items()}
    needed |= {name: whole.base_sha256 for name, whole in adapter.whole.items()}
    return all(known.get(name) in (sha256, left.get(name)) for name, sha256 in needed.items())
