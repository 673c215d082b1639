"""Compare the training step of adapted layers with plain autograd: equal gradients, less work, less memory.

Unusual inputs and layers take the plain way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import live_models
import pytest
import torch
from live_models import graph_names, is_cheap, one_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import loraio
from loraio.live import routes
from loraio.live.geometry import Geometry
from loraio.live.training_step import FORWARDS, forward_for

adapter_for = functools.partial(live_models.adapter_for, alpha=3, clamp_rank=True)

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "wide": lambda: (nn.Conv2d(16, 24, 3, padding=1), torch.randn(2, 16, 6, 6)),
    "wide, strided": lambda: (nn.Conv2d(16, 24, 3, stride=2), torch.randn(2, 16, 7, 6)),
    "wide in groups": lambda: (nn.Conv2d(48, 64, 3, groups=2, dilation=2, padding="same"), torch.randn(2, 48, 5, 5)),
    "uneven same": lambda: (nn.Conv2d(4, 4, (2, 4), padding="same"), torch.randn(2, 4, 5, 6)),
    "valid": lambda: (nn.Conv2d(4, 4, 3, padding="valid"), torch.randn(2, 4, 5, 6)),
    "circular": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 5, 6)),
    "one point": lambda: (nn.Conv2d(12, 16, 1), torch.randn(2, 12, 5, 5)),
    "one point, strided": lambda: (nn.Conv2d(12, 16, 1, stride=(2, 3)), torch.randn(2, 12, 6, 7)),
    "one point of one": lambda: (nn.Conv2d(12, 16, 1), torch.randn(3, 12, 1, 1)),
    "depthwise 3": lambda: (nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.randn(2, 6, 7, 6)),
    "depthwise 5": lambda: (nn.Conv2d(6, 6, 5, padding=2, groups=6), torch.randn(2, 6, 7, 6)),
    "depthwise 7, strided": lambda: (
        nn.Conv2d(6, 6, (3, 7), stride=(1, 2), padding=(0, 3), groups=6),
        torch.randn(2, 6, 5, 9),
    ),
    "depthwise 4 with more": lambda: (nn.Conv2d(4, 8, 4, groups=4), torch.randn(2, 4, 6, 6)),
    "Conv1d": lambda: (nn.Conv1d(12, 20, 3, stride=2, padding=1), torch.randn(3, 12, 9)),
    "Conv3d": lambda: (nn.Conv3d(4, 12, 3, padding=1), torch.randn(1, 4, 4, 5, 3)),
    "Linear": lambda: (nn.Linear(12, 16), torch.randn(3, 12)),
    "Linear with many rows": lambda: (nn.Linear(6, 8, bias=False), torch.randn(4, 5, 6)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """Make a frozen model of one layer in float64, and an input."""
    torch.manual_seed(0)
    layer, x = LAYERS[request.param]()
    return nn.Sequential(layer).double().requires_grad_(False), x.double()


class Ops(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func._schema.name.removeprefix("aten::"), args))
        return func(*args, **(kwargs or {}))


def plain(model: nn.Module, x: Tensor, adapter: loraio.Adapter, leaves: dict[str, Tensor]) -> Tensor:
    """Return the model's output with weights that are folded in tensor arithmetic."""
    weights = {
        name: model.state_dict()[name]
        + (target.scale * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]).view(target.shape)
        for name, target in adapter.targets.items()
    }
    result: Tensor = torch.func.functional_call(model, weights, (x,))
    return result


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("thin", [0, 1e9, None], ids=["thin", "full", "as it is"])
def test_gradients_are_those_of_plain_arithmetic_either_way(
    case: tuple[nn.Module, Tensor], thin: float | None, memory_format: torch.memory_format, monkeypatch: Any
) -> None:
    model, x = case
    if memory_format == torch.channels_last:
        if x.dim() != 4:
            pytest.skip("of images only")
        x = x.contiguous(memory_format=memory_format)
    if thin is not None:
        monkeypatch.setattr(routes, "THIN", thin)
    adapter = adapter_for(model)
    x = x.requires_grad_()
    leaves = {name: factor.double().requires_grad_() for name, factor in adapter.factors.items()}
    expected = plain(model, x, adapter, leaves)
    with loraio.attach(model, adapter, trainable=True) as live:
        found = model(x)
        assert is_cheap(found)
        torch.testing.assert_close(found, expected)
        inputs = [x, *live.parameters()]
        gradients = torch.autograd.grad(found.square().sum(), inputs)
    others = torch.autograd.grad(expected.square().sum(), [x, *leaves.values()])
    for gradient, other, tensor in zip(gradients, others, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        torch.testing.assert_close(gradient, other, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_activation_in_place_gives_the_same_gradients(
    case: tuple[nn.Module, Tensor], memory_format: torch.memory_format
) -> None:
    model, x = case
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    x.requires_grad_()
    found = []
    with loraio.attach(model, adapter_for(model), trainable=True) as live:
        for inplace in (False, True):
            y = nn.ReLU(inplace)(model(x))
            assert is_cheap(y)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *live.parameters()])])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def factors_to_double(model: Any) -> None:
    for part in (layer.parametrizations.weight[0] for layer in model):
        for name, factor in list(part.named_parameters()):
            setattr(part, name, nn.Parameter(factor.detach().double()))


