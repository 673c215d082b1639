"""Plan a merge on files, and prove that its base is the one that the adapter names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.bases.checkpoints import BaseCheckpoint
from loraio.bases.identity import check_base, state_sha256
from loraio.bases.merge_checks import check_state
from loraio.errors import VerificationError
from loraio.files import tensorfile
from loraio.files.copying import Inputs, changed
from loraio.files.tensorfile import Header
from loraio.files.tensors import TORCH_DTYPES
from loraio.merging.checkpoint_writer import SourceDiffersError, Written
from loraio.merging.plans import Shards, TensorPlan, copy_plans, digests_of, joined, read_source
from loraio.merging.residue_writer import ResidueWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """One merge: its inputs, the plan of every tensor, and the facts known of the base.

    Attributes:
        checkpoint: the base without values, or a pickle's with them.
        adapter, strength, exact: as given to `loraio.merge_file`.
        headers: of the base's files, by name; empty for a pickle.
        shards: the plans, by file.
        inputs: opens the base's files.
        workers: number of threads.
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
        """Plans of all tensors."""
        return joined(self.shards)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter changes."""
        return (*self.adapter.targets, *self.adapter.whole)

    @property
    def given(self) -> dict[str, Tensor]:
        """Tensors that replace the base's, by name."""
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
            shards={
                file: {name: replace(plan, expected=known[name]) for name, plan in plans.items()}
                for file, plans in self.shards.items()
            },
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

    return {
        file: {name: planned(name, plan) for name, plan in plans.items()}
        for file, plans in copy_plans(checkpoint, headers).items()
    }


class _DifferingValues(Mapping[str, Tensor]):
    """A state dict with values only where a weight differs from the adapter's, to say how."""

    def __init__(self, merge: MergePlan, known: Mapping[str, str]) -> None:
        self._state = merge.checkpoint.state
        self._merge = merge
        self._known = known

    def __getitem__(self, name: str) -> Tensor:
        described = self._state[name]
        target = self._merge.adapter.targets.get(name)
        if target is None or self._known.get(name) == target.base_sha256:
            return described
        raw = read_source(self._merge.plans[name], self._merge.inputs)
        return raw.view(described.dtype).view(described.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
