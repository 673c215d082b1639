"""Merges taken back: the base bit for bit, or a clear word why not, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapter_of, case, files_of, names_in, parted, saved
from safetensors.torch import load_file, save_file
from strategies import tensor
from torch import nn

import loraio
from loraio.adapter import Adapter, WholeTensor
from loraio.adapter.kinds import KINDS
from loraio.bases.identity import state_sha256, tensor_sha256
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FormatError,
    LoraioError,
    MissingFileError,
    OutputError,
    OutputExistsError,
    VerificationError,
)
from loraio.files import tensorfile
from loraio.files.copying import Inputs
from loraio.files.sharded import INDEX_SUFFIX
from loraio.files.tensors import dtype_code
from loraio.merging import residue_files, residue_writer

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def reversible(state: dict[str, torch.Tensor], adapter: Adapter, folder: Path, **options: Any) -> tuple[Path, Path]:
    """A merged checkpoint with its residue, and the adapter's file."""
    base, path = saved(state, adapter, folder)
    loraio.merge_file(base, path, folder / "merged", reversible=True, **options)
    return folder / "merged", path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [True, False])
def test_the_base_comes_back_without_it(tmp_path: Path, dtype: torch.dtype, kind: str, exact: bool) -> None:
    state, adapter = case(dtype, kind)
    merged, path = reversible(state, adapter, tmp_path, strength=0.7, exact=exact)
    before = (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "base.safetensors").unlink()
    done = loraio.unmerge_file(merged, tmp_path / "again", adapter=path, workers=3)
    assert (tmp_path / "again").read_bytes() == before
    assert done.sha256 == state_sha256(state)
    assert [receipt.strength for receipt in done.taken_off] == [0.7]
    assert done.left == ()


@pytest.mark.parametrize("workers", [1, 4])
def test_a_residue_has_the_same_bytes_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    state, adapter = case()
    merged, _ = reversible(state, adapter, tmp_path)
    other, _ = reversible(state, adapter, tmp_path / "other", workers=workers)
    assert merged.read_bytes() == other.read_bytes()
    assert residue_of(merged).read_bytes() == residue_of(other).read_bytes()


def residue_of(merged: Path) -> Path:
    return merged.with_name(merged.name + residue_files.SUFFIX)


def test_what_the_residue_takes_is_said(tmp_path: Path) -> None:
    state, adapter = case(torch.float32)
    base, path = saved(state, adapter, tmp_path)
    kept = loraio.merge_file(base, path, tmp_path / "merged", reversible=True).residue
    assert kept is not None
    assert kept.path == residue_of(tmp_path / "merged")
    assert kept.bytes == kept.path.stat().st_size
    assert kept.weights == sum(state[name].numel() for name in adapter.targets)
    header = tensorfile.read_header(kept.path)
    assert 8 * header.tensors["Linear.weight"].shape[0] / state["Linear.weight"].numel() < 3
    assert kept.coded == sum(info.end - info.begin for info in header.tensors.values())
    assert kept.bits_per_weight == 8 * kept.coded / kept.weights
    assert 0 < kept.share < 0.2
    assert loraio.merge_file(base, path, tmp_path / "plain").residue is None
    plain, merged = (tensorfile.read_header(tmp_path / name) for name in ("plain", "merged"))
    assert plain.tensors == merged.tensors  # a checkpoint like any other
    assert load_file(tmp_path / "merged").keys() == state.keys()


