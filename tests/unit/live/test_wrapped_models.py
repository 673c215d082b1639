"""Wrap, compile and export a model with an adapter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import adapter_for, compiled_once, outputs, same_bits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import loraio
from loraio.bases.identity import state_sha256
from loraio.live.parametrization import FoldedWeight

COMPILED = {"rtol": 1e-5, "atol": 1e-5}
"""Compiled kernels sum float32 in another order than eager ones; logits are about 10."""


def test_an_averaged_model_holds_the_average_of_the_factors(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    base.requires_grad_(False)
    plain = outputs(base, images)
    with loraio.attach(base, three, trainable=True) as live:
        averaged = AveragedModel(base)
        averaged.update_parameters(base)
        with torch.no_grad():
            for factor in live.parameters():
                factor.add_(2)
        averaged.update_parameters(base)
    for name, factor in loraio.adapter_from(averaged).factors.items():
        torch.testing.assert_close(factor, three.factors[name] + 1)
    assert state_sha256(loraio.base_state_dict(averaged)) == three.base.sha256
    assert not same_bits(outputs(averaged, images), plain)
    loraio.attachment_of(averaged).detach()
    assert same_bits(outputs(averaged, images), plain)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "several": lambda model: nn.DataParallel(torch.compile(AveragedModel(model))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", loraio.adapter.kinds.KINDS)
def test_base_and_adapter_come_out_of_any_wrapper(attentive: nn.Module, wrapper: str, kind: str) -> None:
    adapter = adapter_for(attentive, kind=kind)
    plain = attentive.state_dict()
    with loraio.attach(attentive, adapter):
        wrapped = WRAPPERS[wrapper](attentive)
        state = loraio.base_state_dict(wrapped)
        assert list(state) == list(plain), "other names, or another order"
        assert all(same_bits(state[name], plain[name]) for name in plain)
        assert state_sha256(state) == adapter.base.sha256
        assert loraio.adapter_from(wrapped) == adapter
    assert list(loraio.base_state_dict(WRAPPERS[wrapper](attentive))) == list(plain)


def test_a_model_that_holds_the_adapted_one_keeps_its_own_names(base: nn.Module, three: loraio.Adapter) -> None:
    whole = nn.ModuleDict({"module": base, "other": nn.Linear(2, 2)})
    keys = list(whole.state_dict())
    with loraio.attach(base, three):
        assert list(loraio.base_state_dict(whole)) == keys
        assert loraio.adapter_from(whole) == three


DISTRIBUTED = """
import sys, torch, loraio
from torch.nn.parallel import DistributedDataParallel
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = loraio.load_base(f"{folder}/base.safetensors").requires_grad_(False)
before = loraio.bases.identity.state_sha256(model.state_dict())
# another start on each rank: the wrapper makes them that of rank 0
live = loraio.attach(model, loraio.new_adapter(model, loraio.TrainConfig(rank=2, seed=rank)), trainable=True)
wrapped = DistributedDataParallel(model)
data = loraio.load_dataset("digits", "train")
optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
for step in range(3):
    part = slice(32 * step + 16 * rank, 32 * step + 16 * (rank + 1))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(wrapped(data.images[part]), data.labels[part]).backward()
    optimizer.step()
