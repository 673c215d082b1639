"""Hold every adapter kind to its contract on every layer type. A new entry of a registry is tested by being there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategies import tensor
from torch import Tensor, nn

from loraio.adapter import folding
from loraio.adapter.kinds import KINDS, Kind
from loraio.adapter.kinds.lora import INITS
from loraio.adapter.layers import LAYER_TYPES, LayerType
from loraio.adapter.metadata import SCALE_RULES, Target
from loraio.bases.targets import target_modules
from loraio.files.tensors import dtype_code, tensor_sha256

RANK = 2
SHAPES = {2: (4, 6), 3: (4, 3, 5), 4: (4, 2, 3, 2), 5: (4, 2, 2, 1, 3)}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_layer = pytest.mark.parametrize("layer", LAYER_TYPES.values(), ids=LAYER_TYPES)


def weight_of(layer: LayerType, dtype: torch.dtype = torch.float64) -> Tensor:
    return tensor(SHAPES[layer.dims], dtype, seed=layer.dims)


def trained(kind: Kind, matrix: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Factors that are not at their start."""
    shapes = kind.shapes(*matrix.shape, RANK)
    return {name: tensor(shape, dtype, seed=seed, spread=0.5) for seed, (name, shape) in enumerate(shapes.items())}


def target_of(kind: Kind, layer: LayerType, weight: Tensor, **more: object) -> Target:
    values = {
        "rank": RANK,
        "alpha": 3,
        "shape": tuple(weight.shape),
        "dtype": dtype_code(weight.dtype),
        "layer": layer.name,
        "base_sha256": tensor_sha256(weight),
        "kind": kind.name,
    }
    return Target(**{**values, **more})  # type: ignore[arg-type]


@every_layer
def test_the_entry_describes_the_layer_of_torch(layer: LayerType) -> None:
    assert LAYER_TYPES[layer.name] is layer
    arguments, out = {
        "Linear": ((2, 3), 3),
        "Embedding": ((2, 3), 3),
        "Bilinear": ((2, 3, 4), 4),
        "MultiheadAttention": ((4, 2), 12),
    }.get(layer.name, ((2, 3, 2), 3))
    module = getattr(nn, layer.name)(*arguments)
    found = target_modules(module)[layer.parameters[0]]
    assert found.layer is layer
    assert found.weight.ndim == layer.dims
    assert layer.matrix_shape(found.weight.shape)[0] == out


@every_layer
def test_a_weight_comes_back_from_its_matrix(layer: LayerType) -> None:
    weight = weight_of(layer)
    matrix = layer.to_matrix(weight)
    assert matrix.shape == layer.matrix_shape(weight.shape)
    assert layer.from_matrix(matrix, weight.shape).equal(weight)


@every_layer
@every_kind
@pytest.mark.parametrize("method", sorted(INITS))
def test_start_values_have_the_shapes_that_the_kind_announces(kind: Kind, layer: LayerType, method: str) -> None:
    matrix = layer.to_matrix(weight_of(layer))
    start = kind.init(matrix, RANK, method=method, generator=torch.Generator().manual_seed(0))
    assert {name: tuple(factor.shape) for name, factor in start.items()} == kind.shapes(*matrix.shape, RANK)
    for name, factor in start.items():
        assert (factor.dtype, factor.device.type) == (torch.float64 if name == "magnitude" else torch.float32, "cpu")
    assert list(start) == list(kind.shapes(*matrix.shape, RANK))


@every_layer
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", sorted(INITS))
def test_an_untrained_adapter_changes_nothing(kind: Kind, layer: LayerType, dtype: torch.dtype, method: str) -> None:
    weight = weight_of(layer, dtype)
    target = target_of(kind, layer, weight)
    start = kind.init(layer.to_matrix(weight), RANK, method=method, generator=torch.Generator().manual_seed(0))
    assert target.fold(weight, start, strength=1.7).equal(weight)
    training = target.fold_for_training(weight, start, strength=1.7)
    torch.testing.assert_close(training, weight, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)  # |W| in float32


@every_layer
@every_kind
def test_a_trained_adapter_changes_the_weight_and_not_its_inputs(kind: Kind, layer: LayerType) -> None:
    weight = weight_of(layer)
    factors = trained(kind, layer.to_matrix(weight))
    before = {name: factor.clone() for name, factor in factors.items()}
    folded = target_of(kind, layer, weight).fold(weight, factors)
    assert (folded != weight).all()
    assert weight.equal(weight_of(layer))
    assert all(factors[name].equal(factor) for name, factor in before.items())