def test_a_base_with_a_prefix_and_metadata_comes_back_to_the_byte(tmp_path: Path) -> None:
    state, adapter = case()
    base, path = saved(state, adapter, tmp_path)
    save_file({f"module.{name}": values for name, values in state.items()}, base, metadata={"format": "pt"})
    loraio.merge_file(base, path, tmp_path / "merged", reversible=True)
    loraio.unmerge_file(tmp_path / "merged", tmp_path / "a", adapter=path)
    loraio.unmerge_file(tmp_path / "merged", tmp_path / "b", base=base)
    assert base.read_bytes() == (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_pickled_base_comes_back_as_a_checkpoint_of_ours(tmp_path: Path) -> None:
    state, adapter = case()
    _, path = saved(state, adapter, tmp_path)
    torch.save(state, tmp_path / "base.pt")
    loraio.merge_file(tmp_path / "base.pt", path, tmp_path / "merged", reversible=True)
    for name, way in (("a", {"adapter": path}), ("b", {"base": tmp_path / "base.pt"})):
        loraio.unmerge_file(tmp_path / "merged", tmp_path / name, **way)
        found = loraio.read_base(tmp_path / name)
        assert loraio.bases.identity.digests(found.state) == loraio.bases.identity.digests(state)
        assert found.document == {"format_version": 2, "sha256": state_sha256(state)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_parted_base_comes_back_in_its_parts(tmp_path: Path, prefix: str) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", count=4, prefix=prefix)
    index = json.loads((base / f"model{INDEX_SUFFIX}").read_text())
    loraio.merge_file(base, path, tmp_path / "merged", reversible=True)
    assert residue_of(tmp_path / "merged").is_file()
    for name, way in (("a", {"adapter": path}), ("b", {"base": base})):
        done = loraio.unmerge_file(tmp_path / "merged", tmp_path / name, **way)
        assert done.path == tmp_path / name / f"model{INDEX_SUFFIX}"
        found, expected = files_of(tmp_path / name), files_of(base)
        assert [str(part) for part in done.parts] == [
            str(tmp_path / name / f) for f in expected if INDEX_SUFFIX not in f
        ]
        assert json.loads(found.pop(done.path.name)) == json.loads(expected.pop(done.path.name)) == index
        assert found == expected
    inside = tmp_path / "a" / done.path.name  # into a folder that is there
    (tmp_path / "merged" / done.path.name).rename(tmp_path / "merged" / f"x{INDEX_SUFFIX}")
    loraio.unmerge_file(tmp_path / "merged" / f"x{INDEX_SUFFIX}", inside, base=base, overwrite=True)
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]
    loraio.unmerge_file(tmp_path / "merged", tmp_path / "one.safetensors", adapter=path)
    one = loraio.read_base(tmp_path / "one.safetensors")
    assert state_sha256(one.state) == done.sha256
    with pytest.raises(OutputExistsError):
        loraio.unmerge_file(tmp_path / "merged", inside, base=base)
    with pytest.raises(OutputExistsError, match="also an input"):
        loraio.unmerge_file(tmp_path / "merged", base / done.path.name, base=base, overwrite=True)


def test_a_parted_base_that_was_merged_into_one_file_comes_back_in_one(tmp_path: Path) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", prefix="module.")
    merged = tmp_path / "merged.safetensors"
    loraio.merge_file(base, path, merged, reversible=True)
    loraio.unmerge_file(merged, tmp_path / "a", adapter=path)
    assert loraio.read_base(tmp_path / "a").document["sha256"] == state_sha256(state)
    assert loraio.unmerge_file(merged, tmp_path / "b", base=base).parts
    with pytest.raises(OutputError, match="is an index"):
        loraio.unmerge_file(merged, tmp_path / f"x{INDEX_SUFFIX}", adapter=path)


def whole_case() -> tuple[dict[str, torch.Tensor], Adapter]:
    """An adapter with a head of another size, and a tensor that is replaced by its like."""
    state, adapter = case(torch.float32)
    state |= {"head.weight": torch.randn(3, 5), "norm.num_batches_tracked": torch.tensor(3)}
    tensors = {"head.weight": torch.randn(7, 5), "norm.num_batches_tracked": torch.tensor(9)}
    roles = {"head.weight": "head", "norm.num_batches_tracked": "norm"}
    whole = {
        name: WholeTensor(
            role=roles[name],
            shape=tuple(tensor.shape),
            dtype=dtype_code(tensor.dtype),
            base_sha256=tensor_sha256(state[name]),
            base_shape=tuple(state[name].shape),
        )
        for name, tensor in tensors.items()
    }
    reference = replace(adapter.base, sha256=state_sha256(state), network="net", heads={"head": 3, "other": 2})
    return state, replace(adapter, base=reference, whole=whole, tensors=tensors)


def test_tensors_that_were_replaced_whole_come_back(tmp_path: Path) -> None:
    state, adapter = whole_case()
    merged, path = reversible(state, adapter, tmp_path)
    assert loraio.read_base(merged).heads == {"head": 7, "other": 2}
    loraio.unmerge_file(merged, tmp_path / "again", adapter=path)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "base.safetensors").unlink()
    torch.save(state, tmp_path / "base.pt")
    loraio.merge_file(tmp_path / "base.pt", path, merged, reversible=True, overwrite=True)
    loraio.unmerge_file(merged, tmp_path / "again", adapter=path, overwrite=True)
    found = loraio.read_base(tmp_path / "again")
    assert (found.network, found.heads) == ("net", {"head": 3, "other": 2})
    assert loraio.bases.identity.digests(found.state) == loraio.bases.identity.digests(state)