assert loraio.bases.identity.state_sha256(loraio.base_state_dict(wrapped)) == before, "the base was trained"
assert list(loraio.base_state_dict(wrapped)) == list(loraio.load_base(f"{folder}/base.safetensors").state_dict())
torch.save(dict(loraio.adapter_from(wrapped).factors), f"{folder}/factors-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_adapter(base: nn.Module, digits: loraio.Dataset, tmp_path: Path) -> None:
    loraio.save_base(base, tmp_path / "base.safetensors")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    factors, others = (torch.load(tmp_path / f"factors-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(same_bits(factors[name], others[name]) for name in factors)
    base.requires_grad_(False)
    fresh = loraio.new_adapter(base, loraio.TrainConfig(rank=2, seed=0))
    with loraio.attach(base, fresh, trainable=True) as live:
        optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
        for step in range(3):
            part = slice(32 * step, 32 * (step + 1))
            optimizer.zero_grad()
            nn.functional.cross_entropy(base(digits.images[part]), digits.labels[part]).backward()
            optimizer.step()
    for name, factor in live.adapter.factors.items():
        assert not factor.equal(fresh.factors[name]), name
        torch.testing.assert_close(factors[name], factor, rtol=1e-4, atol=1e-6)


# compiled


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_has_outputs_and_gradients_of_the_eager_one(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset
) -> None:
    base.requires_grad_(False)
    compiled = torch.compile(base, fullgraph=True)
    with loraio.attach(base, three):
        torch.testing.assert_close(outputs(compiled, digits.images[:4]), outputs(base, digits.images[:4]), **COMPILED)

    def gradients(model: Any) -> list[Tensor]:
        with loraio.attach(base, three, trainable=True) as live:
            nn.functional.cross_entropy(model(digits.images[:32]), digits.labels[:32]).backward()
            return [factor.grad for factor in live.parameters() if factor.grad is not None]

    found = gradients(compiled)
    assert len(found) == 6
    torch.testing.assert_close(found, gradients(base), **COMPILED)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", loraio.adapter.kinds.KINDS)
def test_every_kind_compiles_with_no_graph_break(attentive: nn.Module, kind: str) -> None:
    """Trace, and run op by op, so that eager and compiled bits are equal."""
    adapter = adapter_for(attentive, kind=kind)
    x = torch.randn(2, 3, 8)
    with loraio.attach(attentive, adapter, trainable=True):
        compiled = torch.compile(attentive, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(outputs(compiled, x), outputs(attentive, x), **COMPILED)
        torch.testing.assert_close(compiled(x), attentive(x), **COMPILED)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_follows_every_change_of_the_handle(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor
) -> None:
    """Trace alone, so that eager and compiled bits are equal; graphs are made as for any backend."""
    compiled = torch.compile(base, fullgraph=True, backend="eager")
    plain = outputs(base, images)
    assert same_bits(outputs(compiled, images), plain)
    seen = []

    def check() -> None:
        result = outputs(base, images)
        torch.testing.assert_close(outputs(compiled, images), result, rtol=0, atol=0)
        assert not any(result.equal(other) for other in seen), "a step that changes nothing proves nothing"
        seen.append(result)

    with loraio.attach(base, three) as live:
        check()
        for strength in range(2, 14):  # more than torch compiles one function anew
            live.strength = strength / 4 + 1
            check()
        live.swap(seven)
        check()
        live.disable()
        torch.testing.assert_close(outputs(compiled, images), plain, rtol=0, atol=0)
        live.enable()
        live.swap(replace(seven, factors={name: factor * 2 for name, factor in seven.factors.items()}))
        check()
        target = {name: replace(target, alpha=3) for name, target in seven.targets.items()}
        live.swap(replace(seven, targets=target))
        check()
    torch.testing.assert_close(outputs(compiled, images), plain, rtol=0, atol=0)


@pytest.mark.usefixtures("compiler")
def test_swaps_among_adapters_of_one_shape_compile_nothing_anew(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    compiled, counter = compiled_once(base)
    with loraio.attach(base, three) as live:
        for step in range(12):
            live.swap(replace(three, factors={name: factor * step for name, factor in three.factors.items()}))
            assert outputs(compiled, images).equal(outputs(base, images))
    assert counter.frame_count == 1


# exported


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.export(model, (x,)).module()
    return module


def as_onnx(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    from onnx.reference import ReferenceEvaluator  # type: ignore[import-not-found]

    program = torch.onnx.export(model, (x,), dynamo=True)
    assert program is not None
    reference = ReferenceEvaluator(program.model_proto)
    return lambda images: torch.from_numpy(reference.run(None, {reference.input_names[0]: images.numpy()})[0])


WRITES_ONNX = importlib.util.find_spec("onnxscript") and not torch.__version__.startswith("2.6.")
EXPORTERS = [exported, *([as_onnx] if WRITES_ONNX else [])]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_merged_model_can_be_exported(
    base: nn.Module,
    three: loraio.Adapter,
    images: Tensor,
    exporter: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]],
) -> None:
    with loraio.attach(base, three):
        adapted = outputs(base, images)
        state = loraio.merge(loraio.base_state_dict(base), loraio.adapter_from(base))
    base.load_state_dict(state)
    assert not any(isinstance(module, FoldedWeight) for module in base.modules())
    with torch.no_grad():
        torch.testing.assert_close(exporter(base, images)(images), adapted, **COMPILED)
