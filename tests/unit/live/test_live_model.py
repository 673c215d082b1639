"""A model with an adapter on it is still a normal model, whoever copies, casts, saves, wraps or compiles it."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import loraio
from loraio.bases.identity import state_sha256
from loraio.errors import BaseMismatchError, StateError
from loraio.files.tensors import tensor_bytes
from loraio.live.parametrization import FoldedWeight

COMPILED = {"rtol": 1e-5, "atol": 1e-5}
"""Compiled kernels sum float32 in another order than eager ones; logits are about 10."""

CHECKPOINTED = {"rtol": 1e-4, "atol": 1e-6}
"""The forward pass of a reentrant checkpoint has no gradients and rounds the weight once; the one that is repeated for
the gradients computes it in float32."""

HALF = {"rtol": 0.1, "atol": 0.05}
"""bfloat16 has eight bits, and a convolution network four layers."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a).equal(tensor_bytes(b))


def outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def loaded(base: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(base)
    other.load_state_dict(state)
    return other


class Attentive(nn.Module):
    """A module with several weights of its own and a submodule behind them, in front of normalisation and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        result: Tensor = self.head(self.norm(attended.mean(1)))
        return result


def adapter_for(model: nn.Module, *targets: str, kind: str = "lora", seed: int = 1) -> loraio.Adapter:
    """An adapter with random factors."""
    fresh = loraio.new_adapter(model, loraio.TrainConfig(rank=2, kind=kind, targets=targets or ("all",)))
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: factor * 1.25 if name.endswith("magnitude") else 0.3 * torch.randn(factor.shape, generator=generator)
        for name, factor in fresh.factors.items()
    }
    return replace(fresh, factors=factors)


@pytest.fixture
def attentive() -> nn.Module:
    torch.manual_seed(0)
    return Attentive().eval()


@pytest.fixture
def images(digits_test: loraio.Dataset) -> Tensor:
    return digits_test.images[:16]


@pytest.fixture
def _compiler() -> Iterator[None]:
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(compile_threads=1):  # the workers of a pool would import torch first
        yield
    torch._dynamo.reset()


# copies


def test_a_deep_copy_has_a_handle_of_its_own(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    plain = outputs(base, images)
    live = loraio.attach(base, three)
    adapted = outputs(base, images)
    twin = copy.deepcopy(base)
    other = loraio.attachment_of(twin)
    assert loraio.attachment_of(base) is live
    assert other is not live
    assert other.model is twin
    assert other.adapter == three
    assert same_bits(outputs(twin, images), adapted)
    other.strength = 0.0
    assert same_bits(outputs(twin, images), plain)
    assert same_bits(outputs(base, images), adapted)
    with torch.no_grad():
        twin.conv1.parametrizations.weight[0].lora_B.zero_()  # type: ignore[union-attr, index, operator]
    assert same_bits(outputs(base, images), adapted)


@pytest.mark.parametrize("first", ["original", "copy"])
def test_original_and_copy_are_detached_one_without_the_other(
    base: nn.Module, three: loraio.Adapter, images: Tensor, first: str
) -> None:
    plain, keys = outputs(base, images), list(base.state_dict())
    loraio.attach(base, three)
    adapted = outputs(base, images)
    models = {"original": base, "copy": copy.deepcopy(base)}
    before = models.pop(first)
    (after,) = models.values()
    for model, other in ((before, after), (after, None)):
        loraio.attachment_of(model).detach()
        assert type(model.conv1) is nn.Conv2d
        assert list(model.state_dict()) == keys
        assert same_bits(outputs(model, images), plain)
        assert other is None or same_bits(outputs(other, images), adapted)


def test_a_copy_can_be_swapped_to_more_targets_in_the_same_module(attentive: nn.Module) -> None:
    nn.init.ones_(attentive.attention.in_proj_bias)  # type: ignore[union-attr, arg-type]
    weight_norm(attentive.attention, "in_proj_bias", dim=0)  # keeps the module parametrized all the time
    few, more = adapter_for(attentive, "*.out_proj", "head"), adapter_for(attentive)
    x = torch.randn(2, 3, 8)
    plain = outputs(attentive, x)
    loraio.attach(attentive, few)
    adapted = outputs(attentive, x)
    twin = copy.deepcopy(attentive)
    loraio.attachment_of(twin).swap(more)
    assert same_bits(outputs(attentive, x), adapted)
    assert not same_bits(outputs(twin, x), adapted)
    loraio.attachment_of(attentive).detach()
    assert same_bits(outputs(attentive, x), plain)
    loraio.attachment_of(twin).detach()
    assert same_bits(outputs(twin, x), plain)


def test_a_copy_of_a_part_computes_the_same(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    with loraio.attach(base, three):
        part = copy.deepcopy(base.conv1)
        adapted = outputs(base.conv1, images)
    assert same_bits(outputs(part, images), adapted)
    loraio.attachment_of(part).detach()
    assert same_bits(outputs(part, images), outputs(base.conv1, images))


def test_a_copy_made_for_training_has_factors_of_its_own(base: nn.Module, three: loraio.Adapter) -> None:
    base.requires_grad_(False)
    with loraio.attach(base, three, trainable=True):
        twin = copy.deepcopy(base)
    other = loraio.attachment_of(twin)
    with torch.no_grad():
        for factor in other.parameters():
            assert factor.requires_grad
            factor.add_(1)
    assert loraio.adapter_from(twin).factors["conv1.weight.lora_A"].equal(three.factors["conv1.weight.lora_A"] + 1)


def test_a_model_without_an_adapter_or_with_two_is_told(base: nn.Module, three: loraio.Adapter) -> None:
    for function in (loraio.attachment_of, loraio.adapter_from):
        with pytest.raises(StateError, match="carries no adapter"):
            function(base)
    pair = nn.ModuleList([base, copy.deepcopy(base)])
    for part in pair:
        loraio.attach(part, three)
    with pytest.raises(StateError, match="2 parts of the model carry an adapter"):
        loraio.attachment_of(pair)
    assert loraio.attachment_of(pair[1]).model is pair[1]


# saving


def test_the_state_dict_of_an_attached_model_can_be_saved_and_loaded(
    base: nn.Module, three: loraio.Adapter, images: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(base)
    with loraio.attach(base, three):
        adapted = outputs(base, images)
        torch.save(base.state_dict(), tmp_path / "state.pt")
    changed = replace(three, factors={name: factor + 1 for name, factor in three.factors.items()})
    with loraio.attach(other, changed) as live:
        assert not same_bits(outputs(other, images), adapted)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same_bits(outputs(other, images), adapted)
        assert live.adapter == three, "the handle says what is on the model"
    assert live.adapter == three


@pytest.mark.parametrize(
    "save",
    [pickle.dumps, lambda model: torch.save(model, io.BytesIO()), lambda model: copy.copy(model.conv1)],
    ids=["pickle", "torch.save", "copy.copy"],
)
def test_pickling_a_whole_model_is_refused_with_what_to_do(
    base: nn.Module, three: loraio.Adapter, save: Callable[[nn.Module], Any]
) -> None:
    with (
        loraio.attach(base, three),
        pytest.raises(StateError, match=r"cannot be pickled\n  try: live\.detach\(\) first, or save"),
    ):
        save(base)
    save(base)


def test_a_module_that_stays_parametrized_by_others_is_not_blamed_on_the_adapter(
    base: nn.Module, three: loraio.Adapter
) -> None:
    live = loraio.attach(base, three)
    weight_norm(base.conv1, "bias", dim=0)
    live.detach()
    with pytest.raises(StateError, match="parametrized module cannot be pickled\n  try: save its state dict"):
        pickle.dumps(base)


# casts and layouts


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_cast_changes_the_base_and_not_the_adapter(
    base: nn.Module, three: loraio.Adapter, images: Tensor, dtype: torch.dtype, trainable: bool
) -> None:
    cast = copy.deepcopy(base).to(dtype)
    merged = loaded(cast, loraio.merge(cast.state_dict(), three, allow_base_mismatch=True))
    parameters = list(base.parameters())
    with loraio.attach(base, three, trainable=trainable) as live:
        base.to(dtype)
        assert same_bits(outputs(base, images.to(dtype)), outputs(merged, images.to(dtype)))
        assert live.adapter == three
        with pytest.raises(StateError if trainable else BaseMismatchError, match=r"trained|same weights cast to"):
            live.swap(three)
    assert all(a is b for a, b in zip(base.parameters(), parameters, strict=True))
    assert all(same_bits(a, b) for a, b in zip(base.parameters(), cast.parameters(), strict=True))


def test_factors_follow_the_model_to_another_device(base: nn.Module, three: loraio.Adapter) -> None:
    with loraio.attach(base, three) as live:
        base.to("meta")
        assert {tensor.device.type for tensor in base.state_dict().values()} == {"meta"}
    assert live.adapter == three


def test_channels_last_can_come_after_attach(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    merged = loaded(base, loraio.merge(base.state_dict(), three))
    merged.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with loraio.attach(base, three):
        base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for x in (images, images.to(memory_format=torch.channels_last)):
            assert same_bits(outputs(base, x), outputs(merged, x))
    assert base.conv2.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert all(same_bits(tensor, plain[name]) for name, tensor in base.state_dict().items())


# training aids


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_without(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset, use_reentrant: bool
) -> None:
    base.requires_grad_(False)
    images = digits.images[:16].clone().requires_grad_()  # torch asks for it where use_reentrant is true

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with loraio.attach(base, three, trainable=True) as live:
            nn.functional.cross_entropy(run(images), digits.labels[:16]).backward()
            return [factor.grad for factor in live.parameters() if factor.grad is not None]

    expected = gradients(base)
    assert len(expected) == 6
    found = gradients(lambda x: checkpoint(base, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, expected, **CHECKPOINTED)


def test_autocast_computes_what_the_merged_model_computes(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    merged = loaded(base, loraio.merge(base.state_dict(), three))
    with torch.autocast("cpu", torch.bfloat16), loraio.attach(base, three):
        assert base.conv1.weight.requires_grad  # type: ignore[union-attr]
        assert outputs(base, images).dtype == torch.bfloat16
        assert same_bits(outputs(base, images), outputs(merged, images))


def test_autocast_keeps_no_casts_of_folded_weights(base: nn.Module, three: loraio.Adapter) -> None:
    """It would keep one of each weight that asks for gradients, for every forward pass until it ends."""
    with torch.no_grad(), loraio.attach(base, three):
        assert base.conv1.weight.requires_grad  # type: ignore[union-attr]
        with torch.autocast("cpu", torch.bfloat16):
            assert not base.conv1.weight.requires_grad  # type: ignore[union-attr]


def test_training_under_autocast_has_the_gradients_of_float32_but_for_rounding(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset
) -> None:
    base.requires_grad_(False)

    def gradients(*, amp: bool) -> list[Tensor]:
        with loraio.attach(base, three, trainable=True) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(base(digits.images[:64]), digits.labels[:64])
            loss.backward()
            return [factor.grad for factor in live.parameters() if factor.grad is not None]

    found, expected = gradients(amp=True), gradients(amp=False)
    assert len(found) == 6
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert not a.equal(b)
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **HALF)


# wrappers


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
@pytest.mark.usefixtures("_compiler")
def test_a_compiled_model_computes_what_the_eager_one_computes(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    compiled = torch.compile(base, fullgraph=True)
    with loraio.attach(base, three):
        torch.testing.assert_close(outputs(compiled, images), outputs(base, images), **COMPILED)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
def test_a_compiled_model_has_the_gradients_of_the_eager_one(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset
) -> None:
    base.requires_grad_(False)
    compiled = torch.compile(base, fullgraph=True)

    def gradients(model: Any) -> list[Tensor]:
        with loraio.attach(base, three, trainable=True) as live:
            nn.functional.cross_entropy(model(digits.images[:32]), digits.labels[:32]).backward()
            return [factor.grad for factor in live.parameters() if factor.grad is not None]

    found = gradients(compiled)
    assert len(found) == 6
    torch.testing.assert_close(found, gradients(base), **COMPILED)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("kind", loraio.adapter.kinds.KINDS)
def test_every_kind_compiles_with_no_graph_break(attentive: nn.Module, kind: str) -> None:
    """Traced and run op by op, so that the results are the same bits."""
    adapter = adapter_for(attentive, kind=kind)
    x = torch.randn(2, 3, 8)
    with loraio.attach(attentive, adapter, trainable=True):
        compiled = torch.compile(attentive, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(outputs(compiled, x), outputs(attentive, x), **COMPILED)
        torch.testing.assert_close(compiled(x), attentive(x), **COMPILED)


@pytest.mark.usefixtures("_compiler")
def test_a_compiled_model_follows_every_change_of_the_handle(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor
) -> None:
    """Only traced: what is compiled and when is the same, and the bits are those of the eager model."""
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


@pytest.mark.usefixtures("_compiler")
def test_swaps_among_adapters_of_one_shape_compile_nothing_anew(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    counter = CompileCounter()
    compiled = torch.compile(base, fullgraph=True, backend=counter)
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


EXPORTERS = [exported, *([as_onnx] if importlib.util.find_spec("onnxscript") else [])]


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