def test_specials_come_back_with_all_their_bits(tmp_path: Path) -> None:
    state, adapter = case(torch.float32)
    bits = state["Linear.weight"].view(torch.int32)
    odd = [0x7FC00001, -0x400001 + 1, 0x7F800000, -0x800000, 0, -(2**31), 1, -(2**31) + 1, 0x7F7FFFFF, 0x00800000]
    bits[0, : len(odd)] = torch.tensor(odd, dtype=torch.int64).to(torch.int32)
    state["Linear.weight"][1] *= 1e-30  # all of it is lost in the sum
    targets = dict(adapter.targets)
    targets["Linear.weight"] = replace(
        targets["Linear.weight"], base_sha256=tensor_sha256(state["Linear.weight"]), alpha=1e-3
    )  # fmt: skip
    adapter = replace(adapter, targets=targets, base=replace(adapter.base, sha256=state_sha256(state)))
    merged, path = reversible(state, adapter, tmp_path)
    loraio.unmerge_file(merged, tmp_path / "again", adapter=path)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


@pytest.fixture
def chain(files: Path, tmp_path: Path) -> Path:
    """base, once and twice, each reversible; and the adapters."""
    for name in ("base", "three", "seven"):
        shutil.copy(files / f"{name}.safetensors", tmp_path / name)
    loraio.merge_file(tmp_path / "base", tmp_path / "three", tmp_path / "once", reversible=True)
    loraio.merge_file(
        tmp_path / "once", tmp_path / "seven", tmp_path / "twice", reversible=True, force=True, strength=0.5
    )
    return tmp_path


def test_a_chain_is_taken_apart_link_by_link_or_at_once(chain: Path) -> None:
    done = loraio.unmerge_file(chain / "twice", chain / "a", adapter=chain / "seven")
    assert (len(done.taken_off), len(done.left)) == (1, 1)
    assert (chain / "a").read_bytes() == (chain / "once").read_bytes()
    loraio.unmerge_file(chain / "a", chain / "b", adapter=chain / "three", residue=chain / "once.residue")
    assert (chain / "b").read_bytes() == (chain / "base").read_bytes()
    loraio.unmerge_file(chain / "twice", chain / "c", base=chain / "once")
    assert (chain / "c").read_bytes() == (chain / "once").read_bytes()
    done = loraio.unmerge_file(chain / "twice", chain / "d", base=chain / "base", every=True)
    assert (len(done.taken_off), len(done.left)) == (2, 0)
    assert (chain / "d").read_bytes() == (chain / "base").read_bytes()
    with pytest.raises(BaseMismatchError, match="receipt 2 of 2 was merged into") as refusal:
        loraio.unmerge_file(chain / "twice", chain / "e", base=chain / "base")
    assert "--all" in str(refusal.value)
    with pytest.raises(AdapterError, match=r"not that of receipt 2 of 2.*but that of receipt 1"):
        loraio.unmerge_file(chain / "twice", chain / "e", adapter=chain / "three")
    assert not (chain / "e").exists()


def test_an_adapter_of_another_tool_takes_its_merge_back(files: Path, tmp_path: Path) -> None:
    loraio.convert(files / "three.safetensors", tmp_path / "peft", to="peft")
    loraio.merge_file(files / "base.safetensors", tmp_path / "peft", tmp_path / "merged", reversible=True)
    loraio.unmerge_file(tmp_path / "merged", tmp_path / "again", adapter=tmp_path / "peft")
    assert (tmp_path / "again").read_bytes() == (files / "base.safetensors").read_bytes()