@pytest.mark.parametrize("thin", [0, 1e9], ids=["thin", "full"])
def test_first_and_second_derivatives_pass_gradcheck(
    case: tuple[nn.Module, Tensor], thin: float, monkeypatch: Any
) -> None:
    model, x = case
    monkeypatch.setattr(routes, "THIN", thin)
    adapter = adapter_for(model)
    with loraio.attach(model, adapter, trainable=True) as live:
        factors_to_double(model)
        factors = [x.requires_grad_(), *live.parameters()]

        def run(x: Tensor, *_: Tensor) -> Tensor:
            result: Tensor = model(x)
            return result

        assert is_cheap(run(x))
        assert torch.autograd.gradcheck(run, factors, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, factors, fast_mode=True)


def convolution_backwards(model: nn.Module, x: Tensor, *targets: str) -> list[tuple[Any, ...]]:
    """Return the arguments of torch's ``convolution_backward`` in a training step."""
    model.requires_grad_(False)
    with loraio.attach(model, adapter_for(model, *targets), trainable=True):
        loss = model(x).sum()
        with Ops() as ops:
            loss.backward()
    return [args for name, args in ops.calls if name == "convolution_backward"]


def test_a_wide_layer_never_computes_its_whole_weight_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1))
    found = convolution_backwards(model, torch.randn(2, 16, 6, 6).requires_grad_())
    assert [args[2].shape for args in found if args[-1][1]] == [(2, 16, 3, 3)]


