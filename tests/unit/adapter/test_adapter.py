"""Check that Target, BaseReference and Adapter are checked, frozen, and folded with one rounding."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from strategies import exact_fold, nearest_float, tensor
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.kinds import KINDS
from loraio.adapter.metadata import FLOAT_DTYPES, SCALE_RULES, BaseReference, Target, check_strength, check_tensors
from loraio.errors import AdapterError, ConfigError, ShapeError, UnknownNameError
from loraio.files.tensors import TORCH_DTYPES

SHA = "0123456789abcdef" * 4
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

CONV: dict[str, Any] = {
    "rank": 2,
    "alpha": 3,
    "shape": (4, 3, 2, 1),
    "dtype": "F32",
    "layer": "Conv2d",
    "base_sha256": SHA,
}


def target(**changes: Any) -> Target:
    return Target(**{**CONV, **changes})


def adapter(**changes: Any) -> Adapter:
    values: dict[str, Any] = {
        "targets": {"conv.weight": target()},
        "factors": {
            "conv.weight.lora_A": tensor((2, 6), torch.float32, 1),
            "conv.weight.lora_B": tensor((4, 2), torch.float32, 2),
        },
        "base": BaseReference(sha256=SHA, network="digit-cnn"),
        "training": {"seed": 1},
        "extra": {"note": "hi"},
    }
    return Adapter(**{**values, **changes})


# Target


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": "2"}, "rank is '2'"),
        ({"rank": 2**63}, "rank is 9223372036854775808"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": True}, "alpha is True"),
        ({"alpha": "4"}, "alpha is '4'"),
        ({"alpha": 10**400}, "alpha is 1000"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 1.0}, "groups is 1.0"),
        ({"groups": 3}, "4 channels do not divide into 3 groups"),
        ({"layer": "Linear", "shape": (4, 3), "groups": 2}, "groups is 2, a Linear has none"),
        ({"shape": [4, 3, 2, 1]}, "must be a tuple"),
        ({"shape": (4, 3, 0, 1)}, r"shape is \(4, 3, 0, 1\)"),
        ({"shape": (4, 3, -2, 1)}, "shape is"),
        ({"shape": (4, 3, 2.0, 1)}, "shape is"),
        ({"shape": (4, 3, True, 1)}, "shape is"),
        ({"shape": (4, 3, 2**63, 1)}, "shape is"),
        ({"shape": (4, 6)}, "the weight of a Conv2d has 4 dimensions"),
        ({"shape": ()}, "the weight of a Conv2d has 4 dimensions"),
        ({"dtype": "I32"}, "dtype is 'I32', it must be one of F64, F32, F16, BF16"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"base_sha256": SHA[:-1]}, "64 hexadecimal digits"),
        ({"base_sha256": SHA.upper()}, "64 hexadecimal digits"),
        ({"base_sha256": SHA + "\n"}, "64 hexadecimal digits"),
        ({"base_sha256": None}, "base_sha256 is None"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        target(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "lorra"}, "no adapter kind 'lorra'; did you mean 'lora'"),
        ({"layer": "Conv2D"}, "no layer type 'Conv2D'; did you mean 'Conv2d'"),
        ({"scale_rule": "alpha/sqrt r"}, r"no scale rule .* did you mean 'alpha/sqrt\(r\)'"),
    ],
)
def test_an_unknown_name_in_a_target_gets_the_nearest_known_one(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnknownNameError, match=match):
        target(**changes)


def test_the_scale_is_what_the_rule_makes_of_alpha_and_rank() -> None:
    assert target(alpha=3, rank=2).scale == 1.5
    assert target(alpha=3, rank=2, scale_rule="alpha/sqrt(r)").scale == 3 / math.sqrt(2)
    assert target(alpha=-1.0, rank=4).scale == -0.25
    assert all(rule(8, 16) == expected for rule, expected in zip(SCALE_RULES.values(), (0.5, 2.0), strict=True))


def test_a_target_knows_the_shapes_of_its_matrix_and_factors() -> None:
    assert target().matrix_shape == (4, 6)
    assert target().factor_shapes == {"lora_A": (2, 6), "lora_B": (4, 2)}
    assert target().parameters == 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (4, 4), "layer": "Linear"},
        {"shape": (1, 7), "layer": "Linear"},
        {"shape": (10, 2048), "layer": "Linear"},
        {"shape": (32, 1, 3, 3), "groups": 32},
        {"shape": (12, 2, 3, 3), "groups": 3, "layer": "ConvTranspose2d"},
        {"shape": (100, 8), "layer": "Embedding"},
    ],
)
def test_a_target_knows_at_which_ranks_its_factors_are_smaller_than_the_weight(
    kind: str, changes: dict[str, Any]
) -> None:
    weight = math.prod(changes["shape"])
    largest = target(kind=kind, **changes).largest_saving_rank
    smaller = []
    for rank in range(1, weight + 1):
        at = target(kind=kind, rank=rank, **changes)
        numbers = sum(torch.empty(shape).numel() for shape in at.factor_shapes.values())
        assert at.saves_nothing == (numbers >= weight)
        assert at.largest_saving_rank == largest  # whatever its own rank is
        smaller += [rank] if numbers < weight and rank <= min(at.matrix_shape) else []
        if numbers > 2 * weight:
            break
    assert largest == max(smaller, default=0)


def test_alpha_stays_the_number_that_it_was() -> None:
    assert type(target(alpha=3).alpha) is int
    assert type(target(alpha=3.0).alpha) is float


# BaseReference


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sha256": "abc"}, "the base's sha256 is 'abc'"),
        ({"sha256": 5}, "the base's sha256 is 5"),
        ({"sha256": SHA + "\n"}, "the base's sha256 is"),
        ({"sha256": SHA, "network": 3}, "the base's network is 3"),
    ],
)
def test_a_base_reference_that_makes_no_sense_is_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        BaseReference(**values)


# Adapter


def factors_with(**changes: Tensor | None) -> dict[str, Tensor]:
    factors = {**dict(adapter().factors), **{f"conv.weight.{name}": value for name, value in changes.items()}}
    return {name: value for name, value in factors.items() if value is not None}


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        (factors_with(lora_B=None), "'conv.weight.lora_B' is missing"),
        (factors_with(lora_C=torch.ones(2)), "'conv.weight.lora_C' belongs to no target"),
        (factors_with(lora_A=torch.full((2, 6), math.nan)), "'conv.weight.lora_A' holds 12 values that are NaN"),
        (factors_with(lora_B=torch.tensor([[1, math.inf]] * 4)), "'conv.weight.lora_B' holds 4 values .* of 8"),
        (factors_with(lora_B=torch.tensor([[-math.inf, math.inf]] * 4)), "'conv.weight.lora_B' holds 8 values .* of 8"),
        (factors_with(lora_A=torch.ones(2, 6).int()), "'conv.weight.lora_A' has dtype torch.int32"),
        (factors_with(lora_A=torch.ones(2, 6, dtype=torch.complex64)), "dtype torch.complex64"),
        (factors_with(lora_A=torch.ones(2, 6).to(torch.float8_e5m2)), "dtype torch.float8_e5m2"),
        ({}, "'conv.weight.lora_A' is missing"),
    ],
)
def test_factors_that_cannot_be_used_are_refused(factors: dict[str, Tensor], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        adapter(factors=factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_factors_whose_sum_is_not_are_fine(dtype: torch.dtype) -> None:
    largest = torch.full((2, 6), torch.finfo(dtype).max, dtype=dtype, requires_grad=True)
    assert adapter(factors=factors_with(lora_A=largest)).factors["conv.weight.lora_A"] is largest


@pytest.mark.parametrize("shape", [(6, 2), (1, 6), (2, 5), (2, 3, 2, 1), (12,)])
def test_a_factor_of_another_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as caught:
        adapter(factors=factors_with(lora_A=torch.ones(shape)))
    assert f"'conv.weight.lora_A' has the shape {shape}, rank and weight need (2, 6)" in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(AdapterError, match="at least one target"):
        adapter(targets={}, factors={})
    shapes = {"a.lora_A": (2, 6), "b.lora_B": (4, 2), "c.lora_A": (1, 1)}
    with pytest.raises(AdapterError) as caught:
        check_tensors({"a": target(), "b": target()}, {}, shapes)
    assert caught.value.problems == (
        "'a.lora_B' is missing",
        "'b.lora_A' is missing",
        "'c.lora_A' belongs to no target",
    )
    with pytest.raises(ShapeError) as wrong:
        check_tensors({"a": target()}, {}, {"a.lora_A": (6, 2), "a.lora_B": (2, 4)})
    assert len(wrong.value.problems) == 2


def test_an_adapter_is_frozen() -> None:
    one = adapter()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.training = {}  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.targets["conv.weight"].rank = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.base.network = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        one.targets["new"] = target()  # type: ignore[index]
    with pytest.raises(TypeError):
        del one.factors["conv.weight.lora_A"]  # type: ignore[attr-defined]


def test_an_adapter_does_not_follow_a_change_of_the_mappings_it_was_made_from() -> None:
    targets, factors = {"conv.weight": target()}, dict(adapter().factors)
    one = adapter(targets=targets, factors=factors)
    targets.clear()
    factors.clear()
    assert one == adapter()


HALVES = {name: factor.half() for name, factor in adapter().factors.items()}


def test_equal_adapters_are_equal_and_have_no_hash() -> None:
    assert adapter() == adapter()
    with pytest.raises(TypeError, match="unhashable"):
        hash(adapter())


@pytest.mark.parametrize(
    ("one", "changes"),
    [
        pytest.param({}, {"targets": {"conv.weight": target(alpha=4)}}, id="target"),
        pytest.param({}, {"base": BaseReference(sha256=SHA)}, id="base"),
        pytest.param({}, {"training": {}}, id="training"),
        pytest.param({}, {"extra": {}}, id="extra"),
        pytest.param({}, {"factors": factors_with(lora_A=torch.ones(2, 6))}, id="value"),
        pytest.param({}, {"factors": {name: f.double() for name, f in adapter().factors.items()}}, id="dtype"),
        pytest.param(
            {"factors": factors_with(lora_B=torch.zeros(4, 2))},
            {"factors": factors_with(lora_B=-torch.zeros(4, 2))},
            id="sign of zero",
        ),
        pytest.param(
            {"factors": HALVES},
            {"factors": {name: f.view(torch.bfloat16) for name, f in HALVES.items()}},
            id="same bits",
        ),
    ],
)
def test_adapters_that_differ_in_one_thing_are_not_equal(one: dict[str, Any], changes: dict[str, Any]) -> None:
    assert adapter(**changes) != adapter(**one)
    assert adapter() != "adapter"


def test_copies_and_pickles_are_equal() -> None:
    one = adapter()
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one
        assert isinstance(again.factors, Mapping)
    assert copy.deepcopy(one).factors["conv.weight.lora_A"] is not one.factors["conv.weight.lora_A"]


def test_replace_gives_a_checked_copy() -> None:
    assert dataclasses.replace(adapter(), training={}) == adapter(training={})
    with pytest.raises(AdapterError):
        dataclasses.replace(adapter(), factors={})


def test_factors_are_had_by_their_short_names() -> None:
    one = adapter()
    factors = one.factors_of("conv.weight")
    assert list(factors) == ["lora_A", "lora_B"]
    assert factors["lora_A"] is one.factors["conv.weight.lora_A"]
    assert one.parameters == 20
    with pytest.raises(UnknownNameError, match=r"no target 'conv.weigth'; did you mean 'conv.weight'"):
        one.factors_of("conv.weigth")
    with pytest.raises(UnknownNameError, match=r"no target 'fc.weight'"):
        one.fold("fc.weight", torch.ones(1))


# Fold


@pytest.mark.parametrize("factor_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_a_folded_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    weight = tensor((4, 3, 2, 1), dtype, 3)
    factors = {name: factor.to(factor_dtype) for name, factor in adapter().factors.items()}
    one = adapter(factors=factors)
    folded = one.fold("conv.weight", weight, strength=0.7)
    assert (folded.dtype, folded.shape) == (dtype, weight.shape)
    exact = exact_fold(weight.flatten(1), *factors.values(), 1.5 * 0.7)
    assert folded.double().flatten().tolist() == [nearest_float(value, dtype) for value in exact]


def test_a_folded_float64_weight_is_within_the_rounding_of_its_sum() -> None:
    weight = tensor((4, 3, 2, 1), torch.float64, 3)
    folded = adapter().fold("conv.weight", weight)
    exact = exact_fold(weight.flatten(1), *adapter().factors.values(), 1.5)
    errors = [abs(Fraction(found) - value) for found, value in zip(folded.flatten().tolist(), exact, strict=True)]
    assert max(errors) < 1e-14


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)])
def test_a_sum_a_hair_above_a_tie_is_rounded_up(dtype: torch.dtype, bits: int) -> None:
    """Adding in the weight's dtype, or rounding by way of float32, would give 1."""
    hair = Target(rank=1, alpha=1, shape=(1, 1), dtype="F32", layer="Linear", base_sha256=SHA)
    factors = {"lora_A": torch.tensor([[2.0**-bits + 2.0**-50]], dtype=torch.float64), "lora_B": torch.ones(1, 1)}
    folded = hair.fold(torch.ones(1, 1, dtype=dtype), factors)
    assert folded.item() == 1 + 2.0 ** (1 - bits)
    factors["lora_A"] = torch.tensor([[2.0**-bits]], dtype=torch.float64)
    assert hair.fold(torch.ones(1, 1, dtype=dtype), factors).item() == 1.0