# What is refused


Spoil = Callable[[Path], dict[str, Any]]


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


def no_receipts(folder: Path) -> dict[str, Any]:
    found = loraio.read_base(folder / "once")
    tensorfile.write(found.state, folder / "once", document={"format_version": 1}, overwrite=True)
    return {}


def no_residue_in_the_receipt(folder: Path) -> dict[str, Any]:
    loraio.merge_file(folder / "base", folder / "three", folder / "once", overwrite=True)
    return {}


def target_damaged(folder: Path) -> dict[str, Any]:
    rewritten(folder / "once", "conv2.weight")
    return {}


def another_tensor_damaged(folder: Path) -> dict[str, Any]:
    rewritten(folder / "once", "fc.weight")
    return {}


def not_a_number(folder: Path) -> dict[str, Any]:
    found = loraio.read_base(folder / "once")
    state = {name: tensor.clone() for name, tensor in found.state.items()}
    state["conv1.weight"][0] = torch.nan
    tensorfile.write(state, folder / "once", document=found.document, overwrite=True)
    return {}


def wrong_shape(folder: Path) -> dict[str, Any]:
    found = loraio.read_base(folder / "once")
    state = found.state | {"conv1.weight": found.state["conv1.weight"][:8].clone()}
    tensorfile.write(state, folder / "once", document=found.document, overwrite=True)
    return {}


def truncated(folder: Path) -> dict[str, Any]:
    (folder / "once").write_bytes((folder / "once").read_bytes()[:-5])
    return {}


def missing_residue(folder: Path) -> dict[str, Any]:
    (folder / "once.residue").unlink()
    return {}


def truncated_residue(folder: Path) -> dict[str, Any]:
    path = folder / "once.residue"
    path.write_bytes(path.read_bytes()[:-5])
    return {}


def damaged_residue(folder: Path) -> dict[str, Any]:
    rewritten(folder / "once.residue", "conv2.weight")
    return {}


def residue_of_another_file(folder: Path) -> dict[str, Any]:
    return {"residue": folder / "twice.residue"}


def no_residue_at_all(folder: Path) -> dict[str, Any]:
    return {"residue": folder / "base"}


def with_version(folder: Path, version: int) -> dict[str, Any]:
    path = folder / "once.residue"
    header = tensorfile.read_header(path)
    document = {**(header.document() or {}), "format_version": version}
    tensorfile.write(tensorfile.read_tensors(header), path, document=document, overwrite=True)
    return {}


def newer_residue(folder: Path) -> dict[str, Any]:
    return with_version(folder, 4)


def older_residue(folder: Path) -> dict[str, Any]:
    return with_version(folder, 2)


def lying_residue(folder: Path) -> dict[str, Any]:
    changed_residue(folder / "once.residue", strength=0.25)
    return {}


def odd_residue(folder: Path) -> dict[str, Any]:
    changed_residue(
        folder / "once.residue", tensors=["x"], base_sha256=5, metadata=3, stripped=[], strength="x", index=1
    )
    return {}


def residue_of_other_tensors(folder: Path) -> dict[str, Any]:
    changed_residue(folder / "once.residue", tensors={"conv1.weight": "0" * 64})
    return {}


def wrong_adapter(folder: Path) -> dict[str, Any]:
    return {"adapter": folder / "seven"}


def base_as_adapter(folder: Path) -> dict[str, Any]:
    return {"adapter": folder / "base"}


def wrong_base(folder: Path) -> dict[str, Any]:
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), folder / "other")
    return {"adapter": None, "base": folder / "other"}


def wrong_base_and_damaged(folder: Path) -> dict[str, Any]:
    rewritten(folder / "once", "fc.weight")
    return {"adapter": None, "base": folder / "base"}


def base_and_damaged_target(folder: Path) -> dict[str, Any]:
    rewritten(folder / "once", "conv2.weight")
    return {"adapter": None, "base": folder / "base"}


