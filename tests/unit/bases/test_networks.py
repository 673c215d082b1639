"""Networks by name: ours, torchvision's, timm's and the user's own."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import loraio
from loraio.bases import networks
from loraio.bases.network_libraries import WEIGHT_ARGUMENTS, torchvision_names
from loraio.errors import ConfigError, UnknownNameError
from loraio.training.batches import in_order

OWN = """
import torch
from torch import nn

SIZES = [4, 2]


def small(width=3, *, bias=True):
    return nn.Sequential(nn.Conv2d(1, width, 3, bias=bias), nn.Flatten(), nn.Linear(width * 36, 2))


class Nets:
    @staticmethod
    def tiny():
        return nn.Conv2d(1, 1, 1)


def nothing():
    return 5


def broken():
    raise KeyError("no such layer")


def leave():
    raise SystemExit(4)
"""


@pytest.fixture
def own(write_module: Callable[[str, str], None]) -> str:
    """A module of the user's own that can be imported; its name."""
    write_module("own_nets", OWN)
    write_module("own_broken", "x = 1\nraise ValueError('not today')\n")
    write_module("own_syntax", "x = 1\ny = = 2\n")
    write_module("own_needs", "import a_module_that_is_not_there\n")
    return "own_nets"


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something wanted to download weights")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_registered_network_takes_its_input_shape_and_gives_its_classes(name: str) -> None:
    network, model = networks.NETWORKS[name], loraio.build_network(name, seed=0)
    assert networks.network_of(model) == name
    assert networks.input_shape_of(model) == network.input_shape
    with torch.no_grad():
        assert model(torch.rand(2, *(network.input_shape or ()))).shape == (2, network.classes)


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (loraio.build_network("digit-cnn", seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.get_rng_state().equal(state)
    assert all(a[name].equal(b[name]) for name in a)
    assert not a["conv1.weight"].equal(c["conv1.weight"])
    loraio.build_network("digit-cnn")
    assert not torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("name", "args", "size", "shape"),
    [
        ("shufflenet_v2_x0_5", {"num_classes": 7}, 33, (1, 7)),
        ("squeezenet1_1", {}, 32, (1, 1000)),
        ("vit_b_32", {"image_size": 32, "num_classes": 3}, 32, (1, 3)),
        ("googlenet", {"aux_logits": False}, 32, (1, 1000)),  # would warn that a default of its own will change
    ],
)
def test_classification_networks_of_torchvision_are_built(
    name: str, args: dict[str, Any], size: int, shape: tuple[int, ...]
) -> None:
    model = loraio.build_network(f"torchvision:{name}", args=args, seed=0)
    assert not model.training
    assert networks.network_of(model) == f"torchvision:{name}"
    assert networks.network_args_of(model) == args
    with torch.no_grad():
        assert model(torch.rand(1, 3, size, size)).shape == shape


def test_segmentation_and_detection_networks_of_torchvision_are_built_without_their_backbones_weights() -> None:
    segmenting = loraio.build_network("torchvision:lraspp_mobilenet_v3_large", args={"num_classes": 3}, seed=0)
    detecting = loraio.build_network("torchvision:ssdlite320_mobilenet_v3_large", args={"num_classes": 4}, seed=0)
    with torch.no_grad():
        assert segmenting(torch.rand(1, 3, 32, 32))["out"].shape == (1, 3, 32, 32)
        assert detecting([torch.rand(3, 32, 32)])[0].keys() == {"boxes", "scores", "labels"}
    for name in ("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"):
        found = networks.find_network(f"torchvision:{name}")
        assert (found.input_shape, found.classes) == (None, None)


@pytest.mark.parametrize(
    ("name", "args", "side", "classes"),
    [
        ("resnet18", {}, 224, 1000),
        ("efficientnet_b1", {"num_classes": 5}, 240, 5),
        ("inception_v3", {}, 299, 1000),
        ("swin_v2_t", {}, 256, 1000),
        ("vit_h_14", {}, 224, 1000),
        ("vit_b_16", {"image_size": 64}, 64, 1000),
    ],
)
def test_the_input_shape_is_that_of_the_usual_weights(name: str, args: dict[str, Any], side: int, classes: int) -> None:
    found = networks.find_network(f"torchvision:{name}", args)
    assert (found.input_shape, found.classes) == ((3, side, side), classes)


def test_the_lists_of_torchvision_are_all_known() -> None:
    from torchvision import models

    names = torchvision_names()
    assert {"resnet18", "fcn_resnet50", "fasterrcnn_resnet50_fpn"} <= set(names)
    for name in names:
        assert networks.find_network(f"torchvision:{name}").build is not None
    for name in models.list_models(module=models):
        shape = networks.find_network(f"torchvision:{name}").input_shape
        least = models.get_model_weights(name).DEFAULT.meta["min_size"]
        assert shape is not None
        assert shape[1] >= least[0] or name == "vit_h_14"  # its usual weights are for larger images


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_options_that_ask_for_weights_are_refused(name: str) -> None:
    for key in WEIGHT_ARGUMENTS:
        with pytest.raises(ConfigError, match=f"the option '{key}' asks for them"):
            loraio.build_network(name, args={key: "DEFAULT"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits-cnn", "no network 'digits-cnn'; did you mean 'digit-cnn'"),
        ("resnet18", "no network 'resnet18'; did you mean 'torchvision:resnet18'"),
        ("torchvision:resnet81", "no torchvision network 'resnet81'; did you mean 'resnet18'"),
        ("torchvison:resnet18", "there is no module 'torchvison'; did you mean 'torchvision:resnet18'"),
        ("torchvision:quantized_resnet18", "no torchvision network"),
        ("torchvision:", "no torchvision network ''"),
        ("", "no network ''"),
        (":", "no network ':'"),
        ("a b:c", "no network 'a b:c'"),
        ("..os:system", r"no network '\.\.os:system'"),
        ("not_there.at_all:make", r"there is no module 'not_there\.at_all'"),
    ],
)
def test_an_unknown_name_answers_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        loraio.build_network(name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_clases": 3}, "torchvision:resnet18' cannot be built with .*num_clases"),
        ({"num_classes": "ten"}, "cannot be built with"),
        ({"norm_layer": nn.BatchNorm2d}, "not plain JSON"),
        ({"a": float("nan")}, "not plain JSON"),
        ([1], "not an object of keyword options"),
        ({1: 2}, "not an object of keyword options"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(args: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loraio.build_network("torchvision:resnet18", args=args)
    with pytest.raises(ConfigError, match=r"'digit-cnn' cannot be built with .*width.*: TypeError"):
        loraio.build_network("digit-cnn", args={"width": 2})


def test_a_callable_of_the_users_own_is_imported_and_called(own: str) -> None:
    model = loraio.build_network(f"{own}:small", args={"width": 2, "bias": False}, seed=1)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 2)
    assert networks.network_of(model) == f"{own}:small"
    networks.network_args_of(model)["width"] = 9
    assert networks.network_args_of(model) == {"width": 2, "bias": False}
    assert (networks.network_of(nn.Linear(1, 1)), networks.network_args_of(nn.Linear(1, 1))) == (None, {})
    assert not model.training
    again = loraio.build_network(f"{own}:small", args={"width": 2, "bias": False}, seed=1)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert isinstance(loraio.build_network(f"{own}:Nets.tiny"), nn.Conv2d)
    assert networks.find_network(f"{own}:small").input_shape is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_nets:smal", UnknownNameError, "'own_nets' has no 'smal'; did you mean 'small'"),
        ("own_nets:Nets.huge", UnknownNameError, r"has no 'Nets\.huge'"),
        ("own_nets:", UnknownNameError, "has no ''"),
        ("own_nets:SIZES", ConfigError, "is list, not a callable"),
        ("own_nets:nothing", ConfigError, r"gives int, not a torch\.nn\.Module"),
        ("own_nets:broken", ConfigError, r"(?s)cannot be built: KeyError: 'no such layer'.*own_nets\.py, line 23"),
        ("own_nets:leave", ConfigError, "cannot be built: SystemExit: 4"),
        ("own_broken:x", ConfigError, r"(?s)cannot be imported: ValueError: not today.*own_broken\.py, line 2"),
        ("own_syntax:x", ConfigError, r"(?s)cannot be imported: SyntaxError.*own_syntax\.py, line 2"),
        ("own_needs:x", ConfigError, "cannot be imported: ModuleNotFoundError: No module named 'a_module_that"),
        ("own_nets.inside:x", UnknownNameError, r"there is no module 'own_nets\.inside'"),
    ],
)
@pytest.mark.usefixtures("own")
def test_every_failure_of_own_code_says_what_and_where(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loraio.build_network(name)


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"(?s)needs timm.*pip install timm"):
        loraio.build_network("timm:resnet18")


@pytest.mark.filterwarnings("ignore")  # timm's own
def test_networks_of_timm_are_built_where_it_is_installed() -> None:
    model = loraio.build_network("timm:resnet18", args={"num_classes": 4, "in_chans": 1}, seed=0)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    found = networks.find_network("timm:resnet18", {"num_classes": 4, "in_chans": 1})
    assert (found.input_shape, found.classes) == ((1, 224, 224), 4)
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        loraio.build_network("timm:resnet81")
    for hub in ("timm:hf-hub:someone/something", "timm:local-dir:/tmp"):
        with pytest.raises(UnknownNameError, match="no timm network"):
            loraio.build_network(hub)


def test_building_by_a_registered_name_imports_no_foreign_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def watched(name: str, *rest: Any, **more: Any) -> Any:
        assert name.partition(".")[0] not in ("torchvision", "timm"), name
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", watched)
    assert isinstance(loraio.build_network("digit-cnn", seed=0), nn.Module)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": 4}),
        ("torchvision:lraspp_mobilenet_v3_large", {"num_classes": 2}),
    ],
)
def test_an_adapter_goes_on_and_off_a_network_of_torchvision(name: str, args: dict[str, Any]) -> None:
    model = loraio.build_network(name, args=args, seed=0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("conv",)))
    with loraio.attach(model, adapter), torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert list(model.state_dict()) == list(before)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    merged = loraio.merge(model.state_dict(), adapter)
    assert loraio.verify_weights(model.state_dict(), adapter, merged).ok


def test_the_digit_cnn_keeps_as_little_for_the_backward_pass_in_either_order_of_memory() -> None:
    model = loraio.build_network("digit-cnn", seed=0)

    def saved_bytes(*, channels_last: bool) -> int:
        images = in_order(torch.rand(2, 1, 28, 28), channels_last=channels_last)
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images).sum()
        total = sum(storage.nbytes() for storage in storages.values())
        loss.backward()
        return total

    assert saved_bytes(channels_last=True) == saved_bytes(channels_last=False)