@pytest.mark.parametrize("code", FLOAT_DTYPES)
def test_a_strength_of_zero_gives_the_bits_of_the_base(code: str) -> None:
    weight = tensor((4, 3, 2, 1), getattr(torch, TORCH_DTYPES[code]), 3)
    weight.view(-1)[0] = -0.0
    folded = adapter().fold("conv.weight", weight, strength=0)
    assert folded.view(torch.uint8).equal(weight.view(torch.uint8))
    assert folded.data_ptr() != weight.data_ptr()


def test_a_negative_strength_takes_away() -> None:
    weight = torch.zeros(4, 3, 2, 1)
    assert adapter().fold("conv.weight", weight, strength=-2.0).equal(-2 * adapter().fold("conv.weight", weight))


def test_fold_takes_a_weight_in_any_memory_order_and_gives_no_gradient() -> None:
    weight = tensor((4, 3, 2, 1), torch.float32, 3)
    expected = adapter().fold("conv.weight", weight)
    other = torch.nn.Parameter(weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
    folded = adapter().fold("conv.weight", other)
    assert not other.is_contiguous()
    assert folded.equal(expected)
    assert not folded.requires_grad
    assert not adapter().fold("conv.weight", other, strength=0).requires_grad


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3895e38), (torch.float32, 3.4e38)]
)
def test_a_sum_that_overflows_is_refused(dtype: torch.dtype, largest: float) -> None:
    ones = {"conv.weight.lora_A": torch.ones(2, 6), "conv.weight.lora_B": torch.ones(4, 2)}
    one = adapter(factors=ones)
    weight = torch.full((4, 3, 2, 1), largest, dtype=dtype)
    assert one.fold("conv.weight", weight, strength=-largest / 3).isfinite().all()
    with pytest.raises(AdapterError, match=r"'conv.weight': the sum overflows torch"):
        one.fold("conv.weight", weight, strength=largest / 3)
    one = adapter(targets={"conv.weight": target(alpha=1e308)})
    with pytest.raises(AdapterError, match="overflows"):
        one.fold("conv.weight", torch.ones(4, 3, 2, 1), strength=1e308)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 1, 2), (3, 4, 2, 1), (4, 3, 2)])
