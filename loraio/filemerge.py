"""Merge on files: a base checkpoint and an adapter give a merged checkpoint, proven before it gets its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loraio import container, formats
from loraio.bases import read_base, write_base
from loraio.errors import VerificationError
from loraio.identity import state_sha256
from loraio.merging import merge
from loraio.outputs import check_output
from loraio.verification import WeightReport, verify_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedFile:
    """What `merge_file` wrote.

    Attributes:
        path: the merged checkpoint.
        sha256: digest of its state dict.
        weights: the evidence, taken from the file itself.
    """

    path: Path
    sha256: str
    weights: WeightReport


def merge_file(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    overwrite: bool = False,
) -> MergedFile:
    """Write the base with the adapter folded in; `merge` for files.

    What was written is read again and its weights are verified against base and adapter; only then does the file get
    its name. The new file says what was merged into what.

    Args:
        base: a base checkpoint, ours or a plain state dict.
        adapter: an adapter file.
        output: the safetensors file to make.
        strength: multiplies the adapter's scale.
        overwrite: replace an existing file, but never an input.

    Raises:
        MissingFileError, FormatError, AdapterError: an input cannot be read.
        BaseMismatchError: the adapter was made for another base.
        OutputExistsError, OutputError: the output cannot be written.
        VerificationError: the written weights are wrong; the file was removed.
    """
    inputs = (base, adapter)
    check_output(output, overwrite=overwrite, inputs=inputs)
    checkpoint, loaded = read_base(base), formats.load(adapter)
    merged = merge(checkpoint.state, loaded, strength)
    reports: list[WeightReport] = []

    def check(written: Path) -> None:
        state = container.read_tensors(container.read_header(written))
        report = verify_weights(checkpoint.state, loaded, state, strength)
        if not report.ok:
            raise VerificationError("the merged weights are wrong; nothing was written", problems=report.problems)
        reports.append(report)

    receipt = {
        "adapter_sha256": state_sha256(loaded.factors),
        "base_sha256": state_sha256(checkpoint.state),
        "strength": float(strength),
    }
    write_base(
        merged,
        output,
        network=checkpoint.network or loaded.base.network,
        overwrite=overwrite,
        inputs=inputs,
        check=check,
        merged=[*checkpoint.document.get("merged", []), receipt],
    )
    return MergedFile(path=Path(output), sha256=state_sha256(merged), weights=reports[0])
