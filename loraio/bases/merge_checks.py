"""Allow or refuse a merge, given the receipts of earlier merges into the same base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.bases.identity import check_base, digests, state_sha256
from loraio.errors import AlreadyMergedError

if TYPE_CHECKING:
    from loraio.bases.receipts import Receipt


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

    Args:
        adapter: the adapter.
        state: the base's state dict.
        receipts: of the merges into it.
        force: permit a second merge.
        allow_base_mismatch: permit another base.
        known: digests of the state's tensors.

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

    Args:
        adapter: the adapter.
        state: the base's state dict.
        receipts: of a forced merge; empty if nothing is forced.
        known: digests of the state's tensors; if nothing is forced, at least those of the targets.
        allow_base_mismatch: permit other differences.
        stated_sha256: digest of the base as its file states it.

    Returns:
        a line for each difference that was allowed; empty if the receipts explain all.

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
    """Refuse a second merge by the receipts alone, without looking at a tensor.

    An adapter that was made for this very file, with its digest, needs no force. `check_base` refuses an adapter with
    a base that no receipt names.

    Args:
        adapter: the adapter.
        receipts: of the merges into the base.
        sha256: digest of the base.
        force, allow_base_mismatch: as `check_merge`.
        names_base: false for an adapter of another tool, whose file does not name its base.

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