def test_few_positions_add_thin_products_and_keep_the_hidden_channels() -> None:
    """Four points are fewer than the channels, so neither pass folds a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(256, 64, 3, padding=1), nn.Conv2d(64, 300, 1)).double().requires_grad_(False)
    adapter = adapter_for(model)
    x = torch.randn(1, 256, 2, 2).double().requires_grad_()
    leaves = {name: factor.double().requires_grad_() for name, factor in adapter.factors.items()}
    expected = plain(model, x, adapter, leaves)
    others = torch.autograd.grad(expected.square().sum(), [x, *leaves.values()])
    with loraio.attach(model, adapter, trainable=True) as live:
        factors_to_double(model)
        kept: list[Any] = []
        with Ops() as ops:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
                found = model(x)
            gradients = torch.autograd.grad(found.square().sum(), [x, *live.parameters()])
    assert (1, 2, 2, 2) in kept
    assert not [name for name, args in ops.calls if name == "addmm" and args[0].shape in ((64, 2304), (300, 64))]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, others)


def test_one_point_kernels_of_images_whose_channels_come_last_are_one_product() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)).requires_grad_(False)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    with loraio.attach(model, adapter_for(model), trainable=True):
        with Ops() as ops:
            y = model(x)
            y.sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert not [name for name, _ in ops.calls if "conv" in name]


def test_gradients_of_input_and_whole_weight_come_of_one_call() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6))
    found = convolution_backwards(model, torch.randn(2, 6, 7, 6).requires_grad_())
    assert [args[-1] for args in found] == [[True, True, False]]


@pytest.mark.parametrize(("targets", "inputs"), [("all", 1), ("2", 0)])
def test_nothing_is_computed_for_an_input_that_needs_no_gradient(targets: str, inputs: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    masks = [args[-1] for args in convolution_backwards(model, torch.randn(2, 3, 8, 8), targets)]
    assert sum(mask[0] for mask in masks) == inputs
    assert not any(mask[2] for mask in masks)


@pytest.mark.parametrize("network", ["digit-cnn", "torchvision:mobilenet_v3_small", "torchvision:resnet18"])
def test_hardly_more_is_kept_for_the_backward_pass_than_by_full_fine_tuning(network: str) -> None:
    model = loraio.build_network(network, seed=0)
    x = torch.randn(2, 1, 28, 28) if network == "digit-cnn" else torch.randn(2, 3, 64, 64)

    def kept() -> int:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x).sum()
        total = sum(storage.nbytes() for place, storage in storages.items() if place not in parameters)
        loss.backward()
        return total

    full = kept()
    adapter = adapter_for(model, "conv", "linear", rank=8)
    model.requires_grad_(False)
    with loraio.attach(model, adapter, trainable=True):
        assert kept() <= (1.03 if network == "digit-cnn" else 0.75) * full


def test_frozen_normalisation_has_the_gradients_of_torchs_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, affine=False))
    for norm in (model[1], model[3]):
        norm.running_mean.uniform_()  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    nn.init.uniform_(model[1].weight)  # type: ignore[arg-type]
    model.double().requires_grad_(False).eval()
    adapter = adapter_for(model)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    leaves = {name: factor.double().requires_grad_() for name, factor in adapter.factors.items()}
    expected = torch.autograd.grad(plain(model, x, adapter, leaves).square().sum(), list(leaves.values()))
    with loraio.attach(model.train(), adapter, trainable=True) as live:
        result = model(x)
        assert "FrozenNormBackward" in set(graph_names(result.grad_fn))
        found = torch.autograd.grad(result.square().sum(), list(live.parameters()))
        y = x.clone().requires_grad_()
        assert torch.autograd.gradgradcheck(model[1], [torch.randn(2, 6, 3, 3).double().requires_grad_()])
        model[1].weight.requires_grad_(True)  # type: ignore[union-attr]
        assert next(graph_names(model[1](y[:, [0, 1, 2, 3, 0, 1]]).grad_fn)) == "NativeBatchNormBackward0"
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    assert type(model[1]).forward is nn.BatchNorm2d.forward


# the plain way


class OwnForward(nn.Conv2d):
    """Computes otherwise than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnConvolution(nn.Conv2d):
    """Computes otherwise at a lower place."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize("cls", [OwnForward, OwnConvolution, nn.ConvTranspose2d, nn.Embedding, nn.Bilinear])
def test_layers_with_a_forward_of_their_own_keep_it(cls: type[nn.Module]) -> None:
    assert forward_for(cls) is None
    assert {forward_for(known) for known in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)} < {*FORWARDS.values()}


def test_a_kind_without_such_a_step_takes_the_plain_way() -> None:
    model, x = one_layer()
    with loraio.attach(model, loraio.new_adapter(model, loraio.TrainConfig(kind="dora", rank=2)), trainable=True):
        assert not is_cheap(model(x))


def test_what_is_out_of_the_ordinary_takes_the_plain_way_and_gives_the_same() -> None:
    model, x = one_layer()
    with loraio.attach(model, adapter_for(model), trainable=True) as live:
        expected = model(x)
        assert is_cheap(expected)
        with parametrize.cached():
            cached = model(x)
        unbatched = model(x[0])[None]
        vmapped = torch.func.vmap(model)(x)
        model.requires_grad_(True)
        learning = model(x)
        model.requires_grad_(False)
        with torch.no_grad():
            assert not model(x).requires_grad
        for other, rows in ((cached, 2), (unbatched, 1), (vmapped, 2), (learning, 2)):
            assert not (other.grad_fn is not None and is_cheap(other))
            torch.testing.assert_close(other, expected[:rows])
        for parameter in live.parameters():
            parameter.requires_grad_(True)
        assert is_cheap(model(x))
        live.disable()
        assert not model(x).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use, when it loads
def test_forward_mode_differentiation_works() -> None:
    model, x = one_layer()
    with loraio.attach(model, adapter_for(model), trainable=True):
        _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, model(x + 1) - model(x), rtol=1e-3, atol=1e-4)


def test_strength_counts_as_it_was_in_the_forward_pass() -> None:
    model, x = one_layer()
    with loraio.attach(model, adapter_for(model), trainable=True) as live:
        found = []
        for later in (1.0, 5.0):
            live.strength = 2.0
            loss = model(x).square().sum()
            live.strength = later
            found.append(torch.autograd.grad(loss, list(live.parameters())))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        live.strength = 0.0
        assert not any(gradient.any() for gradient in torch.autograd.grad(model(x).sum(), list(live.parameters())))


def test_factors_changed_between_the_passes_are_refused() -> None:
    model, x = one_layer()
    with loraio.attach(model, adapter_for(model), trainable=True) as live:
        loss = model(x).sum()
        with torch.no_grad():
            next(live.parameters()).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks_run_and_a_deep_copy_steps_by_itself() -> None:
    model, x = one_layer()
    with loraio.attach(model, adapter_for(model), trainable=True) as live:
        seen: list[Any] = []
        handle = model[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs))
        model(x.requires_grad_()).sum().backward()
        handle.remove()
        assert len(seen) == 1
        other = copy.deepcopy(model)
        for parameter in live.parameters():
            parameter.grad = None
        assert is_cheap(other(x))
        other(x).sum().backward()
        assert all(parameter.grad is None for parameter in live.parameters())
        assert all(p.grad is not None for p in loraio.attachment_of(other).parameters())
    assert is_cheap(other(x)), "detaching one of them must leave the other alone"
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(6, 5)], ids=["Conv2d", "Linear"])
def test_autocast_gives_the_dtypes_of_the_plain_way(layer: nn.Module) -> None:
    model, x = nn.Sequential(layer).requires_grad_(False), torch.randn(2, 4, 6, 6)
    with loraio.attach(model, adapter_for(model), trainable=True) as live, torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        with parametrize.cached():
            expected = model(x)
        assert is_cheap(found)
        assert not is_cheap(expected)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert found.equal(expected)
        found.float().sum().backward()
        assert {factor.grad.dtype for factor in live.parameters() if factor.grad is not None} == {torch.float32}


def test_depthwise_gradients_are_split_on_a_cpu() -> None:
    x, grad = torch.randn(2, 6, 7, 8), torch.randn(2, 6, 4, 4)
    geometry = Geometry((2, 2), (2, 2), (1, 1), 6)
    with Ops() as ops:
        found = geometry.weight_gradient(grad, x, torch.empty(6, 1, 5, 5))
    assert [args[2].shape for name, args in ops.calls if name == "convolution_backward"] == [(6, 1, 5, 3)] * 2
    expected = torch.nn.grad.conv2d_weight(x, (6, 1, 5, 5), grad, 2, 2, 1, 6)
    torch.testing.assert_close(found, expected)
