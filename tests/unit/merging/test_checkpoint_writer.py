"""A merge that streams: the bytes of one in memory, whatever the system does to its copies, and little memory."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, adapter_of, case, files_of, names_in, parted, saved
from safetensors.torch import save, save_file
from strategies import tensor
from threadpoolctl import threadpool_info
from torch import nn

import loraio
from loraio.adapter import folding
from loraio.adapter.adapter import Adapter, parts_of
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.bases.identity import state_sha256
from loraio.bases.models import write_base
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FormatError,
    LoraioError,
    OutputError,
    OutputExistsError,
    VerificationError,
)
from loraio.files import atomic, tensorfile
from loraio.files.copying import PIECE, Inputs, Progress, copy_bytes
from loraio.files.folders import working_folder
from loraio.files.sharded import INDEX_SUFFIX
from loraio.files.tensors import TORCH_DTYPES, dtype_code, tensor_bytes
from loraio.merging import checkpoint_writer, on_files, plans, weight_check
from loraio.merging.finished_shards import RECEIPT, FinishedShards
from loraio.merging.folds import Fold, Folding
from loraio.merging.plans import TensorPlan, stored
from loraio.merging.weight_check import check_fold
from loraio.merging.workers import one_thread_each


def in_memory(state: State, adapter: Adapter, path: Path, strength: float = 1.0) -> bytes:
    """The file that a merge in memory would write."""
    merged = loraio.merge(state, adapter, strength)
    receipt = loraio.receipt(state, merged, adapter, strength)
    write_base(merged, path, network=None, merged=[receipt.document()])
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_bytes_are_those_of_a_merge_in_memory_with_any_number_of_workers(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    state, adapter = case(dtype, kind)
    expected = in_memory(state, adapter, tmp_path / "expected", 0.7)
    prefix = "module." if kind == "lora" else ""
    base, path = saved(state, adapter, tmp_path, prefix)
    for workers in (1, 2, 5):
        output = tmp_path / f"{workers}.safetensors"
        merged = loraio.merge_file(base, path, output, strength=0.7, workers=workers)
        assert output.read_bytes() == expected
        assert merged.stripped == prefix
        report = loraio.verify_weights(state, adapter, loraio.merge(state, adapter, 0.7), 0.7)
        assert merged.weights == report
        effect = loraio.merge_effect(state, loraio.merge(state, adapter, 0.7), adapter)
        assert merged.effect.median == pytest.approx(effect.median, rel=1e-4)
        assert merged.effect.targets == effect.targets


def test_a_pickled_base_is_written_by_the_same_way(tmp_path: Path) -> None:
    state, adapter = case()
    expected = in_memory(state, adapter, tmp_path / "expected")
    _, path = saved(state, adapter, tmp_path)
    torch.save(state, tmp_path / "base.pt")
    loraio.merge_file(tmp_path / "base.pt", path, tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == expected


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_parted_base_gives_the_same_parts_and_the_same_index(tmp_path: Path, prefix: str) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", prefix=prefix)
    result = loraio.merge_file(base, path, tmp_path / "merged")
    assert result.path == tmp_path / "merged" / f"model{INDEX_SUFFIX}"
    assert [part.name for part in result.parts] == [part.name for part in loraio.read_base(base).parts]
    merged = loraio.merge(state, adapter)
    before, after = (
        json.loads((folder / f"model{INDEX_SUFFIX}").read_text()) for folder in (base, tmp_path / "merged")
    )
    assert after["weight_map"] == {name.removeprefix(prefix): file for name, file in before["weight_map"].items()}
    document = after["metadata"].pop("loraio")
    assert after["metadata"] == before["metadata"]
    assert document["sha256"] == result.sha256 == state_sha256(merged)
    for file in result.parts:
        mine = {name: values for name, values in merged.items() if after["weight_map"][name] == file.name}
        assert file.read_bytes() == save(mine, metadata={"format": "pt"})
    assert names_in(tmp_path) == ["adapter.safetensors", "base", "merged"]
    checkpoint = loraio.read_base(result.path)
    assert checkpoint.document["merged"][0]["base_sha256"] == adapter.base.sha256
    assert state_sha256(checkpoint.state) == result.sha256


def test_a_parted_base_becomes_one_file_where_the_output_is_one(tmp_path: Path) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base")
    expected = in_memory(state, adapter, tmp_path / "expected")
    loraio.merge_file(base, path, tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == expected


def test_an_index_is_written_into_a_folder_that_is_there(tmp_path: Path) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base")
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    index = folder / f"other{INDEX_SUFFIX}"
    loraio.merge_file(base, path, index)
    assert (folder / "mine").read_text() == "kept"
    first = files_of(folder)
    assert len(first) == 5
    with pytest.raises(OutputExistsError, match="exists"):
        loraio.merge_file(base, path, index)
    loraio.merge_file(base, path, index, strength=0.5, overwrite=True)
    assert files_of(folder).keys() == first.keys()
    assert files_of(folder) != first
    half = loraio.merge(state, adapter, 0.5)
    assert all(values.equal(half[name]) for name, values in loraio.read_base(index).state.items())


def test_outputs_that_are_inputs_or_no_place_for_parts_are_refused(tmp_path: Path) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base")
    before = files_of(base)
    for output in (base, base / f"model{INDEX_SUFFIX}", base / f"other{INDEX_SUFFIX}"):
        with pytest.raises(OutputExistsError, match="is also an input"):
            loraio.merge_file(base, path, output, overwrite=True)
    for output in (tmp_path / "no" / "such", tmp_path / "no" / f"such{INDEX_SUFFIX}"):
        with pytest.raises(OutputError, match="does not exist"):
            loraio.merge_file(base, path, output)
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraioError, match="file' exists"):
        loraio.merge_file(base, path, tmp_path / "file")
    single, _ = saved(state, adapter, tmp_path / "single")
    with pytest.raises(OutputError, match="is an index, and the base is one file"):
        loraio.merge_file(single, path, tmp_path / f"x{INDEX_SUFFIX}")
    with pytest.raises(ConfigError, match="not 0 workers"):
        loraio.merge_file(single, path, tmp_path / "x.safetensors", workers=0)
    assert files_of(base) == before


def test_a_base_that_differs_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    state, adapter = case()
    for name, message in [("Linear.weight", r"'Linear\.weight': "), ("large", "other tensors of the network differ")]:
        other = {**state, name: state[name] + 1}
        folder = tmp_path / name
        base, path = parted(other, adapter, folder)
        single, _ = saved(other, adapter, tmp_path / f"{name}-single")
        for source, output in [(base, tmp_path / "merged"), (single, tmp_path / "merged.safetensors")]:
            with pytest.raises(BaseMismatchError, match=message) as caught:
                loraio.merge_file(source, path, output)
            with pytest.raises(BaseMismatchError) as expected:
                loraio.merge(other, adapter)
            assert str(caught.value) == str(expected.value)
            result = loraio.merge_file(source, path, output, allow_base_mismatch=True)
            assert len(result.mismatch) == 1
            merged = loraio.merge(other, adapter, allow_base_mismatch=True)
            assert result.sha256 == state_sha256(merged)
            if output.is_dir():
                files_of(output)
                for file in output.iterdir():
                    file.unlink()
                output.rmdir()
            else:
                output.unlink()
    assert not [name for name in names_in(tmp_path) if name.startswith((".", "merged"))]


def test_a_sum_that_overflows_and_an_adapter_that_changes_nothing_are_refused(tmp_path: Path) -> None:
    state, adapter = case(torch.float16)
    base, path = saved(state, adapter, tmp_path)
    with pytest.raises(AdapterError, match="overflows"):
        loraio.merge_file(base, path, tmp_path / "m.safetensors", strength=1e6)
    with pytest.raises(ConfigError, match="no-op"):
        loraio.merge_file(base, path, tmp_path / "m.safetensors", strength=0)
    assert loraio.merge_file(base, path, tmp_path / "m.safetensors", strength=0, allow_noop=True).effect.is_noop


def test_a_change_too_small_to_be_squared_is_a_change() -> None:
    base = torch.full((8,), 1e-30, dtype=torch.bfloat16)
    found = base.clone()
    found[3] = torch.nextafter(base[3], base[3] * 2)
    assert Fold.of(weight_check.FoldCheck(), base, found).change > 0
    assert Fold.of(weight_check.FoldCheck(), base, base).change == 0


# Copies


def refused(number: int) -> Callable[..., int]:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 99])
def test_bytes_are_copied_piece_by_piece(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(b"before" + data + b"after")
    (tmp_path / "target").write_bytes(b"kept" + bytes(len(data)) + b"kept")
    with FileIO(tmp_path / "source") as source, FileIO(tmp_path / "target", "r+") as target:
        copy_bytes(source, 6, target, 4, memoryview(bytearray(size)))
        with pytest.raises(FormatError, match="changed while it was being read"):
            copy_bytes(source, 6 + size, target, 4 + size, memoryview(bytearray(6)))
    assert (tmp_path / "target").read_bytes() == b"kept" + data + b"kept"


def test_a_large_file_is_flushed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flushed, path = os.fdatasync, threading.Semaphore(0), tmp_path / "file"
    path.write_bytes(b"1")

    def counted(file: int) -> None:
        assert os.path.samestat(os.fstat(file), path.stat())
        real(file)
        flushed.release()

    monkeypatch.setattr(os, "fdatasync", counted)
    monkeypatch.setattr(atomic, "PAUSE", 0.001)
    before = threading.active_count()
    with atomic.flushed_early(path, atomic.EARLY):
        for _ in range(3):  # again and again
            assert flushed.acquire(timeout=60)
    assert threading.active_count() == before
    with atomic.flushed_early(path, atomic.EARLY - 1):  # small ones are not
        assert threading.active_count() == before
    monkeypatch.delattr(os, "fdatasync")  # on other systems
    with atomic.flushed_early(path, atomic.EARLY):
        assert threading.active_count() == before


def test_what_a_disk_refuses_early_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, adapter = case()
    base, path = saved(state, adapter, tmp_path)
    told, real = threading.Event(), checkpoint_writer.write_all

    def broken(_: int) -> None:
        told.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def waiting(*words: Any) -> None:  # it is told while there is still something to write
        assert told.wait(60)
        real(*words)

    monkeypatch.setattr(os, "fdatasync", broken)
    monkeypatch.setattr(checkpoint_writer, "write_all", waiting)
    monkeypatch.setattr(atomic, "EARLY", 0)
    monkeypatch.setattr(atomic, "PAUSE", 0.001)
    before = names_in(tmp_path)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        loraio.merge_file(base, path, tmp_path / "m.safetensors")
    assert names_in(tmp_path) == before


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_products_of_numpy_take_one_thread_each_while_workers_share_the_processors() -> None:
    before = torch.get_num_threads(), blas_threads()
    assert before[1]
    with one_thread_each():
        assert (torch.get_num_threads(), blas_threads()) == (1, [1] * len(before[1]))
    assert (torch.get_num_threads(), blas_threads()) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_is_an_error_with_the_name_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    state, adapter = case()
    base, path = saved(state, adapter, tmp_path)
    monkeypatch.setattr(plans, "copy_bytes", refused(number))
    with pytest.raises(OutputError, match=r"m\.safetensors' cannot be written"):
        loraio.merge_file(base, path, tmp_path / "m.safetensors")
    assert names_in(tmp_path) == ["adapter.safetensors", "base.safetensors"]


# Bases that change


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("change", [grown, truncated, rewritten, replaced, gone])
def test_a_base_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], allow: bool
) -> None:
    state, adapter = case()
    base, path = saved(state, adapter, tmp_path)
    real, changes, lock = plans.copy_bytes, [], threading.Lock()

    def disturbed(*words: Any) -> None:
        with lock:  # one of the workers does it
            if not changes:
                changes.append(change(base))
        real(*words)

    monkeypatch.setattr(plans, "copy_bytes", disturbed)
    with pytest.raises((FormatError, loraio.errors.MissingFileError), match=r"changed while|cannot be read") as caught:
        loraio.merge_file(base, path, tmp_path / "m.safetensors", allow_base_mismatch=allow)
    assert repr(str(base)) in str(caught.value)
    assert not [name for name in names_in(tmp_path) if name.startswith((".", "m."))]


def test_a_copy_that_went_wrong_is_told_from_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, adapter = case()
    real = plans.copy_bytes

    def wrong(source: FileIO, begin: int, target: FileIO, place: int, room: memoryview) -> None:
        real(source, begin - (len(room) > 1000), target, place, room)

    monkeypatch.setattr(plans, "copy_bytes", wrong)
    base, path = saved(state, adapter, tmp_path / "single")
    parts, _ = parted(state, adapter, tmp_path / "base")
    for allow in (False, True):
        for source, output in [(base, "m.safetensors"), (parts, "m")]:
            with pytest.raises(VerificationError, match="differs from what the base holds"):
                loraio.merge_file(source, path, tmp_path / output, allow_base_mismatch=allow)
            assert not [name for name in names_in(tmp_path) if name.startswith((".", "m"))]


# Tensors that replace others


def test_a_tensor_of_another_shape_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    state, adapter = case()
    base, _ = saved(state, adapter, tmp_path)
    header = tensorfile.read_header(base)
    planned = {
        name: TensorPlan(
            dtype=info.dtype, shape=info.shape, source=stored(header, name), folded=name in adapter.targets
        )
        for name, info in header.tensors.items()
    }
    head = tensor((3, 5), torch.float64, 3)
    planned["half"] = TensorPlan(dtype="F64", shape=(3, 5), source=head)
    (tmp_path / "m").touch()
    written = checkpoint_writer.write_tensors(
        planned,
        tmp_path / "m",
        metadata=lambda _: {"a": "b"},
        change=Folding(adapter=adapter, strength=1.0, exact=True),
        inputs=Inputs(),
        workers=2,
        progress=Progress(),
        where="m",
    )
    expected = {**loraio.merge(state, adapter), "half": head}
    assert (tmp_path / "m").read_bytes() == save(expected, metadata={"a": "b"})
    assert {name: tensor.sha256 for name, tensor in written.items()} == loraio.bases.identity.digests(expected)


def test_the_layout_is_that_of_the_safetensors_library() -> None:
    tensors = {}
    for number, name in enumerate(TORCH_DTYPES.values()):
        for text in (f"b{number}", f'é"\\/{number}', f"字{number}", f"😀{number}"):
            tensors[text] = torch.zeros(number % 3, 2, dtype=getattr(torch, name))
    metadata = {"loraio": '{"a":"é\\n"}'}
    facts = {name: (dtype_code(values.dtype), tuple(values.shape)) for name, values in tensors.items()}
    start, placed = tensorfile.layout(facts, metadata, where="here")
    data = b"".join(tensor_bytes(tensors[name]).numpy().tobytes() for name in placed)
    assert start + data == save(tensors, metadata=metadata)


# Slices and the first look


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_slices_of_a_fold_are_the_folds_of_the_slices(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "BLOCK", 1000)
    for layer in LAYER_TYPES.values():
        shape = (203, 24, *(3,) * (layer.dims - 2))
        state = {"w": tensor(shape, dtype, 5)}
        adapter = adapter_of(state, {"w": layer.name}, kind=kind)
        whole = adapter.fold("w", state["w"], strength=0.7)
        parts = list(parts_of(adapter, "w"))
        apart = layer.slices == "rows" or (layer.slices == "columns" and KINDS[kind].columns_apart)
        assert (len(parts) > 1) == apart
        assert [at.start for at, _ in parts] == [0, *(at.stop for at, _ in parts[:-1])]
        assert parts[-1][0].stop == 203
        found = torch.cat([part.fold("w", state["w"][at], strength=0.7) for at, part in parts])
        assert found.equal(whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e4])
def test_the_first_look_in_float32_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, spread: float
) -> None:
    weight = tensor((64, 500), dtype, 1, spread)
    weight[:8] = torch.tensor([2.0**k for k in range(-10, 490)]).clamp(max=2.0**14).to(dtype)  # where the ulp changes
    adapter = adapter_of({"w": weight}, {"w": "Linear"}, kind=kind)
    right = adapter.fold("w", weight)
    up = torch.nextafter(right, torch.full_like(right, torch.inf))
    down = torch.nextafter(right, torch.full_like(right, -torch.inf))
    mixed = torch.where(torch.rand(right.shape, generator=torch.Generator().manual_seed(0)) < 0.01, up, right)
    broken = right.clone()
    broken[3, 7] = torch.nan
    infinite = weight.clone()
    infinite[5, 5] = torch.inf
    for base, found in [
        *((weight, found) for found in (right, up, down, mixed, broken, weight)),
        (infinite, torch.where(infinite.isinf(), infinite, right)),
        (weight[:1, :1], right[:1, :1]),
    ]:
        part = adapter_of({"w": weight}, {"w": "Linear"}, kind=kind)
        if base.shape != weight.shape:
            part = Adapter(
                targets={"w": replace(part.targets["w"], rank=3, shape=(1, 1))},
                factors={
                    name: factor[:1] if name.endswith(("B", "magnitude")) else factor[:, :1]
                    for name, factor in part.factors.items()
                },
                base=part.base,
            )
            found = part.fold("w", base)
        first = check_fold(part, base, found, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(weight_check, "_NARROW", ())
            full = check_fold(part, base, found, 1.0)
        assert (first.wrong, first.values) == (full.wrong, full.values)
        assert first.max_ulp == pytest.approx(full.max_ulp, rel=1e-6)  # float64 sums in another order
        told = check_fold(part, base, found, 1.0, told=0.4995)
        assert (told.wrong, told.values) == (full.wrong, full.values)
        assert told.max_ulp == first.max_ulp or max(told.max_ulp, full.max_ulp) <= 0.4995


# Runs that were killed


def test_a_later_run_goes_on_from_the_parts_that_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", count=4)
    loraio.merge_file(base, path, tmp_path / "expected")
    expected, work = files_of(tmp_path / "expected"), tmp_path / ".m.merging"
    first, second, *_ = sorted(name for name in expected if name.endswith("safetensors"))
    real, done = on_files.write_tensors, []

    def stopped(*words: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(None)
        return real(*words, **options)

    def interrupted(**options: Any) -> None:
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(on_files, "write_tensors", stopped)
            with pytest.raises(KeyboardInterrupt):
                loraio.merge_file(base, path, tmp_path / "m", **options)
        assert names_in(work) == [first, second, RECEIPT]

    def finished() -> int:
        reused = loraio.merge_file(base, path, tmp_path / "m").reused
        assert files_of(tmp_path / "m") == expected
        assert not work.exists()
        for file in (tmp_path / "m").iterdir():
            file.unlink()
        (tmp_path / "m").rmdir()
        return reused

    interrupted()
    assert finished() == 2
    interrupted(strength=0.5)
    assert finished() == 0
    interrupted()
    (work / ".leftover.1-2.tmp").write_bytes(b"x")
    rewritten(work / first)
    assert finished() == 1
    interrupted()
    (work / second).unlink()
    assert finished() == 1
    interrupted()
    (work / RECEIPT).write_text("{")
    assert finished() == 0
    interrupted()
    os.utime(base / first)
    assert finished() == 1
    with monkeypatch.context() as patch:
        patch.setattr(on_files, "__version__", "9")
        interrupted()
    assert finished() == 0


def test_a_receipt_for_other_contents_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says that a wrong part is right, in everything but the digest of the whole."""
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", count=2)
    work = tmp_path / ".m.merging"
    with monkeypatch.context() as patch:
        patch.setattr(on_files, "merged_index", refused(errno.ENOSPC))
        with pytest.raises(OutputError, match="No space left"):
            loraio.merge_file(base, path, tmp_path / "m")
    receipt = json.loads((work / RECEIPT).read_text())
    part = next(iter(receipt["parts"].values()))
    next(iter(part["tensors"].values()))["source_sha256"] = "0" * 64
    (work / RECEIPT).write_text(json.dumps(receipt))
    with pytest.raises(VerificationError):
        loraio.merge_file(base, path, tmp_path / "m")
    assert not work.exists()
    assert loraio.merge_file(base, path, tmp_path / "m").reused == 0