def test_a_weight_of_another_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as caught:
        adapter().fold("conv.weight", torch.ones(shape))
    assert f"'conv.weight': the weight is {shape}, the adapter needs (4, 3, 2, 1)" in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fold_for_training_is_fold_up_to_the_rounding_of_float32(dtype: torch.dtype) -> None:
    weight = tensor((4, 3, 2, 1), dtype, 3)
    one = target()
    factors = adapter().factors_of("conv.weight")
    trained = one.fold_for_training(weight, factors, strength=0.7)
    folded = one.fold(weight, factors, strength=0.7)
    assert (trained.dtype, trained.shape) == (dtype, weight.shape)
    # float32 sums of magnitudes below 10, then one ulp of the weight's own dtype where the two round apart
    allowed = 10 * 5 * 2.0**-24 + 4 * torch.finfo(dtype).eps
    assert (trained.double() - folded.double()).abs().max() <= (1e-13 if dtype == torch.float64 else allowed)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fold_for_training_gives_gradients_to_every_factor_and_to_the_weight(dtype: torch.dtype) -> None:
    weight = tensor((4, 3, 2, 1), dtype, 3).requires_grad_()
    factors = {name: factor.clone().requires_grad_() for name, factor in adapter().factors_of("conv.weight").items()}
    target().fold_for_training(weight, factors, strength=2.0).sum().backward()
    A, B = factors["lora_A"], factors["lora_B"]
    ones = torch.ones(4, 6)
    assert torch.allclose(A.grad, 3.0 * B.detach().T @ ones)  # type: ignore[arg-type]  # strength 2, scale 3 / 2
    assert torch.allclose(B.grad, 3.0 * ones @ A.detach().T)  # type: ignore[arg-type]
    assert weight.grad is not None
    assert (weight.grad == 1).all()


def test_the_strength_is_a_finite_number() -> None:
    assert check_strength(2) == 2.0
    assert type(check_strength(2)) is float
    for wrong in (math.nan, math.inf, -math.inf, "1", None, True, 10**400):
        with pytest.raises(ConfigError, match="strength is"):
            check_strength(wrong)  # type: ignore[arg-type]
