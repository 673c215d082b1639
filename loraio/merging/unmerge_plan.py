"""Plan how a merged checkpoint gives its base again, and check it against its receipts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loraio.bases.checkpoints import BaseCheckpoint, fitted, is_pickle, read_base, scan_base
from loraio.bases.identity import state_sha256
from loraio.bases.receipts import Receipt
from loraio.errors import BaseMismatchError
from loraio.merging.plans import Shards, TensorPlan, copy_plans, index_text, joined
from loraio.merging.unfolding import Unfolding


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedCheckpoint:
    """A merged checkpoint, and the receipts to take off it.

    Attributes:
        checkpoint: the checkpoint without values.
        receipts: all of its receipts.
        first: number of receipts that stay, from the first on.
        shards: plans that copy its tensors, by file.
        metadata: strings in the header of each file.
    """

    checkpoint: BaseCheckpoint
    receipts: tuple[Receipt, ...]
    first: int
    shards: Shards
    metadata: Mapping[str, Mapping[str, str]]

    @property
    def plans(self) -> dict[str, TensorPlan]:
        """Plans of all tensors."""
        return joined(self.shards)

    @property
    def base_sha256(self) -> str:
        """Digest that the base must have."""
        return self.receipts[self.first].base_sha256

    @property
    def named(self) -> str:
        """Name of the first receipt to take off, for messages."""
        return f"receipt {self.first + 1} of {len(self.receipts)}"

    def problems(self, found: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
        """List the differences between the checkpoint and its receipts.

        Args:
            found: digest of each of its tensors.
            before: digest of each tensor of the base.
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
class UnmergePlan:
    """How the base is made.

    Attributes:
        checkpoint: the base without values, as far as it is known.
        shards: plans of its tensors, by file.
        metadata: strings in the header of each file; a file without an entry gets ours.
        wrong: returns the error for a base with another digest.
        index: text of the index of a sharded base.
        change: restores the folded tensors; None if the base is at hand.
        originals: names of the tensors that the residue holds whole.
        known: digest of each tensor of the base, as the residue says.
        files: the files that are read.
    """

    checkpoint: BaseCheckpoint
    shards: Shards
    metadata: Mapping[str, Mapping[str, str]]
    wrong: Callable[[str], Exception]
    index: str | None = None
    change: Unfolding | None = None
    originals: frozenset[str] = frozenset()
    known: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str | os.PathLike[str], ...] = ()


def plan_from_base(merged: MergedCheckpoint, path: str | os.PathLike[str]) -> UnmergePlan:
    """Plan to copy the base, where it is at hand.

    Raises:
        MissingFileError, FormatError: it cannot be read.
    """
    checkpoint, headers = (read_base(path), ()) if is_pickle(path) else scan_base(path)
    checkpoint = fitted(checkpoint, merged.checkpoint.state)

    def wrong(found: str) -> Exception:
        bases = [number for number, one in enumerate(merged.receipts, 1) if one.base_sha256 == found]
        return BaseMismatchError(
            f"the base has the digest {found[:12]}.., {merged.named} was merged into {merged.base_sha256[:12]}..",
            where=f"{os.fspath(path)!r}",
            hint="--all takes all merges back" if bases == [1] else None,
        )

    return UnmergePlan(
        checkpoint=checkpoint,
        shards=copy_plans(checkpoint, headers),
        metadata={header.path.name: header.metadata for header in headers},
        index=index_text(checkpoint.path) if checkpoint.parts else None,
        wrong=wrong,
        files=(checkpoint.path, *checkpoint.parts),
    )