def test_a_receipt_keeps_what_json_cannot(tmp_path: Path) -> None:
    fold = Fold(length=math.nan, moved=math.inf)
    written = {"w": checkpoint_writer.Written(sha256="0", source_sha256="1", fold=fold)}
    (tmp_path / "part").touch()
    FinishedShards(tmp_path, {"a": 1}).add("part", [1], written)
    found = FinishedShards(tmp_path, {"a": 1}).get("part", [1])
    assert repr(found) == repr(written)


def test_one_process_at_a_time_has_a_working_folder(tmp_path: Path) -> None:
    with (
        working_folder(tmp_path / "m"),
        pytest.raises(OutputError, match="another process"),
        working_folder(tmp_path / "m"),
    ):
        pass
    with working_folder(tmp_path / "m") as work:
        assert work == tmp_path / ".m.merging"


MERGE = """
import sys, loraio
loraio.merge_file(*sys.argv[1:], overwrite=True)
"""


def test_a_merge_that_is_killed_at_any_moment_leaves_nothing_or_all_and_can_be_repeated(tmp_path: Path) -> None:
    state, adapter = case()
    state |= {f"more{number}": tensor((1500, 1000), torch.float64, number) for number in range(6)}
    adapter = adapter_of(state, {"Linear.weight": "Linear", "Embedding.weight": "Embedding"})
    base, path = parted(state, adapter, tmp_path / "base", count=6)
    loraio.merge_file(base, path, tmp_path / "expected")
    expected, output = files_of(tmp_path / "expected"), tmp_path / "m"
    words = [sys.executable, "-c", MERGE, str(base), str(path), str(output)]
    kills = 0
    for turn in range(40):
        process = subprocess.Popen(words)
        while process.poll() is None and not (tmp_path / ".m.merging").exists():
            time.sleep(0.001)
        time.sleep(0.004 * (turn % 7))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        assert not output.exists() or files_of(output) == expected
    else:
        subprocess.run(words, check=True)
    assert kills
    assert files_of(output) == expected


