"""Change the adapter of a compiled model with reserved weights: nothing compiles again and no weight is stale."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_models import (
    COMPILED,
    INDUCTOR,
    WRITES,
    adapter_for,
    adapters_of_every_form,
    assert_fresh,
    assert_threads_see_one_strength_or_the_other,
    base_weight,
    compiled_once,
    needs_cpp,
    outputs,
    places,
    same_bits,
    write,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import loraio
from loraio.errors import BaseMismatchError, StateError, UnknownNameError
from loraio.files.tensors import tensor_bytes
from loraio.live.fitting import Reserve
from loraio.live.parametrization import FoldedWeight

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def many(trained_base: nn.Module) -> list[loraio.Adapter]:
    return [*adapters_of_every_form(trained_base), *adapters_of_every_form(trained_base, "dora")]


# swaps


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_no_swap_of_any_rank_alpha_kind_or_targets_compiles_anew(
    base: nn.Module, many: list[loraio.Adapter], images: Tensor, backend: str
) -> None:
    compiled, counter = compiled_once(base, backend)
    live = loraio.attach(base, many[0], reserve="all")
    seen = [assert_fresh(compiled, live, images)]

    def check() -> None:
        seen.append(assert_fresh(compiled, live, images))
        assert not seen[-1].allclose(seen[-2], rtol=1e-3), "a step that changes nothing proves nothing"

    dice = random.Random(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(24):
            live.swap(many[(number + 1) % len(many)])
            check()
            live.strength = dice.choice([-0.5, 0.5, 2.0])
            check()
            if number % 4 == 0:
                live.disable()
                check()
                live.enable()
            live.strength = 1.0
    assert counter.frame_count == 1


def test_what_is_not_reserved_compiles_anew_as_the_counter_tells(
    base: nn.Module, many: list[loraio.Adapter], images: Tensor
) -> None:
    """Show that the test above can fail: without a reserve the same swaps compile again."""
    compiled, counter = compiled_once(base)
    live = loraio.attach(base, many[0])
    for adapter in many[:4]:
        live.swap(adapter)
        torch.testing.assert_close(outputs(compiled, images), outputs(base, images), **COMPILED)
    assert counter.frame_count > 1


@pytest.mark.slow
@needs_cpp
def test_swaps_of_a_model_compiled_for_little_overhead(
    base: nn.Module, many: list[loraio.Adapter], images: Tensor
) -> None:
    compiled = torch.compile(base, fullgraph=True, mode="reduce-overhead")
    live = loraio.attach(base, many[0], reserve="all")
    outputs(compiled, images)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in many:
            live.swap(adapter)
            assert_fresh(compiled, live, images)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_batches_of_any_size_share_a_graph(
    base: nn.Module, many: list[loraio.Adapter], digits_test: loraio.Dataset, backend: str
) -> None:
    compiled, counter = compiled_once(base, backend, dynamic=True)
    live = loraio.attach(base, many[0], reserve="all")
    for size, adapter in enumerate(many, start=2):
        live.swap(adapter)
        assert_fresh(compiled, live, digits_test.images[:size])
    assert counter.frame_count == 1


def test_a_part_that_is_compiled_alone_is_compiled_once(
    base: nn.Module, many: list[loraio.Adapter], images: Tensor
) -> None:
    conv2: Any = base.conv2
    counter = CompileCounterWithBackend("aot_eager")
    conv2.compile(fullgraph=True, backend=counter)
    live = loraio.attach(base, many[0], reserve="all")
    for adapter in many:
        live.swap(adapter)
        assert_fresh(base, live, images)
    assert counter.frame_count == 1


# reserved weights

FORMS: dict[str, tuple[Callable[[list[loraio.Adapter]], Reserve], tuple[str, ...]]] = {
    "nothing more": (lambda many: (), ("conv1",)),
    "a pattern": (lambda many: "linear", ("conv1", "fc")),
    "an adapter": (lambda many: many[2], ("conv1", "conv2", "fc")),
    "several": (lambda many: ["conv3", many[4]], ("conv1", "conv3", "fc")),
    "a generator": (lambda many: (adapter for adapter in many[:2]), ("conv1", "conv2", "conv3")),
}


@pytest.mark.parametrize(("reserve", "paths"), FORMS.values(), ids=FORMS)
def test_a_reserve_is_patterns_or_adapters_and_always_the_adapters_own(
    base: nn.Module,
    many: list[loraio.Adapter],
    reserve: Callable[[list[loraio.Adapter]], Reserve],
    paths: tuple[str, ...],
) -> None:
    live = loraio.attach(base, many[0], reserve=reserve(many))
    assert live.reserved == tuple(f"{path}.weight" for path in paths)
    assert loraio.attachment_of(copy.deepcopy(base)).reserved == live.reserved


def test_nothing_is_reserved_unless_asked_for(base: nn.Module, three: loraio.Adapter) -> None:
    live = loraio.attach(base, three)
    assert live.reserved is None
    for place in places(live).values():
        assert isinstance(place.part, FoldedWeight)
        assert place.part.slot is None


def test_a_bank_reserves_for_all_of_its_adapters(base: nn.Module, many: list[loraio.Adapter], images: Tensor) -> None:
    bank = loraio.Bank({str(number): adapter for number, adapter in enumerate(many[:3])})
    compiled, counter = compiled_once(base)
    live = bank.attach(base, "0", reserve=True)
    assert live.reserved == tuple(f"{path}.weight" for path in ("conv1", "conv2", "conv3", "fc"))
    for name in bank:
        assert bank.swap(base, name) is live
        assert_fresh(compiled, live, images)
    assert counter.frame_count == 1


def test_an_adapter_outside_of_the_reserve_is_refused_before_anything_changes(
    base: nn.Module, many: list[loraio.Adapter], images: Tensor
) -> None:
    compiled, counter = compiled_once(base)
    live = loraio.attach(base, many[0], reserve="conv2")
    before = assert_fresh(compiled, live, images)
    for adapter, outside in ((many[1], ["conv3.weight"]), (many[3], ["conv3.weight", "fc.weight"])):
        with pytest.raises(StateError, match="has reserved no place") as caught:
            live.swap(adapter)
        assert caught.value.problems == tuple(f"{name!r} is adapted and not reserved" for name in outside)
        assert str(outside) in str(caught.value.hint)
        assert live.adapter is many[0]
        assert same_bits(assert_fresh(compiled, live, images), before)
    assert counter.frame_count == 1
    live.detach()
    loraio.attach(base, many[0], reserve=["conv2", *outside]).swap(adapter)


def test_whole_tensors_have_no_reserve(base: nn.Module, three: loraio.Adapter) -> None:
    heads = loraio.new_adapter(base, loraio.TrainConfig(targets=("conv1",), heads={"fc": 12}))
    with pytest.raises(StateError, match="replaced whole, which cannot be reserved"):
        loraio.attach(base, heads, reserve="conv")
    assert type(base.conv1) is nn.Conv2d
    live = loraio.attach(base, three, reserve="conv")
    with pytest.raises(StateError, match="attach without reserve"):
        live.swap(heads)
    assert live.adapter is three


def test_what_cannot_be_reserved_is_refused(base: nn.Module, one_conv: loraio.Adapter) -> None:
    elsewhere = adapter_for(nn.Sequential(nn.Linear(2, 2)), "linear", rank=1)
    with pytest.raises(UnknownNameError, match=r"no target '0\.weight'"):
        loraio.attach(base, one_conv, reserve=elsewhere)
    with pytest.raises(UnknownNameError, match="pattern 'conv9' matches no weight"):
        loraio.attach(base, one_conv, reserve=["conv9"])
    with pytest.raises(BaseMismatchError):
        loraio.attach(base, elsewhere, reserve="all")


def test_detach_gives_back_what_was_reserved_and_never_adapted(
    base: nn.Module, one_conv: loraio.Adapter, images: Tensor
) -> None:
    plain = outputs(base, images)
    before = {name: (id(parameter), tensor_bytes(parameter)) for name, parameter in base.named_parameters()}
    keys = list(base.state_dict())
    compiled, _ = compiled_once(base, "aot_eager")
    with loraio.attach(base, one_conv, reserve="all") as live:
        outputs(compiled, images)
        assert list(loraio.base_state_dict(base)) == keys
        assert loraio.adapter_from(base) is one_conv
        assert [name for name in base.state_dict() if "conv2" in name and "original" not in name] == ["conv2.bias"]
    assert not live.attached
    assert list(base.state_dict()) == keys
    assert type(base.conv2) is nn.Conv2d
    for name, parameter in base.named_parameters():
        assert before[name][0] == id(parameter)
        assert tensor_bytes(parameter).equal(before[name][1])
    assert same_bits(outputs(base, images), plain)
    torch.testing.assert_close(outputs(compiled, images), plain, **COMPILED)


# nothing is stale


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_no_change_past_the_handle_leaves_a_stale_weight_or_compiles_anew(
    base: nn.Module, three: loraio.Adapter, images: Tensor, backend: str
) -> None:
    compiled, counter = compiled_once(base, backend)
    live = loraio.attach(base, three, reserve="all", allow_base_mismatch=True)
    before = outputs(compiled, images)
    changes = {**WRITES, "write to a reserved base weight": lambda model: write(base_weight(model, "fc"))}
    for name, change in changes.items():
        change(base)
        found = outputs(compiled, images)  # before anything else looks
        assert not found.equal(before), name
        assert found.equal(outputs(compiled, images)), name
        assert_fresh(compiled, live, images)
        with torch.no_grad():  # keep the numbers small
            for parameter in base.parameters():
                parameter.div_(parameter.abs().max() + 1)
        before = assert_fresh(compiled, live, images)
    assert counter.frame_count == 1


def test_a_weight_is_folded_once_in_a_compiled_model_too(
    base: nn.Module, three: loraio.Adapter, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fold = loraio.Target.fold
    monkeypatch.setattr(loraio.Target, "fold", lambda *args, **options: (calls.append(1), fold(*args, **options))[1])
    compiled, _ = compiled_once(base, "aot_eager")
    loraio.attach(base, three, reserve="all")
    for _ in range(3):
        outputs(compiled, images)
    assert len(calls) == 3
    write(base_weight(base))
    for _ in range(3):
        outputs(compiled, images)
    assert len(calls) == 4


def test_uncounted_writes_need_a_refresh(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    compiled, _ = compiled_once(base)
    live = loraio.attach(base, three, reserve="all")
    before = outputs(compiled, images)
    base_weight(base).data.mul_(1.5)
    assert outputs(compiled, images).equal(before)  # as the documentation says
    live.refresh()
    assert not assert_fresh(compiled, live, images).equal(before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_another_dtype_or_layout_is_followed(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor, backend: str
) -> None:
    compiled, _ = compiled_once(base, backend)
    live = loraio.attach(base, three, reserve="all", allow_base_mismatch=True)
    outputs(compiled, images)
    base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_fresh(compiled, live, images)
    base.double()
    assert_fresh(compiled, live, images)
    base.load_state_dict({name: tensor.float() for name, tensor in base.state_dict().items()}, assign=True)
    torch.testing.assert_close(outputs(compiled, images), outputs(base, images), **COMPILED)
    live.swap(seven)
    assert_fresh(compiled, live, images)
    base.to("meta")
    assert {tensor.device.type for tensor in base.state_dict().values()} == {"meta"}


def test_a_copy_is_compiled_and_changed_for_itself(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor
) -> None:
    compiled, _ = compiled_once(base, "aot_eager")
    live = loraio.attach(base, three, reserve="all")
    before = assert_fresh(compiled, live, images)
    twin = copy.deepcopy(base)
    own, counter = compiled_once(twin, "aot_eager")
    other = loraio.attachment_of(twin)
    assert same_bits(assert_fresh(own, other, images), before)
    write(base_weight(twin))
    assert not assert_fresh(own, other, images).allclose(before)
    assert same_bits(assert_fresh(compiled, live, images), before)
    live.swap(seven)
    assert not assert_fresh(compiled, live, images).allclose(before)
    before = outputs(compiled, images)
    write(base_weight(base))
    assert not assert_fresh(compiled, live, images).allclose(before)
    del base, compiled, live
    other.strength = 0.5
    assert_fresh(own, other, images)
    assert counter.frame_count == 1


def test_inference_mode_and_gradients_of_the_input(base: nn.Module, many: list[loraio.Adapter], images: Tensor) -> None:
    base.requires_grad_(False)
    compiled, _ = compiled_once(base, "aot_eager")
    live = loraio.attach(base, many[0], reserve="all")
    for adapter in many[:4]:
        live.swap(adapter)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(images), base(images), **COMPILED)
        found, expected = images.clone().requires_grad_(), images.clone().requires_grad_()
        compiled(found).square().sum().backward()
        base(expected).square().sum().backward()
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-3)
        assert found.grad is not None
        assert found.grad.any()
        assert_fresh(compiled, live, images)


def test_gradients_of_the_base_are_those_of_the_eager_model(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    compiled, _ = compiled_once(base, "aot_eager")
    loraio.attach(base, three, reserve="all")

    def gradients(model: Any) -> list[Tensor]:
        base.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad for parameter in base.parameters() if parameter.grad is not None]

    expected = gradients(base)
    assert len(expected) == 8
    torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 copies the adapter while it traces")
def test_an_exported_program_needs_nothing_of_ours(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    with loraio.attach(base, three, reserve="all"), torch.no_grad():
        program = torch.export.export(base, (images,))
        assert "loraio" not in program.graph_module.code
        torch.testing.assert_close(program.module()(images), base(images), **COMPILED)


def test_threads_see_one_strength_or_the_other(base: nn.Module, one_conv: loraio.Adapter, images: Tensor) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(base, backend=counter)  # fullgraph=True is checked by a count that threads disturb
    live = loraio.attach(base, one_conv, reserve=())
    assert_threads_see_one_strength_or_the_other(compiled, live, images)
    assert counter.frame_count == 1
