"""A sharded base gives a sharded checkpoint, and a merge that was killed goes on from its finished shards."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checkpoints import adapter_of, case, files_of, names_in, parted, saved
from safetensors.torch import save
from strategies import tensor

import loraio
from loraio.bases.identity import state_sha256
from loraio.errors import ConfigError, LoraioError, OutputError, OutputExistsError, VerificationError
from loraio.files.folders import working_folder
from loraio.files.sharded import INDEX_SUFFIX
from loraio.merging import on_files
from loraio.merging.checkpoint_writer import CheckpointWriter, Written
from loraio.merging.effect import Fold
from loraio.merging.finished_shards import RECEIPT, FinishedShards


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_parted_base_gives_the_same_parts_and_the_same_index(tmp_path: Path, prefix: str) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", prefix=prefix)
    result = loraio.merge_file(base, path, tmp_path / "merged")
    assert result.path == tmp_path / "merged" / f"model{INDEX_SUFFIX}"
    assert [part.name for part in result.parts] == [part.name for part in loraio.read_base(base).parts]
    merged = loraio.merge(state, adapter)
    before, after = (json.loads(index.read_text()) for index in (base / result.path.name, result.path))
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
    single, _ = saved(state, adapter, tmp_path / "single")
    loraio.merge_file(base, path, tmp_path / "merged.safetensors")
    loraio.merge_file(single, path, tmp_path / "expected")
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


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


def test_a_later_run_goes_on_from_the_parts_that_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, adapter = case()
    base, path = parted(state, adapter, tmp_path / "base", count=4)
    loraio.merge_file(base, path, tmp_path / "expected")
    expected, work = files_of(tmp_path / "expected"), tmp_path / ".m.merging"
    first, second, *_ = sorted(name for name in expected if name.endswith("safetensors"))
    real, done = CheckpointWriter.write, []

    def stopped(*words: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(None)
        return real(*words, **options)

    def interrupted(**options: Any) -> None:
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "write", stopped)
            with pytest.raises(KeyboardInterrupt):
                loraio.merge_file(base, path, tmp_path / "m", **options)
        assert names_in(work) == [first, second, RECEIPT]

    def finished() -> int:
        reused = loraio.merge_file(base, path, tmp_path / "m").reused
        assert files_of(tmp_path / "m") == expected
        assert not work.exists()
        shutil.rmtree(tmp_path / "m")
        return reused

    interrupted()
    assert finished() == 2
    interrupted(strength=0.5)
    assert finished() == 0
    interrupted()
    (work / ".leftover.1-2.tmp").write_bytes(b"x")
    (work / first).write_bytes((work / first).read_bytes()[:-1] + b"x")
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
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patch:
        patch.setattr(on_files, "merged_index", full)
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
    written = {"w": Written(sha256="0", source_sha256="1", fold=fold)}
    (tmp_path / "part").touch()
    FinishedShards(tmp_path, {"a": 1}).add("part", [1], written)
    found = FinishedShards(tmp_path, {"a": 1}).get("part", [1])
    assert repr(found) == repr(written)


def test_one_process_at_a_time_has_a_working_folder(tmp_path: Path) -> None:
    with working_folder(tmp_path / "m") as work:
        assert work == tmp_path / ".m.merging"
        with pytest.raises(OutputError, match="another process"), working_folder(tmp_path / "m"):
            pass


MERGE = "import sys, loraio; loraio.merge_file(*sys.argv[1:], overwrite=True)"


@pytest.mark.slow
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