MEMORY = """
import sys, threading, time
import loraio, torch
loraio.merge_file
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
start, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
loraio.merge_file(*sys.argv[1:], workers=2)
running = False
thread.join()
print((max(peak, anonymous()) - start) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    used = []
    for count in (2, 40):  # of 8 MB each
        values = tensor((1024, 4096), torch.bfloat16, 1)
        state = {f"{number}.weight": values + number for number in range(count)}
        adapter = adapter_of(state, {f"{number}.weight": "Linear" for number in range(0, count, 4)})
        base, path = saved(state, adapter, tmp_path)
        words = [sys.executable, "-c", MEMORY, str(base), str(path), str(tmp_path / f"{count}.safetensors")]
        used.append(int(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    assert used[1] < used[0] + 80  # MB; the larger file has 320


def test_progress_ends_at_all_of_the_bytes(tmp_path: Path) -> None:
    state, adapter = case()
    base, path = saved(state, adapter, tmp_path)
    seen: list[tuple[int, int]] = []
    loraio.merge_file(base, path, tmp_path / "m.safetensors", progress=lambda *now: seen.append(now))
    size = sum(values.nbytes for values in state.values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# Tensors that are replaced


class Normed(nn.Sequential):
    """A network with a head and running statistics."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 7))


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_tensors_are_written_as_the_merge_in_memory_writes_them(
    tmp_path: Path, parted: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    model = Normed().to(dtype)
    fresh = loraio.new_adapter(model, loraio.TrainConfig(rank=2, heads={"3": 10}, norm="affine"))
    moved = {
        name: tensor + 3 if name == "1.num_batches_tracked" else torch.randn(tensor.shape).to(tensor.dtype)
        for name, tensor in fresh.all_tensors.items()
    }
    adapter = replace(
        fresh,
        factors={name: moved[name] for name in fresh.factors},
        tensors={name: moved[name] for name in fresh.tensors},
    )
    state = model.state_dict()
    loraio.save(adapter, tmp_path / "adapter")
    merged = loraio.merge(state, adapter)
    if parted:
        names = list(state)
        places = {name: f"p-{number % 2}.safetensors" for number, name in enumerate(names)}
        (tmp_path / "base").mkdir()
        for file in set(places.values()):
            save_file({n: t for n, t in state.items() if places[n] == file}, tmp_path / "base" / file)
        totals = {
            "total_size": sum(tensor.nbytes for tensor in state.values()),
            "total_parameters": sum(tensor.numel() for tensor in state.values()),
        }
        index = {"metadata": totals, "weight_map": places}
        (tmp_path / "base" / "p.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, tmp_path / "base")
    done = loraio.merge_file(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = loraio.read_base(tmp_path / "merged")
    assert found.heads == {"3": 10}
    assert found.state.keys() == merged.keys()
    for name, wanted in merged.items():
        assert found.state[name].dtype == wanted.dtype
        assert found.state[name].equal(wanted), name
    report = loraio.verify_weights(state, adapter, merged)
    assert (done.weights.folded, done.weights.replaced, done.weights.untouched) == (1, 7, 1)
    assert (report.folded, report.replaced, report.untouched) == (1, 7, 1)
    assert done.effect.replaced == 7
    assert done.sha256 == loraio.bases.identity.state_sha256(merged)
    if parted:
        written = json.loads((tmp_path / "merged" / "p.safetensors.index.json").read_text())
        assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
        assert written["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in merged.values())
    else:
        document = loraio.read_base(tmp_path / "merged").document
        write_base(merged, tmp_path / "memory", network=None, heads={"3": 10}, merged=document["merged"])
        assert (tmp_path / "memory").read_bytes() == (tmp_path / "merged").read_bytes()


@pytest.mark.parametrize("name", ["3.weight", "1.running_var"])
def test_another_base_under_a_replaced_tensor_is_refused(tmp_path: Path, name: str) -> None:
    model = Normed()
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=2, heads={"3": 10}, norm="stats"))
    loraio.save(adapter, tmp_path / "adapter")
    state = {key: tensor + 1 if key == name else tensor for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "base")
    with pytest.raises(loraio.errors.BaseMismatchError, match=name):
        loraio.merge_file(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", allow_noop=True)
    assert not (tmp_path / "merged").exists()
    done = loraio.merge_file(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", allow_base_mismatch=True)
    assert done.mismatch == (f"{name!r}: other values",)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_count_of_another_dtype_is_replaced_too(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Normed()
    fresh = loraio.new_adapter(model, loraio.TrainConfig(rank=2, norm="stats"))
    name = "1.num_batches_tracked"
    adapter = replace(fresh, tensors={**fresh.tensors, name: torch.tensor(9)})
    loraio.save(adapter, tmp_path / "adapter")
    state = {**model.state_dict(), name: torch.tensor(0, dtype=dtype)}
    save_file(state, tmp_path / "base")
    done = loraio.merge_file(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", allow_base_mismatch=True)
    merged = loraio.merge(state, adapter, allow_base_mismatch=True)
    assert loraio.read_base(tmp_path / "merged").state[name].equal(torch.tensor(9, dtype=dtype))
    assert done.sha256 == state_sha256(merged)
    assert done.weights == loraio.verify_weights(state, adapter, merged, allow_base_mismatch=True)
