"""Every adapter kind on every layer type, in every geometry: attached equals merged to the bit, gradients are those of
the formula written by hand, and detach leaves nothing behind.

The grid of convolutions is dimension x kernel x stride x padding x dilation x groups x padding mode x kind x dtype.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling import LEFT_OUT, sample, sampled_or_all
from torch import Tensor, nn

import loraio
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.bases.targets import target_modules
from loraio.merging.determinism import scribble

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

CHANNELS = 4

GRADIENT_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of the largest gradient: some roundings of the dtype, through a fold, a convolution and a square."""

ANSWER_TOLERANCE = 0.05
"""Of the largest answer: what 16 bits may be away from float32."""

SAMPLED = 12
"""Geometries of a layer type, kind and dtype in a run without ``--all``."""

COMBINATIONS = 3_456
"""How many the grid of convolutions has for each kind; a grid that shrinks unnoticed would prove less."""


Case = tuple[nn.Module, Any]
"""A layer and an input for it, float32."""


def geometries(name: str) -> list[dict[str, Any]]:
    """Return the arguments of a convolution in each geometry that torch takes."""
    dims, transposed = LAYER_TYPES[name].dims - 2, "Transpose" in name
    kernels: list[Any] = [1, 3, *([(1, 3), (1, 1, 3)][dims - 2 : dims - 1] if dims > 1 else [])]
    axes: dict[str, list[Any]] = {
        "kernel_size": kernels,
        "stride": [1, 2],
        "padding": [0, 1] if transposed else [0, 1, "same"],
        "dilation": [1, 2],
        "groups": [1, 2, CHANNELS],
        "padding_mode": ["zeros"] if transposed else ["zeros", "reflect", "replicate", "circular"],
    }
    every = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [each for each in every if each["padding"] != "same" or each["stride"] == 1]  # torch refuses the others


def convolution(name: str, geometry: dict[str, Any]) -> Case:
    layer = getattr(nn, name)(CHANNELS, 2 * CHANNELS, **geometry)
    return layer, torch.randn(2, CHANNELS, *[6] * (LAYER_TYPES[name].dims - 2))


def others(name: str) -> Iterator[Case]:
    """Yield the layers without geometry."""
    if name == "Linear":
        yield nn.Linear(6, 8), torch.randn(3, 6)
        yield nn.Linear(6, 8, bias=False), torch.randn(2, 3, 6)
    elif name == "Bilinear":
        yield OnePair(nn.Bilinear(3, 4, 5)), (torch.randn(2, 3), torch.randn(2, 4))
    elif name == "Embedding":
        yield nn.Embedding(9, 4, padding_idx=0), torch.tensor([[0, 3], [8, 3]])
    elif name == "MultiheadAttention":
        x = torch.randn(2, 3, 8)
        yield SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)), x
        yield SelfAttention(nn.MultiheadAttention(8, 2, kdim=8, vdim=8, bias=False, batch_first=True)), x
        yield CrossAttention(nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)), x


def cases(name: str, most: int | None, *, key: object) -> Iterator[Case]:
    """Yield a layer type's cases: all of them, or so many that the seed and a key draw."""
    if name not in CONVOLUTIONS:
        torch.manual_seed(0)
        yield from others(name)
        return
    every = list(enumerate(geometries(name)))
    for number, geometry in every if most is None else sample(every, most, key=key):
        torch.manual_seed(number)
        yield convolution(name, geometry)


class OnePair(nn.Module):
    """A layer of two inputs, for a pair."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        result: Tensor = self.inner(*pair)
        return result


class SelfAttention(OnePair):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return result


class CrossAttention(OnePair):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = self.inner(x, x[..., :6], x[..., :4])[0]
        return result


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(cast(part, dtype) for part in x)
    return x.to(dtype) if x.is_floating_point() else x


def random_adapter(model: nn.Module, kind: str) -> loraio.Adapter:
    """An adapter for every target, with random factors; magnitudes near the weight's own."""
    rank = min(
        2,
        *(min(t.layer.matrix_shape(t.weight.shape, t.groups)) for t in target_modules(model).values()),
    )
    adapter = loraio.new_adapter(model, loraio.TrainConfig(kind=kind, rank=rank, alpha=3, targets=("all",)))
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: factor * 1.25 if name.endswith("magnitude") else 0.3 * torch.randn(factor.shape, generator=generator)
        for name, factor in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def check_forward(model: nn.Module, x: Any, kind: str) -> None:
    adapter = random_adapter(model, kind)
    parameters = list(model.named_parameters())
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = loraio.merge(model.state_dict(), adapter)
    report = loraio.verify_weights(kept, adapter, merged)
    assert report.ok, report.problems
    with torch.no_grad():
        plain = model(x)
        with loraio.attach(model, adapter):
            attached = model(x)
        assert model(x).equal(plain)
        assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in parameters]
        assert all(model.state_dict()[name].equal(kept[name]) for name in kept)
        assert list(model.state_dict()) == list(kept)
        model.load_state_dict(merged)
        assert model(x).equal(attached), "merged differs from attached"
        model.load_state_dict(kept)
        assert not attached.equal(plain)


def lora_by_hand(W: Tensor, factors: dict[str, Tensor]) -> Tensor:
    return W + 3 / len(factors["lora_A"]) * (factors["lora_B"] @ factors["lora_A"])


def dora_by_hand(W: Tensor, factors: dict[str, Tensor]) -> Tensor:
    V = lora_by_hand(W, factors)
    return factors["magnitude"].to(V.dtype)[:, None] * V / V.square().sum(1, keepdim=True).sqrt()


