"""Merges taken back: the base bit for bit, or a clear word why not, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checkpoints import adapter_of, case, files_of, names_in, parted, saved
from safetensors.torch import load_file, save_file
from strategies import tensor

import loraio
from loraio.adapter import Adapter, WholeTensor
from loraio.adapter.kinds import KINDS
from loraio.bases.identity import state_sha256, tensor_sha256
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    FormatError,
    OutputError,
    OutputExistsError,
    VerificationError,
)
from loraio.files import tensorfile
from loraio.files.copying import Inputs
from loraio.files.sharded import INDEX_SUFFIX
from loraio.files.tensors import dtype_code
from loraio.merging import residue_files
from loraio.merging.finished_shards import FinishedShards

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
        assert list(done.parts) == [tmp_path / name / file for file in expected if INDEX_SUFFIX not in file]
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
    whole = {
        name: WholeTensor(
            role=name.split(".")[0],
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
    linear = replace(adapter.targets["Linear.weight"], base_sha256=tensor_sha256(state["Linear.weight"]), alpha=1e-3)
    targets = {**adapter.targets, "Linear.weight": linear}
    adapter = replace(adapter, targets=targets, base=replace(adapter.base, sha256=state_sha256(state)))
    merged, path = reversible(state, adapter, tmp_path)
    loraio.unmerge_file(merged, tmp_path / "again", adapter=path)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


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


def off_by_one(made: torch.Tensor) -> torch.Tensor:
    made = made.clone()
    made.view(-1)[-1] += 1
    return made


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("restored", "cannot be restored from its residue; nothing was written"),
        ("read_bytes", "reads back wrong; nothing was written"),
    ],
)
def test_a_wrong_residue_is_not_kept(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, message: str
) -> None:
    real = getattr(residue_files, function)
    monkeypatch.setattr(residue_files, function, lambda *words, **options: off_by_one(real(*words, **options)))
    with pytest.raises(VerificationError, match=message):
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

    with monkeypatch.context() as patch:
        patch.setattr(FinishedShards, "forget", Mock(side_effect=KeyboardInterrupt))
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
        os.utime(chain / "base")
        real(self)

    monkeypatch.setattr(Inputs, "check", late)
    with pytest.raises(FormatError, match="changed while it was being read"):
        loraio.unmerge_file(chain / "once", chain / "a", base=chain / "base")
    assert not (chain / "a").exists()
