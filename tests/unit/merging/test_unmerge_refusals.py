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
from loraio.errors import AdapterError, BaseMismatchError, ConfigError, FormatError, MissingFileError, VerificationError
from loraio.files import tensorfile

Spoil = Callable[[Path], dict[str, Any] | None]
"""Spoils files of a chain; returns other options for `unmerge_file`."""


def flip_a_bit(path: Path, name: str) -> None:
    header, data = tensorfile.read_header(path), bytearray(path.read_bytes())
    data[8 + header.header_bytes + header.tensors[name].begin + 40] ^= 1
    path.write_bytes(data)


def damaged(file: str, name: str) -> Spoil:
    return lambda folder: flip_a_bit(folder / file, name)


def truncated(file: str) -> Spoil:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-5]) and None


def residue_with(version: int = 3, **entries: Any) -> Spoil:
    """Write the residue with other entries in its document."""

    def spoil(folder: Path) -> None:
        header = tensorfile.read_header(folder / "once.residue")
        document = header.document() or {}
        document |= {"format_version": version, "residue": document["residue"] | entries}
        tensorfile.write(tensorfile.read_tensors(header), header.path, document=document, overwrite=True)

    return spoil


def checkpoint_with(change: Callable[[dict[str, torch.Tensor]], object], **options: Any) -> Spoil:
    """Write the merged checkpoint with other tensors."""

    def spoil(folder: Path) -> dict[str, Any]:
        found = loraio.read_base(folder / "once")
        state = {name: tensor.clone() for name, tensor in found.state.items()}
        change(state)
        tensorfile.write(state, folder / "once", document=options.get("document", found.document), overwrite=True)
        return by_base(folder) if options.get("by_base") else {}

    return spoil


def by_base(folder: Path, name: str = "base", **options: Any) -> dict[str, Any]:
    return {"adapter": None, "base": folder / name, **options}


def by_base_with_damage(name: str) -> Spoil:
    return lambda folder: by_base(folder) if damaged("once", name)(folder) is None else None


def wrong_base(folder: Path) -> dict[str, Any]:
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), folder / "other")
    return by_base(folder, "other")


def not_reversible(folder: Path) -> None:
    loraio.merge_file(folder / "base", folder / "three", folder / "once", overwrite=True)


ODD = {"tensors": ["x"], "base_sha256": 5, "metadata": 3, "stripped": [], "strength": "x", "index": 1}
NO_RECEIPTS = {"format_version": 1}
BY_BASE_OF_LESS = checkpoint_with(lambda state: state.update(more=torch.zeros(2)) or state.pop("fc.bias"), by_base=True)

