"""An unmerge names each fault of its inputs, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import files_of
from torch import nn

import loraio
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FormatError,
    LoraioError,
    MissingFileError,
    VerificationError,
)
from loraio.files import tensorfile


def rewritten(path: Path, name: str) -> None:
    """The same file with one bit of a tensor flipped."""
    header, data = tensorfile.read_header(path), bytearray(path.read_bytes())
    data[8 + header.header_bytes + header.tensors[name].begin + 40] ^= 1
    path.write_bytes(data)


def changed_residue(path: Path, **entries: Any) -> None:
    """The same residue with other entries in its document."""
    header = tensorfile.read_header(path)
    document = header.document() or {}
    said = {**document["residue"], **entries}
    tensorfile.write(
        tensorfile.read_tensors(header),
        path,
        document={**document, "residue": {key: value for key, value in said.items() if value != "drop"}},
        overwrite=True,
    )


def written_again(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """The same checkpoint with other tensors; None leaves one out."""
    found = loraio.read_base(path)
    state = {name: tensor for name, tensor in {**found.state, **changes}.items() if tensor is not None}
    tensorfile.write(state, path, document=found.document, overwrite=True)


def no_receipts(folder: Path) -> None:
    state = loraio.read_base(folder / "once").state
    tensorfile.write(state, folder / "once", document={"format_version": 1}, overwrite=True)


def no_residue_in_the_receipt(folder: Path) -> None:
    loraio.merge_file(folder / "base", folder / "three", folder / "once", overwrite=True)


def not_a_number(folder: Path) -> None:
    weight = loraio.read_base(folder / "once").state["conv1.weight"].clone()
    weight[0] = torch.nan
    written_again(folder / "once", {"conv1.weight": weight})


def wrong_shape(folder: Path) -> None:
    weight = loraio.read_base(folder / "once").state["conv1.weight"]
    written_again(folder / "once", {"conv1.weight": weight[:8].clone()})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def residue_of_version(folder: Path, version: int) -> None:
    path = folder / "once.residue"
    header = tensorfile.read_header(path)
    document = {**(header.document() or {}), "format_version": version}
    tensorfile.write(tensorfile.read_tensors(header), path, document=document, overwrite=True)


def odd_residue(folder: Path) -> None:
    odd = {"tensors": ["x"], "base_sha256": 5, "metadata": 3, "stripped": [], "strength": "x", "index": 1}
    changed_residue(folder / "once.residue", **odd)


def wrong_base(folder: Path) -> dict[str, Any]:
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), folder / "other")
    return by_base(folder, "other")


def damaged_beside_the_base(folder: Path, name: str) -> dict[str, Any]:
    rewritten(folder / "once", name)
    return by_base(folder)


def base_of_less(folder: Path) -> dict[str, Any]:
    written_again(folder / "once", {"fc.bias": None, "more": torch.zeros(2)})
    return by_base(folder)


def by_base(folder: Path, name: str = "base", **options: Any) -> dict[str, Any]:
    return {"adapter": None, "base": folder / name, **options}


Spoil = Callable[[Path], dict[str, Any] | None]
"""Spoils files of a chain; returns other options for `unmerge_file`."""

REFUSALS: dict[str, tuple[Spoil, type[LoraioError], str]] = {
    "no receipts": (no_receipts, FormatError, "has no receipts: loraio has merged nothing into it"),
    "no residue in the receipt": (
        no_residue_in_the_receipt,
        FormatError,
        "receipt 1 of 1 has no residue: it was not merged with --reversible",
    ),
    "target damaged": (
        lambda folder: rewritten(folder / "once", "conv2.weight"),
        VerificationError,
        "'conv2.weight' is not what its last merge left",
    ),
    "other tensor damaged": (
        lambda folder: rewritten(folder / "once", "fc.weight"),
        VerificationError,
        "'fc.weight' is not the base's, though no adapter was to change it",
    ),
    "not a number": (not_a_number, VerificationError, "'conv1.weight' is not what its last merge left"),
    "wrong shape": (wrong_shape, FormatError, r"'conv1.weight' is \(8, 1, 3, 3\) in the checkpoint, the adapter has"),
    "truncated": (lambda folder: truncated(folder / "once"), FormatError, "truncated: [0-9,]+ of"),
    "missing residue": (
        lambda folder: (folder / "once.residue").unlink(),
        MissingFileError,
        "once.residue' does not exist: the residue of the merge",
    ),
    "truncated residue": (lambda folder: truncated(folder / "once.residue"), FormatError, "truncated: [0-9,]+ of"),
    "damaged residue": (
        lambda folder: rewritten(folder / "once.residue", "conv2.weight"),
        FormatError,
        "the residue is not that of receipt 1 of 1, or it is damaged",
    ),
    "residue of another file": (
        lambda folder: {"residue": folder / "twice.residue"},
        FormatError,
        "the residue is not that of receipt 1 of 1, or it is damaged",
    ),
    "base as residue": (lambda folder: {"residue": folder / "base"}, FormatError, "is not a residue of a merge"),
    "newer residue": (
        lambda folder: residue_of_version(folder, 4),
        FormatError,
        r"residue version 4, this loraio reads version 3\n(?s:.*)a newer loraio",
    ),
    "older residue": (
        lambda folder: residue_of_version(folder, 2),
        FormatError,
        r"residue version 2, this loraio reads version 3\n(?s:.*)--base BASE",
    ),
    "lying residue": (
        lambda folder: changed_residue(folder / "once.residue", strength=0.25),
        FormatError,
        "strength is 0.25, the receipt has 1.0",
    ),
    "odd residue": (odd_residue, FormatError, "this residue was not written by loraio"),
    "residue of other tensors": (
        lambda folder: changed_residue(folder / "once.residue", tensors={"conv1.weight": "0" * 64}),
        FormatError,
        "'conv2.weight' is not in the checkpoint",
    ),
    "wrong adapter": (lambda folder: {"adapter": folder / "seven"}, AdapterError, "is not that of receipt 1 of 1"),
    "base as adapter": (lambda folder: {"adapter": folder / "base"}, FormatError, "is not an adapter but a base model"),
    "wrong base": (
        wrong_base,
        BaseMismatchError,
        r"the base has the digest \w{12}\.\., receipt 1 of 1 was merged into",
    ),
    "base and damaged tensor": (
        lambda folder: damaged_beside_the_base(folder, "fc.weight"),
        VerificationError,
        "'fc.weight' is not the base's, though no adapter",
    ),
    "base and damaged target": (
        lambda folder: damaged_beside_the_base(folder, "conv2.weight"),
        VerificationError,
        "'conv2.weight' is not what its last merge left",
    ),
    "base of less": (base_of_less, VerificationError, "(?s)'fc.bias' is missing.*'more' is not in the base"),
    "missing base": (lambda folder: by_base(folder, "nothing"), MissingFileError, "nothing' does not exist"),
    "adapter as base": (lambda folder: by_base(folder, "three"), FormatError, "is an adapter, not a base model"),
    "residue as base": (
        lambda folder: by_base(folder, "once.residue"),
        FormatError,
        "is the residue of a merge, not a base model",
    ),
    "neither": (lambda folder: {"adapter": None}, ConfigError, "one of the two"),
    "both": (lambda folder: {"base": folder / "base"}, ConfigError, "one of the two"),
    "residue with base": (
        lambda folder: by_base(folder, residue=folder / "once.residue"),
        ConfigError,
        "with the adapter, not with the base",
    ),
    "every with adapter": (lambda folder: {"every": True}, ConfigError, "only with the base"),
    "no workers": (lambda folder: {"workers": 0}, ConfigError, "there must be at least one worker"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_wrong_is_said_and_nothing_written(chain: Path, name: str) -> None:
    spoil, error, message = REFUSALS[name]
    options = {"adapter": chain / "three"} | (spoil(chain) or {})
    before = files_of(chain)
    with pytest.raises(error, match=message):
        loraio.unmerge_file(chain / "once", chain / "again", **options)
    assert files_of(chain) == before


def test_a_file_that_says_another_digest_than_it_has_is_refused(chain: Path) -> None:
    """One of a loraio that did not yet say which tensors a merge changed."""
    found = loraio.read_base(chain / "once")
    merged = [{key: value for key, value in found.document["merged"][0].items() if key != "changed"}]
    document = {**found.document, "merged": merged}
    tensorfile.write(found.state, chain / "old", document=document)
    assert loraio.unmerge_file(chain / "old", chain / "a", base=chain / "base").sha256
    rewritten(chain / "old", "conv2.weight")
    with pytest.raises(VerificationError, match=r"its tensors have the digest .* its metadata say"):
        loraio.unmerge_file(chain / "old", chain / "b", base=chain / "base")
    assert not (chain / "b").exists()


def test_a_pickle_has_no_receipts(chain: Path, trained_base: nn.Module) -> None:
    torch.save(trained_base.state_dict(), chain / "m.pt")
    with pytest.raises(FormatError, match="a pickle, which has no receipts"):
        loraio.unmerge_file(chain / "m.pt", chain / "b", base=chain / "base")
