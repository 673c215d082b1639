"""Find the weights that can be targets, and select them by patterns."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from loraio.adapter.layers import LAYER_TYPES
from loraio.bases.targets import refuse_shared, select_targets, target_modules
from loraio.errors import StateError, UnknownNameError


class Block(nn.Module):
    """A block with names out of alphabetical order, and with layers that are no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 2, 2)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv1d(1, 2, 3), layer2=Block(), layer1=Block(), head=nn.Linear(4, 3), tail=nn.Conv3d(1, 1, 2)
        )
    )


EVERY = [
    "stem.weight",
    "layer2.second.weight",
    "layer2.first.weight",
    "layer2.up.weight",
    "layer1.second.weight",
    "layer1.first.weight",
    "layer1.up.weight",
    "head.weight",
    "tail.weight",
]
CONVOLUTIONS = [name for name in EVERY if name != "head.weight"]


def test_all_weights_of_known_layers_are_found_in_the_order_of_the_model(model: nn.Module) -> None:
    found = target_modules(model)
    assert list(found) == EVERY
    state = model.state_dict()
    for name, target in found.items():
        assert target.name == name
        assert target.weight is getattr(target.module, target.parameter)
        assert target.weight.data_ptr() == state[name].data_ptr()
        assert target.layer is LAYER_TYPES[type(target.module).__name__]


def test_groups_are_those_of_the_convolution_and_one_elsewhere(model: nn.Module) -> None:
    found = target_modules(model)
    assert [found[name].groups for name in ("layer1.second.weight", "stem.weight", "head.weight")] == [2, 1, 1]


def test_a_layer_that_is_the_whole_model_has_a_plain_name() -> None:
    assert list(target_modules(nn.Linear(2, 2))) == ["weight"]
    assert list(select_targets(nn.Linear(2, 2), ["linear"])) == ["weight"]


def test_a_subclass_of_a_layer_is_found_as_that_layer() -> None:
    class Mine(nn.Conv2d):
        pass

    assert target_modules(Mine(1, 1, 1))["weight"].layer.name == "Conv2d"


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["conv"], CONVOLUTIONS),
        (["linear"], ["head.weight"]),
        (["all"], EVERY),
        (["linear", "conv"], EVERY),
        (["head"], ["head.weight"]),
        (["head.weight"], ["head.weight"]),
        (["layer?.first"], ["layer2.first.weight", "layer1.first.weight"]),
        (["layer[1].*"], ["layer1.second.weight", "layer1.first.weight", "layer1.up.weight"]),
        (["ConvTranspose2d"], ["layer2.up.weight", "layer1.up.weight"]),
        ([r"re:layer\d\.(up|first)"], [n for n in EVERY if ".up" in n or ".first" in n]),
        ([r"re:.*\.up\.weight"], ["layer2.up.weight", "layer1.up.weight"]),
        (["*first", "stem", "*.first"], ["stem.weight", "layer2.first.weight", "layer1.first.weight"]),
        (["*"], EVERY),
        (["*.weight"], EVERY),
    ],
)
def test_patterns_select_in_the_order_of_the_model(model: nn.Module, patterns: list[str], names: list[str]) -> None:
    assert list(select_targets(model, patterns)) == names
    assert list(select_targets(model)) == CONVOLUTIONS


def test_a_pattern_that_selects_nothing_gets_the_nearest_name_and_all_names(model: nn.Module) -> None:
    with pytest.raises(UnknownNameError) as caught:
        select_targets(model, ["conv", "laier1.first"])
    text = str(caught.value)
    assert "'laier1.first' matches no weight of the model; did you mean 'layer1.first'?" in text
    assert "conv, linear, embedding, all, a class name, or a glob over: head, layer1.first, layer1.second" in text


def test_a_weight_that_two_modules_share_is_refused_only_as_a_target(model: nn.Module) -> None:
    model.layer1.first.weight = model.layer2.first.weight
    with pytest.raises(StateError, match="shared") as caught:
        select_targets(model, ["layer1.*"])
    assert "layer2.first.weight, layer1.first.weight are one tensor" in str(caught.value)
    assert list(select_targets(model, ["head", "*second"])) == [
        "layer2.second.weight",
        "layer1.second.weight",
        "head.weight",
    ]


def test_a_module_that_occurs_twice_and_a_shared_parametrization_are_refused_as_targets() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(StateError, match=r"0\.weight, 1\.weight are one tensor"):
        select_targets(nn.Sequential(layer, layer), ["0"])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(StateError, match=r"0\.weight, 1\.weight are one tensor"):
        refuse_shared(model, ["1.weight"])


@pytest.mark.parametrize("name", ["Bilinear", "Conv1d", "Conv2d", "Conv3d", "Linear", "MultiheadAttention"])
def test_a_matrix_has_a_row_for_each_output_in_c_order(name: str) -> None:
    layer = LAYER_TYPES[name]
    shape = (3, 2, 4, 5, 6)[: layer.dims]
    weight = torch.arange(math.prod(shape)).reshape(shape)
    matrix = layer.to_matrix(weight)
    assert matrix.shape == layer.matrix_shape(shape) == (3, math.prod(shape[1:]))
    assert matrix.flatten().equal(torch.arange(math.prod(shape)))
    assert matrix.data_ptr() == weight.data_ptr()
    assert layer.from_matrix(matrix, shape).equal(weight)


def test_what_is_excluded_is_left_out(model: nn.Module) -> None:
    found = select_targets(model, ["all"], exclude=["linear", "layer?.first", r"re:layer1\..*"])
    assert list(found) == ["stem.weight", "layer2.second.weight", "layer2.up.weight", "tail.weight"]


@pytest.mark.parametrize(
    ("patterns", "exclude", "match"),
    [
        *(
            ([pattern], [], "matches no weight")
            for pattern in ("first", "HEAD", "norm", "layer1.u", "head.bias", "", "layer1", "re:first", "conv2d")
        ),
        (["embedding"], [], "'embedding' matches no weight"),
        ([], [], "no target patterns"),
        (["re:("], [], "is no regular expression"),
        (["all"], ["layer9.*"], r"exclude pattern 'layer9\.\*' matches no weight"),
        (["linear"], ["head"], r"every target is excluded: head\.weight"),
    ],
)
def test_patterns_that_select_nothing_are_refused(
    model: nn.Module, patterns: list[str], exclude: list[str], match: str
) -> None:
    with pytest.raises(UnknownNameError, match=match):
        select_targets(model, patterns, exclude=exclude)
    with pytest.raises(UnknownNameError, match=r"over: \(none\)"):
        select_targets(nn.ReLU(), ["all"])


def test_every_weight_of_an_attention_layer_is_found() -> None:
    packed, apart = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    assert list(target_modules(packed)) == ["in_proj_weight", "out_proj.weight"]
    assert list(target_modules(apart)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert target_modules(packed)["out_proj.weight"].layer.name == "Linear"


def test_a_transposed_convolution_becomes_a_matrix_group_by_group() -> None:
    layer = LAYER_TYPES["ConvTranspose1d"]
    weight = torch.arange(4 * 3 * 2.0).reshape(4, 3, 2)  # two groups, each of two inputs and three outputs
    matrix = layer.to_matrix(weight, 2)
    assert matrix.shape == layer.matrix_shape(weight.shape, 2) == (6, 4)
    assert matrix[4].tolist() == [*weight[2, 1].tolist(), *weight[3, 1].tolist()]
    assert layer.from_matrix(matrix, weight.shape, 2).equal(weight)