@every_layer
@every_kind
def test_fold_is_differentiable(kind: Kind, layer: LayerType) -> None:
    weight = weight_of(layer).requires_grad_()
    target = target_of(kind, layer, weight.detach())
    factors = {name: f.requires_grad_() for name, f in trained(kind, layer.to_matrix(weight.detach())).items()}
    names = list(factors)

    def folded(weight: Tensor, *values: Tensor) -> Tensor:
        return target.fold_for_training(weight, dict(zip(names, values, strict=True)), strength=0.7)

    assert torch.autograd.gradcheck(folded, (weight, *factors.values()))


@every_layer
@every_kind
def test_at_the_start_some_factor_has_a_gradient(kind: Kind, layer: LayerType) -> None:
    weight = weight_of(layer, torch.float32)
    start = kind.init(layer.to_matrix(weight), RANK, method="kaiming", generator=torch.Generator().manual_seed(0))
    factors = {name: factor.requires_grad_() for name, factor in start.items()}
    (target_of(kind, layer, weight).fold_for_training(weight, factors) * weight_of(layer)).sum().backward()
    assert any(factor.grad is not None and factor.grad.count_nonzero() > 0 for factor in factors.values())


@every_layer
@every_kind
@pytest.mark.parametrize("rule", sorted(SCALE_RULES))
def test_the_reference_agrees_with_fold_within_its_own_bound(kind: Kind, layer: LayerType, rule: str) -> None:
    weight = weight_of(layer)
    target = target_of(kind, layer, weight, scale_rule=rule)
    matrix = layer.to_matrix(weight)
    factors = trained(kind, matrix)
    folded = layer.to_matrix(target.fold(weight, factors)).numpy()
    plain = {name: factor.numpy() for name, factor in factors.items()}
    reference, bound = kind.reference(matrix.numpy(), plain, scale=target.scale)
    assert reference.shape == bound.shape == folded.shape
    assert (np.abs(reference - folded) <= bound).all()
    assert (bound < 1e-13).all()  # and the bound is no excuse
    assert (np.abs(reference - matrix.numpy()) > 1e3 * bound).all()


@every_layer
@every_kind
def test_a_strength_of_zero_gives_the_bits_of_the_base(kind: Kind, layer: LayerType) -> None:
    weight = weight_of(layer, torch.float32)
    weight.view(-1)[0] = -0.0
    folded = target_of(kind, layer, weight).fold(weight, trained(kind, layer.to_matrix(weight)), strength=0.0)
    assert folded.view(torch.int32).equal(weight.view(torch.int32))
    assert folded.data_ptr() != weight.data_ptr()


@every_layer
def test_lora_is_linear_in_strength(layer: LayerType) -> None:
    kind = KINDS["lora"]
    weight = weight_of(layer)
    target, factors = target_of(kind, layer, weight), trained(kind, layer.to_matrix(weight))
    delta = target.fold(weight, factors) - weight
    for strength in (-1.0, 0.25, 3.0):
        assert torch.allclose(target.fold(weight, factors, strength=strength), weight + strength * delta, atol=1e-13)


@every_kind
def test_a_kind_counts_its_own_numbers(kind: Kind) -> None:
    layer = LAYER_TYPES["Conv2d"]
    target = target_of(kind, layer, weight_of(layer))
    assert target.parameters == sum(math.prod(shape) for shape in kind.shapes(4, 12, RANK).values())


@every_kind
@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_folding_rows_in_blocks_gives_what_folding_at_once_gives(
    kind: Kind, layer: LayerType, dtype: torch.dtype, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(layer, dtype)
    target = target_of(kind, layer, weight)
    factors = trained(kind, layer.to_matrix(weight).double(), torch.float32)
    before = weight.clone()
    folds = []
    for block in (2**40, 7, 1):  # all at once; a few rows, or one; one row for want of room
        monkeypatch.setattr(folding, "BLOCK", block)
        folds.append(target.fold(weight, factors, strength=strength))
    for found in folds[1:]:
        assert found.dtype == dtype
        assert found.stride() == weight.stride()
        torch.testing.assert_close(found, folds[0], rtol=1e-14 if dtype == torch.float64 else 0, atol=0)
    assert weight.equal(before)
    assert not folds[0].equal(weight)


@every_kind
@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_folding_over_the_weight_gives_the_same_and_writes_to_it_once_for_each_slice(
    kind: Kind, layer: LayerType, dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "BLOCK", 7)
    for strength in (1.0, -0.5):
        weight = weight_of(layer, dtype)
        target = target_of(kind, layer, weight)
        factors = trained(kind, layer.to_matrix(weight).double(), torch.float32)
        expected = target.fold(weight, factors, strength=strength, exact=exact)
        sliced = target.sliced_fold(weight, factors, strength=strength, exact=exact)
        assert sliced is not None
        writes = weight._version
        sliced.write(sliced.weight)
        assert weight._version - writes == len(sliced.slices)
        assert weight.equal(expected)
