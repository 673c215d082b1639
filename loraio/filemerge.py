"""Merge on files: a base checkpoint and an adapter give a merged checkpoint, proven before it gets its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraio import container, formats
from loraio.bases import fitted, read_base, write_base
from loraio.errors import ConfigError, VerificationError
from loraio.identity import check_base, state_sha256
from loraio.merging import Landing, landing, merge
from loraio.outputs import check_output
from loraio.verification import WeightReport, verify_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedFile:
    """What `merge_file` wrote.

    Attributes:
        path: the merged checkpoint.
        sha256: digest of its state dict.
        stripped: what stood before every name of the base and was taken off; empty for most files.
        weights: the evidence, taken from the file itself.
        landing: what the adapter did to the weights.
        mismatch: how the base differs from the adapter's own, where that was allowed.
    """

    path: Path
    sha256: str
    weights: WeightReport
    landing: Landing
    mismatch: tuple[str, ...] = ()
    stripped: str = ""


def merge_file(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    overwrite: bool = False,
    allow_base_mismatch: bool = False,
    allow_noop: bool = False,
) -> MergedFile:
    """Write the base with the adapter folded in; `merge` for files.

    What was written is read again and its weights are verified against base and adapter; only then does the file get
    its name. The new file says what was merged into what.

    Args:
        base: a base checkpoint, ours or a plain state dict; see `read_base`.
        adapter: an adapter file.
        output: the safetensors file to make.
        strength: multiplies the adapter's scale.
        overwrite: replace an existing file, but never an input.
        allow_base_mismatch: go on where values or dtypes of the base are others; recorded in the file.
        allow_noop: go on where no weight changes.

    Raises:
        MissingFileError, FormatError, AdapterError: an input cannot be read.
        BaseMismatchError: the adapter was made for another base.
        OutputExistsError, OutputError: the output cannot be written.
        ConfigError: no weight would change.
        VerificationError: the written weights are wrong; the file was removed.
    """
    inputs: tuple[str | os.PathLike[str], ...] = (base, adapter)
    check_output(output, overwrite=overwrite, inputs=inputs)
    checkpoint, loaded = read_base(base), formats.load(adapter)
    checkpoint = fitted(checkpoint, loaded.targets)
    inputs = (*inputs, *checkpoint.parts)
    mismatch = check_base(loaded, checkpoint.state, allow_mismatch=allow_base_mismatch)
    merged = merge(checkpoint.state, loaded, strength, allow_base_mismatch=allow_base_mismatch)
    landed = landing(checkpoint.state, merged, loaded)
    if landed.is_noop and not allow_noop:
        raise ConfigError(
            "the adapter is a no-op here: no weight changes", hint="--force (allow_noop=True in Python) merges it"
        )
    reports: list[WeightReport] = []

    def check(written: Path) -> None:
        state = container.read_tensors(container.read_header(written))
        report = verify_weights(checkpoint.state, loaded, state, strength, allow_base_mismatch=allow_base_mismatch)
        if not report.ok:
            raise VerificationError("the merged weights are wrong; nothing was written", problems=report.problems)
        reports.append(report)

    receipt: dict[str, Any] = {
        "adapter_sha256": state_sha256(loaded.all_tensors),
        "base_sha256": state_sha256(checkpoint.state),
        "strength": float(strength),
    }
    if mismatch:
        receipt["base_mismatch"] = list(mismatch)
    named = checkpoint if checkpoint.network else loaded.base
    write_base(
        merged,
        output,
        network=named.network,
        network_args=named.network_args,
        heads={**named.heads, **loaded.heads},
        overwrite=overwrite,
        inputs=inputs,
        check=check,
        merged=[*checkpoint.document.get("merged", []), receipt],
    )
    digest = state_sha256(merged)
    return MergedFile(
        path=Path(output),
        sha256=digest,
        weights=reports[0],
        landing=landed,
        mismatch=mismatch,
        stripped=checkpoint.stripped,
    )