BY_HAND: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {"lora": lora_by_hand, "dora": dora_by_hand}
"""The formula of each kind, in torch and without code of the package. A new kind needs one here."""


def matrix_by_hand(weight: Tensor, layer: str, groups: int) -> Tensor:
    """Output channel by output channel, with no reshape of a whole weight."""
    if layer == "Embedding":
        return torch.stack([weight[:, feature] for feature in range(weight.shape[1])])
    if "Transpose" not in layer:
        return torch.stack([row.flatten() for row in weight])
    ins, outs = weight.shape[0] // groups, weight.shape[1]
    return torch.stack([weight[g * ins : (g + 1) * ins, o].flatten() for g in range(groups) for o in range(outs)])


def weight_by_hand(matrix: Tensor, layer: str, groups: int, shape: tuple[int, ...]) -> Tensor:
    if layer == "Embedding":
        return torch.stack([matrix[:, entry] for entry in range(shape[0])])
    if "Transpose" not in layer:
        return torch.stack([row.reshape(shape[1:]) for row in matrix])
    ins, outs = shape[0] // groups, shape[1]
    rows = matrix.reshape(groups, outs, ins, *shape[2:])
    return torch.stack([torch.stack([rows[g, o, i] for o in range(outs)]) for g in range(groups) for i in range(ins)])


def check_gradients(model: nn.Module, x: Any, kind: str, dtype: torch.dtype) -> None:
    adapter = random_adapter(model, kind)
    model.requires_grad_(False)
    with loraio.attach(model, adapter, trainable=True) as live:
        model(x).float().square().sum().backward()
        found = [parameter.grad for parameter in live.parameters()]
    weights: dict[str, Tensor] = {}
    leaves: list[Tensor] = []
    for name, target in adapter.targets.items():
        factors = {short: factor.clone().requires_grad_() for short, factor in adapter.factors_of(name).items()}
        leaves += factors.values()
        W = matrix_by_hand(model.state_dict()[name].float(), target.layer, target.groups)
        folded = BY_HAND[kind](W, factors)
        weights[name] = weight_by_hand(folded, target.layer, target.groups, target.shape).to(dtype)
    output = torch.func.functional_call(model, weights, (x,))
    expected = torch.autograd.grad(output.float().square().sum(), leaves)
    # of the largest of all: a factor may have a gradient of nothing but rounding, as DoRA's B at a fan-in of 1
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, other, rtol=0, atol=GRADIENT_TOLERANCE[dtype] * largest, check_dtype=False)


def fault(model: nn.Module, x: Any, *, calls: int = 2) -> str | None:
    """Return why the plain layer itself cannot be relied on with this input: torch 2.6 reads, on some processors,
    memory that nobody wrote. None if it says the same each time, near what it says in float32."""
    with torch.no_grad():
        answers = []
        for _ in range(calls):
            answers.append(model(x))
            scribble()
        exact = copy.deepcopy(model).float()(cast(x, torch.float32))
    if not all(answer.equal(answers[0]) for answer in answers):
        return "another answer to the same input"
    apart = float((answers[0].float() - exact).abs().max() / exact.abs().max())
    return None if apart <= ANSWER_TOLERANCE else f"{apart:.2g} of the largest answer away from float32"


def check(model: nn.Module, x: Any, kind: str, dtype: torch.dtype) -> str | None:
    """Check one case; if torch's own layer is at fault, the reason in place of a failure."""
    why = fault(model, x)
    if why is None:
        try:
            check_forward(model, x, kind)
            check_gradients(model, x, kind, dtype)
        except AssertionError:
            why = fault(model, x, calls=60)
            if why is None:
                raise
    return why


CONVOLUTIONS = [name for name, layer in LAYER_TYPES.items() if layer.group == "conv"]


@pytest.mark.parametrize("most", sampled_or_all(SAMPLED))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYER_TYPES)
def test_attached_equals_merged_gradients_are_right_and_detach_restores(
    name: str, kind: str, dtype: torch.dtype, most: int | None, record_property: Callable[[str, object], None]
) -> None:
    ran = 0
    for layer, x in cases(name, most, key=(name, kind, dtype)):
        why = check(nn.Sequential(layer).to(dtype).eval(), cast(x, dtype), kind, dtype)
        if why is not None:
            record_property(LEFT_OUT, f"{layer}, {dtype}: {why}")
        ran += 1
    assert ran == min(most or COMBINATIONS, grid_size(name))


class Unsure(nn.Linear):
    """A layer with an answer of its own each time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(())


class Wrong(nn.Linear):
    """A layer that is far off in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if x.dtype == torch.float32 else 2)


def test_a_layer_that_torch_computes_wrongly_is_left_out_by_name() -> None:
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    assert fault(Unsure(3, 3).bfloat16(), x) == "another answer to the same input"
    assert "away from float32" in (fault(Wrong(3, 3).bfloat16(), x) or "")
    assert fault(nn.Linear(3, 3).bfloat16(), x) is None


def grid_size(name: str) -> int:
    """Return how many geometries one layer type has, counted by hand."""
    if name not in CONVOLUTIONS:
        return {"Linear": 2, "Bilinear": 1, "Embedding": 1, "MultiheadAttention": 3}[name]
    kernels = 2 if name.endswith("1d") else 3
    places = 2 * 2 if "Transpose" in name else 2 * 2 + 1  # stride x padding, "same" with stride 1 alone
    return kernels * places * 2 * 3 * (1 if "Transpose" in name else 4)


def test_the_grid_has_as_many_combinations_as_is_said() -> None:
    assert all(len(geometries(name)) == grid_size(name) for name in CONVOLUTIONS)
    assert sum(grid_size(name) for name in CONVOLUTIONS) * len(DTYPES) == COMBINATIONS
