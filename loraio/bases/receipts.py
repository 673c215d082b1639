"""Merge receipts: who was merged into what, as a merged checkpoint says it, and what follows for the next merge."""

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
"""What a receipt says of its sums where they are not exact."""

LABELS = ("dataset", "digit", "class", "seed", "steps")
"""What of an adapter's training a receipt repeats, for people to know it by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One merge, as the merged checkpoint says it.

    Nothing in it depends on names of files: the same inputs give the same receipt, but for the versions.

    Attributes:
        adapter_sha256: digest of the adapter's tensors, as a state dict.
        base_sha256: digest of the state dict before.
        strength: what the adapter's scale was multiplied by.
        adapter: what names it to people: kinds, ranks, and what it was trained for, as plain JSON values.
        changed: digest of each tensor that the adapter changes, after the merge, by name.
        exact: false where the new weights are float32 sums.
        base_mismatch: how the base differed from the adapter's own, where that was allowed.
        forced: what stood against the merge, where it was forced.
        residue_sha256: digest of the residue's tensors, where the merge is reversible.
        versions: of loraio and torch.
        extra: keys that this version does not know.
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
        """As plain JSON values."""
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
    """What `merge_file` would say of a merge that was done in memory; for ``save_base(..., receipts=)``.

    Args:
        state_dict: the base model's.
        merged: what `loraio.merge` made of it.
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
    """The receipt of an adapter, with what this loraio says of it; ``facts`` are further attributes."""
    return Receipt(
        adapter_sha256=state_sha256(adapter.all_tensors),
        base_sha256=base_sha256,
        strength=strength,
        adapter=label(adapter),
        versions={"loraio": __version__, "torch": str(torch.__version__)},
        **facts,
    )


def label(adapter: Adapter) -> dict[str, Any]:
    """What an adapter is to people: kinds, ranks, number of targets, network, and what it was trained for."""
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
    """The receipts of a base checkpoint's document, in order.

    Raises:
        FormatError: one of them is none.
    """
    entries = document.get("merged", [])
    if not isinstance(entries, list):
        raise FormatError(f"what was merged is {entries!r}, not a list of objects", where=where)
    return tuple(_read(entry, number, where) for number, entry in enumerate(entries, 1))


def _read(entry: Any, number: int, where: str) -> Receipt:
    if not isinstance(entry, dict):
        raise FormatError(f"receipt {number} is {entry!r}, not an object", where=where)
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
        raise FormatError(f"receipt {number} is none that loraio writes", problems=problems, where=where)
    facts |= objects | {key: tuple(value) for key, value in lines.items()}
    return Receipt(
        **facts,
        strength=strength,
        exact=sums is None,
        residue_sha256=residue,
        extra=rest,
    )


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
    """Refuse a merge that must not be, by what was merged before and by what the base is.

    A base in which other adapters are is another one than the adapter was made for. ``force`` lets that pass where the
    receipts explain it: the adapter's base is that of a receipt, and each tensor that it changes is as it was there or
    as a receipt left it. All else is for ``allow_base_mismatch``.

    Args:
        adapter: the adapter.
        state: the base's state dict.
        receipts: what was merged into it.
        force, allow_base_mismatch: what may be.
        known: digests of the state's tensors.

    Returns:
        what had to be forced, and how the base differs where that was allowed.

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
    """`loraio.bases.identity.check_base` of a base into which a merge is forced.

    Args:
        adapter: the adapter.
        state: the base's state dict.
        receipts: which may explain how it differs; empty where nothing is forced.
        known: digests of the state's tensors; where nothing is forced at least those of the targets.
        allow_base_mismatch: let it differ beyond that.
        stated_sha256: what the base's file says that its digest is.

    Returns:
        how the base differs where that was allowed; empty where the receipts explain it.

    Raises:
        BaseMismatchError, StateError: as `loraio.bases.identity.check_base`.
    """
    explained = (
        bool(receipts) and _explain(adapter, receipts, known) and stated_sha256 in (None, state_sha256(state, known))
    )
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
    """The part of `check_merge` that needs no tensor: whether something has to be forced.

    An adapter that was made for this very file, digest and all, may be merged into it. One that names none of the bases
    that the receipts know is for `check_base` to refuse.

    Args:
        adapter: the adapter.
        receipts: what was merged into the base.
        sha256: digest of the base.
        force, allow_base_mismatch: what may be.
        names_base: false for an adapter of another tool, whose file does not say which base it is for.

    Returns:
        a line on what had to be forced; empty where nothing had.

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
    """Whether the receipts account for every tensor that is not as the adapter knew it."""
    if adapter.base.sha256 not in {one.base_sha256 for one in receipts}:
        return False
    left = {name: sha256 for one in receipts for name, sha256 in one.changed.items()}
    needed = {name: target.base_sha256 for name, target in adapter.targets.items()}
    needed |= {name: whole.base_sha256 for name, whole in adapter.whole.items()}
    return all(known.get(name) in (sha256, left.get(name)) for name, sha256 in needed.items())