REFUSALS: dict[type[Exception], dict[str, tuple[Spoil, str]]] = {
    FormatError: {
        "no receipts": (checkpoint_with(dict, document=NO_RECEIPTS), "has no receipts: loraio has merged nothing into"),
        "no residue": (not_reversible, "receipt 1 of 1 has no residue: it was not merged with --reversible"),
        "wrong shape": (
            checkpoint_with(lambda state: state.update({"conv1.weight": state["conv1.weight"][:8].clone()})),
            r"'conv1.weight' is \(8, 1, 3, 3\) in the checkpoint, the adapter has",
        ),
        "truncated": (truncated("once"), "truncated: [0-9,]+ of"),
        "truncated residue": (truncated("once.residue"), "truncated: [0-9,]+ of"),
        "damaged residue": (damaged("once.residue", "conv2.weight"), "not that of receipt 1 of 1, or it is damaged"),
        "residue of another file": (
            lambda folder: {"residue": folder / "twice.residue"},
            "the residue is not that of receipt 1 of 1, or it is damaged",
        ),
        "base as residue": (lambda folder: {"residue": folder / "base"}, "is not a residue of a merge"),
        "newer residue": (residue_with(4), r"residue version 4, this loraio reads version 3\n(?s:.*)a newer loraio"),
        "older residue": (residue_with(2), r"residue version 2, this loraio reads version 3\n(?s:.*)--base BASE"),
        "lying residue": (residue_with(strength=0.25), "strength is 0.25, the receipt has 1.0"),
        "odd residue": (residue_with(**ODD), "this residue was not written by loraio"),
        "residue of other tensors": (
            residue_with(tensors={"conv1.weight": "0" * 64}),
            "'conv2.weight' is not in the checkpoint",
        ),
        "base as adapter": (lambda folder: {"adapter": folder / "base"}, "is not an adapter but a base model"),
        "adapter as base": (lambda folder: by_base(folder, "three"), "is an adapter, not a base model"),
        "residue as base": (lambda folder: by_base(folder, "once.residue"), "the residue of a merge, not a base model"),
    },
    VerificationError: {
        "damaged target": (damaged("once", "conv2.weight"), "'conv2.weight' is not what its last merge left"),
        "damaged tensor": (
            damaged("once", "fc.weight"),
            "'fc.weight' is not the base's, though no adapter was to change it",
        ),
        "not a number": (
            checkpoint_with(lambda state: state["conv1.weight"][0].fill_(torch.nan)),
            "'conv1.weight' is not what its last merge left",
        ),
        "base, damaged tensor": (by_base_with_damage("fc.weight"), "'fc.weight' is not the base's, though no adapter"),
        "base, damaged target": (by_base_with_damage("conv2.weight"), "'conv2.weight' is not what its last merge left"),
        "base of less": (BY_BASE_OF_LESS, "(?s)'fc.bias' is missing.*'more' is not in the base"),
    },
    MissingFileError: {
        "missing residue": (
            lambda folder: (folder / "once.residue").unlink(),
            "once.residue' does not exist: the residue of the merge",
        ),
        "missing base": (lambda folder: by_base(folder, "nothing"), "nothing' does not exist"),
    },
    AdapterError: {"wrong adapter": (lambda folder: {"adapter": folder / "seven"}, "is not that of receipt 1 of 1")},
    BaseMismatchError: {"wrong base": (wrong_base, r"the digest \w{12}\.\., receipt 1 of 1 was merged into")},
    ConfigError: {
        "neither": (lambda folder: {"adapter": None}, "one of the two"),
        "both": (lambda folder: {"base": folder / "base"}, "one of the two"),
        "residue with base": (lambda folder: by_base(folder, residue=folder / "x"), "the adapter, not with the base"),
        "every with adapter": (lambda folder: {"every": True}, "only with the base"),
        "no workers": (lambda folder: {"workers": 0}, "there must be at least one worker"),
    },
}


@pytest.mark.parametrize(("error", "name"), [(error, name) for error, rows in REFUSALS.items() for name in rows])
def test_what_is_wrong_is_said_and_nothing_written(chain: Path, error: type[Exception], name: str) -> None:
    spoil, message = REFUSALS[error][name]
    options = {"adapter": chain / "three"} | (spoil(chain) or {})
    before = files_of(chain)
    with pytest.raises(error, match=message):
        loraio.unmerge_file(chain / "once", chain / "again", **options)
    assert files_of(chain) == before


def test_a_file_that_says_another_digest_than_it_has_is_refused(chain: Path) -> None:
    """One of a loraio that did not yet say which tensors a merge changed."""
    found = loraio.read_base(chain / "once")
    merged = [{key: value for key, value in found.document["merged"][0].items() if key != "changed"}]
    tensorfile.write(found.state, chain / "old", document={**found.document, "merged": merged})
    assert loraio.unmerge_file(chain / "old", chain / "a", base=chain / "base").sha256
    flip_a_bit(chain / "old", "conv2.weight")
    with pytest.raises(VerificationError, match=r"its tensors have the digest .* its metadata say"):
        loraio.unmerge_file(chain / "old", chain / "b", base=chain / "base")
    assert not (chain / "b").exists()


def test_a_pickle_has_no_receipts(chain: Path, trained_base: nn.Module) -> None:
    torch.save(trained_base.state_dict(), chain / "m.pt")
    with pytest.raises(FormatError, match="a pickle, which has no receipts"):
        loraio.unmerge_file(chain / "m.pt", chain / "b", base=chain / "base")