def base_of_less(folder: Path) -> dict[str, Any]:
    found = loraio.read_base(folder / "once")
    state = {name: tensor for name, tensor in found.state.items() if name != "fc.bias"}
    tensorfile.write(state | {"more": torch.zeros(2)}, folder / "once", document=found.document, overwrite=True)
    return {"adapter": None, "base": folder / "base"}


def missing_base(folder: Path) -> dict[str, Any]:
    return {"adapter": None, "base": folder / "nothing"}


def adapter_as_base(folder: Path) -> dict[str, Any]:
    return {"adapter": None, "base": folder / "three"}


def residue_as_base(folder: Path) -> dict[str, Any]:
    return {"adapter": None, "base": folder / "once.residue"}


def neither(folder: Path) -> dict[str, Any]:
    return {"adapter": None}


def both(folder: Path) -> dict[str, Any]:
    return {"base": folder / "base"}


def residue_with_base(folder: Path) -> dict[str, Any]:
    return {"adapter": None, "base": folder / "base", "residue": folder / "once.residue"}


def every_with_adapter(folder: Path) -> dict[str, Any]:
    return {"every": True}


def no_workers(folder: Path) -> dict[str, Any]:
    return {"workers": 0}


REFUSALS: list[tuple[Spoil, type[LoraioError], str]] = [
    (no_receipts, FormatError, "has no receipts: loraio has merged nothing into it"),
    (no_residue_in_the_receipt, FormatError, "receipt 1 of 1 has no residue: it was not merged with --reversible"),
    (target_damaged, VerificationError, "'conv2.weight' is not what its last merge left"),
    (another_tensor_damaged, VerificationError, "'fc.weight' is not the base's, though no adapter was to change it"),
    (not_a_number, VerificationError, "'conv1.weight' is not what its last merge left"),
    (wrong_shape, FormatError, r"'conv1.weight' is \(8, 1, 3, 3\) in the checkpoint, the adapter has"),
    (truncated, FormatError, "truncated: [0-9,]+ of"),
    (missing_residue, MissingFileError, "once.residue' does not exist: the residue of the merge"),
    (truncated_residue, FormatError, "truncated: [0-9,]+ of"),
    (damaged_residue, FormatError, "the residue is not that of receipt 1 of 1, or it is damaged"),
    (residue_of_another_file, FormatError, "the residue is not that of receipt 1 of 1, or it is damaged"),
    (no_residue_at_all, FormatError, "is not a residue of a merge"),
    (newer_residue, FormatError, r"residue version 4, this loraio reads version 3\n(?s:.*)a newer loraio"),
    (older_residue, FormatError, r"residue version 2, this loraio reads version 3\n(?s:.*)--base BASE"),
    (lying_residue, FormatError, "strength is 0.25, the receipt has 1.0"),
    (odd_residue, FormatError, "this residue was not written by loraio"),
    (residue_of_other_tensors, FormatError, "'conv2.weight' is not in the checkpoint"),
    (wrong_adapter, AdapterError, "is not that of receipt 1 of 1"),
    (base_as_adapter, FormatError, "is not an adapter but a base model"),
    (wrong_base, BaseMismatchError, r"the base has the digest \w{12}\.\., receipt 1 of 1 was merged into"),
    (wrong_base_and_damaged, VerificationError, "'fc.weight' is not the base's, though no adapter"),
    (base_and_damaged_target, VerificationError, "'conv2.weight' is not what its last merge left"),
    (base_of_less, VerificationError, "(?s)'fc.bias' is missing.*'more' is not in the base"),
    (missing_base, MissingFileError, "nothing' does not exist"),
    (adapter_as_base, FormatError, "is an adapter, not a base model"),
    (residue_as_base, FormatError, "is the residue of a merge, not a base model"),
    (neither, ConfigError, "one of the two"),
    (both, ConfigError, "one of the two"),
    (residue_with_base, ConfigError, "with the adapter, not with the base"),
    (every_with_adapter, ConfigError, "only with the base"),
    (no_workers, ConfigError, "there must be at least one worker"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), REFUSALS, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_wrong_is_said_and_nothing_written(
    chain: Path, spoil: Spoil, error: type[LoraioError], message: str
) -> None:
    options = {"adapter": chain / "three"} | spoil(chain)
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


def test_a_residue_that_does_not_restore_is_not_kept(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = residue_writer.restored

    def wrong(*words: Any, **options: Any) -> torch.Tensor:
        made = real(*words, **options).clone()
        made.view(-1)[-1] += 1
        return made

    monkeypatch.setattr(residue_writer, "restored", wrong)
    with pytest.raises(VerificationError, match="cannot be restored from its residue; nothing was written"):
        loraio.merge_file(files / "base.safetensors", files / "three.safetensors", tmp_path / "m", reversible=True)
    assert names_in(tmp_path) == []


def test_a_residue_that_reads_back_wrong_is_not_kept(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = residue_writer.read_bytes

    def wrong(*words: Any) -> torch.Tensor:
        raw = real(*words)
        raw[0] ^= 1
        return raw

    monkeypatch.setattr(residue_writer, "read_bytes", wrong)
    with pytest.raises(VerificationError, match="reads back wrong; nothing was written"):
        loraio.merge_file(files / "base.safetensors", files / "three.safetensors", tmp_path / "m", reversible=True)
    assert names_in(tmp_path) == []


def test_an_existing_residue_is_replaced_only_when_told(files: Path, tmp_path: Path) -> None:
    words = (files / "base.safetensors", files / "three.safetensors", tmp_path / "m")
    residue_of(tmp_path / "m").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"m.residue' exists"):
        loraio.merge_file(*words, reversible=True)
    assert names_in(tmp_path) == ["m.residue"]
    loraio.merge_file(*words, reversible=True, overwrite=True)
    assert residue_files.read_residue(residue_of(tmp_path / "m")).base_sha256 == loraio.load(words[1]).base.sha256


def test_a_killed_merge_is_done_anew_where_it_is_to_be_reversible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loraio.merging.on_files.FinishedShards, "forget", stopped)
        with pytest.raises(KeyboardInterrupt):
            loraio.merge_file(base, path, tmp_path / "m")
    assert (tmp_path / ".m.merging").is_dir()
    assert loraio.merge_file(base, path, tmp_path / "m", reversible=True).reused == 0
    loraio.unmerge_file(tmp_path / "m", tmp_path / "again", adapter=path)
    assert names_in(tmp_path / "again") == names_in(base)


MEMORY = """
import sys, threading, time
import loraio, torch
loraio.merge_file, loraio.unmerge_file
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
base, adapter, folder = sys.argv[1:]
start, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
loraio.merge_file(base, adapter, folder + "/m", workers=2, reversible=True)
loraio.unmerge_file(folder + "/m", folder + "/a", adapter=adapter, workers=2)
loraio.unmerge_file(folder + "/m", folder + "/b", base=base, workers=2)
running = False
thread.join()
print((max(peak, anonymous()) - start) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    used = []
    for count in (2, 32):  # of 8 MB each
        values = tensor((1024, 4096), torch.bfloat16, 1)
        state = {f"{number}.weight": values + number for number in range(count)}
        adapter = adapter_of(state, {f"{number}.weight": "Linear" for number in range(0, count, 2)})
        base, path = saved(state, adapter, tmp_path)
        (tmp_path / str(count)).mkdir()
        words = [sys.executable, "-c", MEMORY, str(base), str(path), str(tmp_path / str(count))]
        used.append(int(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        assert (tmp_path / str(count) / "a").read_bytes() == base.read_bytes()
    assert used[1] < used[0] + 80  # MB; the larger file has 256


def test_progress_ends_at_all_that_was_to_do(chain: Path) -> None:
    seen: list[tuple[int, int]] = []
    loraio.unmerge_file(
        chain / "once", chain / "a", adapter=chain / "three", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in loraio.read_base(chain / "base").state.values())


def test_a_base_that_changes_meanwhile_is_noticed(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Inputs.check

    def late(self: Inputs) -> None:
        rewritten(chain / "base", "fc.weight")
        real(self)

    monkeypatch.setattr(Inputs, "check", late)
    with pytest.raises(FormatError, match="changed while it was being read"):
        loraio.unmerge_file(chain / "once", chain / "a", base=chain / "base")
    assert not (chain / "a").exists()
