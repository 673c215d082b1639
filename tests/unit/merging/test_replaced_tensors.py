"""Tensors that an adapter replaces whole are written as a merge in memory writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraio
from loraio.bases.identity import state_sha256
from loraio.bases.models import write_base
from loraio.files.sharded import INDEX_SUFFIX

INDEX = f"model{INDEX_SUFFIX}"


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
        checkpoints.parted(state, adapter, tmp_path / "base", count=2)
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        index["metadata"]["total_parameters"] = sum(tensor.numel() for tensor in state.values())
        (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    else:
        save_file(state, tmp_path / "base")
    done = loraio.merge_file(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = loraio.read_base(tmp_path / "merged")
    assert found.heads == {"3": 10}
    assert found.state.keys() == merged.keys()
    assert state_sha256(found.state) == done.sha256 == state_sha256(merged)
    report = loraio.verify_weights(state, adapter, merged)
    assert (done.weights.folded, done.weights.replaced, done.weights.untouched) == (1, 7, 1)
    assert (report.folded, report.replaced, report.untouched) == (1, 7, 1)
    assert done.effect.replaced == 7
    if parted:
        written = json.loads((tmp_path / "merged" / INDEX).read_text())
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
