"""Merge receipts: the same from memory and from files, and their objections to the next merge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraio
from loraio.bases.receipts import read_receipts
from loraio.errors import AlreadyMergedError, BaseMismatchError, FormatError
from loraio.files import tensorfile

Words = tuple[Path, Path, Path]
"""Base, adapter and output of a merge."""


@pytest.fixture
def words(files: Path, tmp_path: Path) -> Callable[[str], Words]:
    """Returns the words of a merge of an adapter into the file that has three in it already."""
    return lambda name: (files / "merged.safetensors", files / f"{name}.safetensors", tmp_path / "out.safetensors")


def merged_model(model: nn.Module, adapter: loraio.Adapter, strength: float = 1.0, **options: Any) -> nn.Module:
    """A copy with the adapter merged in."""
    made = copy.deepcopy(model)
    made.load_state_dict(loraio.merge(model.state_dict(), adapter, strength, **options))
    return made


@pytest.mark.parametrize("exact", [True, False])
def test_a_merge_in_memory_is_saved_as_the_bytes_of_a_merge_of_files(
    files: Path, trained_base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, tmp_path: Path, exact: bool
) -> None:
    once, twice = (tmp_path / f"{name}.safetensors" for name in ("once", "twice"))
    loraio.merge_file(files / "base.safetensors", files / "three.safetensors", once, strength=0.5, exact=exact)
    loraio.merge_file(once, files / "seven.safetensors", twice, exact=exact, force=True)
    path, base = tmp_path / "memory.safetensors", loraio.load_base(files / "base.safetensors")
    first = merged_model(base, three, 0.5, exact=exact)
    receipts = [loraio.receipt(base.state_dict(), first.state_dict(), three, 0.5, exact=exact)]
    loraio.save_base(first, path, receipts=receipts)
    same(path, once, bytes_too=exact)
    second = merged_model(first, seven, exact=exact, receipts=receipts, force=True)
    receipts += [
        loraio.receipt(
            first.state_dict(), second.state_dict(), seven, exact=exact, receipts=receipts, force=True
        )
    ]  # fmt: skip
    loraio.save_base(second, path, receipts=receipts, overwrite=True)
    same(path, twice, bytes_too=exact)


def same(path: Path, other: Path, *, bytes_too: bool) -> None:
    """Sums in float32 may end in other bits where the weights lie elsewhere in memory; the receipts say the same."""
    if bytes_too:
        assert path.read_bytes() == other.read_bytes()
        return
    found, expected = loraio.read_base(path), loraio.read_base(other)
    for one, two in zip(found.receipts, expected.receipts, strict=True):
        assert replace(one, changed={}, base_sha256="0" * 64) == replace(two, changed={}, base_sha256="0" * 64)
    for name, tensor in expected.state.items():
        assert torch.allclose(found.state[name], tensor, rtol=0, atol=1e-5), name


def test_a_receipt_survives_being_written_and_read(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), other)
    made = loraio.merge_file(
        other, files / "three.safetensors", tmp_path / "m.safetensors", allow_base_mismatch=True, exact=False
    ).receipt
    assert made.base_mismatch
    assert not made.exact
    assert read_receipts({"merged": [made.document() | {"later": 1}]}, where="x")[0].extra == {"later": 1}
    assert read_receipts({"merged": [made.document()]}, where="x") == (made,)


def test_the_same_adapter_is_not_merged_twice_unless_forced(words: Callable[[str], Words], tmp_path: Path) -> None:
    base, three, path = words("three")
    for options in ({}, {"allow_base_mismatch": True}):
        with pytest.raises(AlreadyMergedError, match=r"was merged into this file already \(receipt 1 of 1\)"):
            loraio.merge_file(base, three, path, **options)
    assert not path.exists()
    done = loraio.merge_file(base, three, path, force=True).receipt
    assert done.forced == (f"adapter {done.adapter_sha256[:12]}.. was merged into this file already (receipt 1 of 1)",)
    assert done.base_mismatch == ()
    assert loraio.read_base(path).receipts[1] == done
    with pytest.raises(AlreadyMergedError, match=r"\(receipt 2 of 2\)"):
        loraio.merge_file(path, three, tmp_path / "third.safetensors")


def test_another_adapter_is_not_merged_into_a_merged_file_unless_forced(words: Callable[[str], Words]) -> None:
    base, adapter, path = words("seven")
    with pytest.raises(AlreadyMergedError, match="was made for what this file was before receipt 1 of 1") as refusal:
        loraio.merge_file(base, adapter, path)
    assert "--force" in str(refusal.value)
    assert "before receipt 1 of 1" in loraio.merge_file(base, adapter, path, force=True).receipt.forced[0]
    merged, seven, found = loraio.read_base(base).state, loraio.load(adapter), loraio.read_base(path).state
    expected = loraio.merge(merged, seven, allow_base_mismatch=True)
    assert all(found[name].equal(expected[name]) for name in expected)
    assert loraio.verify_weights(merged, seven, found, allow_base_mismatch=True).ok


def test_an_adapter_that_was_made_for_the_merged_file_needs_no_force(
    files: Path, digits: loraio.Dataset, tmp_path: Path
) -> None:
    merged = loraio.load_base(files / "merged.safetensors")
    loraio.save(loraio.train(merged, loraio.TrainConfig(digit=1, rank=1, steps=3), digits), tmp_path / "second")
    done = loraio.merge_file(files / "merged.safetensors", tmp_path / "second", tmp_path / "twice")
    assert done.receipt.forced == ()
    assert done.receipt.base_sha256 == loraio.read_base(files / "merged.safetensors").document["sha256"]


def test_an_adapter_of_another_tool_is_not_taken_for_one_of_the_merged_file(
    words: Callable[[str], Words], tmp_path: Path
) -> None:
    for name in ("three", "seven"):
        base, path, output = words(name)
        loraio.convert(path, tmp_path / name, to="peft")
    seven = tmp_path / "seven"
    with pytest.raises(AlreadyMergedError, match="was made for what this file was before receipt 1 of 1"):
        loraio.merge_file(base, seven, output)  # the file names its base where PEFT does not look
    assert loraio.merge_file(base, seven, output, force=True).receipt.base_mismatch == ()
    tensors = seven / "adapter_model.safetensors"
    save_file(load_file(tensors), tensors, metadata={"format": "pt"})  # as PEFT itself would have written it
    with pytest.raises(AlreadyMergedError, match="it has 1 receipt of merges"):
        loraio.merge_file(base, seven, output, overwrite=True)
    assert loraio.merge_file(base, seven, output, force=True, overwrite=True).receipt.forced
    with pytest.raises(AlreadyMergedError, match="was merged into this file already"):
        loraio.merge_file(base, tmp_path / "three", output, overwrite=True)


@pytest.mark.parametrize("name", ["fc.bias", "conv2.weight"])
def test_force_permits_only_differences_that_the_receipts_explain(
    words: Callable[[str], Words], tmp_path: Path, name: str
) -> None:
    base, seven, output = words("seven")
    found, changed = loraio.read_base(base), tmp_path / "changed.safetensors"
    state = {key: tensor.clone() for key, tensor in found.state.items()}
    state[name].view(-1)[0] += 1
    tensorfile.write(state, changed, document=dict(found.document))
    with pytest.raises(BaseMismatchError, match="does not belong to this base"):
        loraio.merge_file(changed, seven, output, force=True)
    done = loraio.merge_file(changed, seven, output, force=True, allow_base_mismatch=True)
    assert done.receipt.forced
    assert done.receipt.base_mismatch


def test_an_unknown_base_with_receipts_needs_force_and_leave_for_its_mismatch(files: Path, tmp_path: Path) -> None:
    other, merged = tmp_path / "other.safetensors", tmp_path / "merged.safetensors"
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), other)
    loraio.merge_file(other, files / "three.safetensors", merged, allow_base_mismatch=True)
    words = (merged, files / "seven.safetensors", tmp_path / "both.safetensors")
    with pytest.raises(BaseMismatchError, match="does not belong to this base") as refusal:
        loraio.merge_file(*words, force=True)
    assert not isinstance(refusal.value, AlreadyMergedError)
    with pytest.raises(AlreadyMergedError, match="has 1 receipt"):
        loraio.merge_file(*words, allow_base_mismatch=True)
    done = loraio.merge_file(*words, force=True, allow_base_mismatch=True)
    assert (len(done.receipt.forced), len(done.receipt.base_mismatch)) == (1, 3)


def test_in_memory_the_receipts_are_the_caller_s_to_give(
    trained_base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter
) -> None:
    base = trained_base.state_dict()
    merged = loraio.merge(base, three)
    receipts = [loraio.receipt(base, merged, three)]
    with pytest.raises(AlreadyMergedError, match="already"):
        loraio.merge(merged, three, receipts=receipts)
    with pytest.raises(AlreadyMergedError, match="before receipt 1 of 1"):
        loraio.merge(merged, seven, receipts=receipts)
    with pytest.raises(BaseMismatchError):
        loraio.merge(merged, seven, force=True)  # no receipts, nothing explained
    both = loraio.merge(merged, seven, receipts=receipts, force=True)
    assert loraio.receipt(merged, both, seven, receipts=receipts, force=True).base_mismatch == ()
    wrong = merged | {"conv2.weight": merged["conv2.weight"] + 1}
    with pytest.raises(BaseMismatchError, match=r"'conv2\.weight': other weights"):
        loraio.merge(wrong, seven, receipts=receipts, force=True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"strength": "much"}, "strength is 'much'"),
        ({"strength": 1}, "adapter_sha256 is None, not a digest"),
        ({"changed": [1]}, r"changed is \[1\], not an object"),
        ({"changed": {"a": "b"}}, "changed: 'a' has no digest"),
        ({"forced": "yes"}, "forced is 'yes', not a list of lines"),
        ({"sums": "float16"}, "sums is 'float16'"),
        ({"residue_sha256": 5}, "residue_sha256 is 5"),
    ],
)
def test_a_receipt_that_loraio_did_not_write_is_refused_by_a_merge(
    files: Path, tmp_path: Path, entry: Mapping[str, Any], message: str
) -> None:
    good = {} if entry == {"strength": 1} else {"adapter_sha256": "0" * 64, "base_sha256": "0" * 64, "strength": 1.0}
    path = tmp_path / "odd.safetensors"
    tensorfile.write({"a": torch.zeros(2)}, path, document={"format_version": 1, "merged": [good | entry]})
    assert loraio.read_base(path).state["a"].numel() == 2
    with pytest.raises(FormatError, match=message) as refusal:
        loraio.merge_file(path, files / "three.safetensors", tmp_path / "m.safetensors")
    assert str(path) in str(refusal.value)


def test_a_sharded_checkpoint_keeps_its_receipts_in_the_index(
    files: Path, write_parts: Callable[..., Path], tmp_path: Path
) -> None:
    index = write_parts(loraio.read_base(files / "base.safetensors").state, tmp_path / "parts")
    first = loraio.merge_file(index, files / "three.safetensors", tmp_path / "once").receipt
    with pytest.raises(AlreadyMergedError, match="receipt 1 of 1"):
        loraio.merge_file(tmp_path / "once", files / "three.safetensors", tmp_path / "twice")
    second = loraio.merge_file(tmp_path / "once", files / "seven.safetensors", tmp_path / "twice", force=True).receipt
    assert loraio.read_base(tmp_path / "twice").receipts == (first, second)
