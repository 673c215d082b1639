"""A streamed merge writes the bytes of a merge in memory, and nothing when its files fail or change."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, case, names_in, parted, saved
from safetensors.torch import save
from strategies import tensor
from threadpoolctl import threadpool_info

import loraio
from loraio.adapter.adapter import Adapter
from loraio.adapter.kinds import KINDS
from loraio.bases.identity import state_sha256
from loraio.bases.models import write_base
from loraio.errors import AdapterError, BaseMismatchError, ConfigError, FormatError, OutputError, VerificationError
from loraio.files import atomic, tensorfile
from loraio.files.copying import Inputs, Progress
from loraio.merging import checkpoint_writer, plans
from loraio.merging.effect import Folding
from loraio.merging.plans import TensorPlan, stored
from loraio.merging.workers import one_thread_each


@pytest.fixture
def single(tmp_path: Path) -> tuple[State, Adapter, Path, Path]:
    """Base and adapter, and their files in an otherwise empty folder."""
    state, adapter = case()
    return state, adapter, *saved(state, adapter, tmp_path)


Single = tuple[State, Adapter, Path, Path]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_bytes_are_those_of_a_merge_in_memory_with_any_number_of_workers(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    state, adapter = case(dtype, kind)
    expected = loraio.merge(state, adapter, 0.7)
    receipt = loraio.receipt(state, expected, adapter, 0.7)
    write_base(expected, tmp_path / "expected", network=None, merged=[receipt.document()])
    report, effect = loraio.verify_weights(state, adapter, expected, 0.7), loraio.merge_effect(state, expected, adapter)
    prefix = "module." if kind == "lora" else ""
    base, path = saved(state, adapter, tmp_path, prefix)
    for workers in (1, 2, 5):
        output = tmp_path / f"{workers}.safetensors"
        merged = loraio.merge_file(base, path, output, strength=0.7, workers=workers)
        assert output.read_bytes() == (tmp_path / "expected").read_bytes()
        assert (merged.stripped, merged.weights) == (prefix, report)
        assert merged.effect.median == pytest.approx(effect.median, rel=1e-4)
        assert merged.effect.targets == effect.targets


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("name", "message"), [("Linear.weight", r"'Linear\.weight': "), ("large", "other tensors of the network differ")]
)
def test_a_base_that_differs_is_named_and_leaves_nothing(tmp_path: Path, name: str, message: str, shards: bool) -> None:
    state, adapter = case()
    other = {**state, name: state[name] + 1}
    base, path = (parted if shards else saved)(other, adapter, tmp_path / "base")
    output = tmp_path / ("merged" if shards else "merged.safetensors")
    with pytest.raises(BaseMismatchError, match=message) as caught:
        loraio.merge_file(base, path, output)
    assert not [name for name in names_in(tmp_path) if name.startswith((".", "merged"))]
    with pytest.raises(BaseMismatchError) as expected:
        loraio.merge(other, adapter)
    assert str(caught.value) == str(expected.value)
    result = loraio.merge_file(base, path, output, allow_base_mismatch=True)
    assert len(result.mismatch) == 1
    assert result.sha256 == state_sha256(loraio.merge(other, adapter, allow_base_mismatch=True))


def test_a_sum_that_overflows_and_an_adapter_that_changes_nothing_are_refused(tmp_path: Path) -> None:
    state, adapter = case(torch.float16)
    base, path = saved(state, adapter, tmp_path)
    with pytest.raises(AdapterError, match="overflows"):
        loraio.merge_file(base, path, tmp_path / "m.safetensors", strength=1e6)
    with pytest.raises(ConfigError, match="no-op"):
        loraio.merge_file(base, path, tmp_path / "m.safetensors", strength=0)
    assert loraio.merge_file(base, path, tmp_path / "m.safetensors", strength=0, allow_noop=True).effect.is_noop


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


def test_what_a_disk_refuses_early_is_not_forgotten(
    tmp_path: Path, single: Single, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, base, path = single
    told, real = threading.Event(), checkpoint_writer.write_all

    def broken(_: int) -> None:
        told.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def waiting(*words: Any) -> None:  # the flush fails while there is still something to write
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


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "rewritten": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "replaced": replaced,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, single: Single, monkeypatch: pytest.MonkeyPatch, change: str, allow: bool
) -> None:
    _, _, base, path = single
    real, changes, lock = plans.copy_bytes, [], threading.Lock()

    def disturbed(*words: Any) -> None:
        with lock:  # one of the workers does it
            if not changes:
                changes.append(CHANGES[change](base))
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


def test_a_tensor_in_memory_is_written_beside_those_of_the_base(tmp_path: Path, single: Single) -> None:
    state, adapter, base, _ = single
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
    change = Folding(adapter=adapter, strength=1.0, exact=True)
    writer = checkpoint_writer.CheckpointWriter(
        inputs=Inputs(), workers=2, progress=Progress(), where="m", change=change
    )
    written = writer.write(planned, tmp_path / "m", lambda _: {"a": "b"})
    expected = {**loraio.merge(state, adapter), "half": head}
    assert (tmp_path / "m").read_bytes() == save(expected, metadata={"a": "b"})
    assert {name: tensor.sha256 for name, tensor in written.items()} == loraio.bases.identity.digests(expected)


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_products_of_numpy_take_one_thread_each_while_workers_share_the_processors() -> None:
    before = torch.get_num_threads(), blas_threads()
    assert before[1]
    with one_thread_each():
        assert (torch.get_num_threads(), blas_threads()) == (1, [1] * len(before[1]))
    assert (torch.get_num_threads(), blas_threads()) == before


def test_progress_ends_at_all_of_the_bytes(tmp_path: Path, single: Single) -> None:
    state, _, base, path = single
    seen: list[tuple[int, int]] = []
    loraio.merge_file(base, path, tmp_path / "m.safetensors", progress=lambda *now: seen.append(now))
    size = sum(values.nbytes for values in state.values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
