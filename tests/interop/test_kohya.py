"""sd-scripts' arithmetic, written out here, gives the same outputs: it is no package. LyCORIS loads its files too."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import pytest
import safetensors.torch
import torch
from lycoris.kohya import create_network, create_network_from_weights
from peers import adapter_for, assert_attached_is, base_of, close, move_, read, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import loraio
from loraio.errors import AdapterError, BaseMismatchError, FormatError, LoraioError
from loraio.formats.exported import ORIGIN
from loraio.formats.kohya import Kohya, hashes

KOHYA = Kohya()
write = partial(peers.write, KOHYA)
X = peers.random((2, 3, 9, 8))


class Net(nn.Module):
    """Layers that sd-scripts adapts, with names that can only be matched forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.down = nn.ModuleList([nn.ModuleDict({"conv_1": nn.Conv2d(6, 6, (3, 2)), "proj_in": nn.Conv2d(6, 4, 1)})])
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0]["conv_1"](self.conv_in(x)).relu()  # type: ignore[index]
        return self.fc(self.down[0]["proj_in"](x).mean((2, 3)))  # type: ignore[index,no-any-return]


base = base_of(Net)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by sd-scripts' names: a prefix, and the path with underscores."""
    found = {f"lora_unet.{path}".replace(".", "_"): module for path, module in model.named_modules() if path}
    return {name: module for name, module in found.items() if type(module).__name__ in ("Linear", "Conv2d")}


def scale_of(tensors: dict[str, Tensor], name: str) -> float:
    down = tensors[f"{name}.lora_down.weight"]
    alpha = tensors.get(f"{name}.alpha")
    return 1.0 if alpha is None or alpha == 0 else float(alpha.float()) / len(down)


def attached(base: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return the model as its modules compute: the layer's output, and that of the up after the down, scaled."""
    model = copy.deepcopy(base)

    def around(module: nn.Module, plain: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
        down, up = (tensors[f"{name}.lora_{which}.weight"] for which in ("down", "up"))
        mid, scale = tensors.get(f"{name}.lora_mid.weight"), scale_of(tensors, name)

        def forward(x: Tensor) -> Tensor:
            if isinstance(module, nn.Linear):
                return plain(x) + F.linear(F.linear(x, down), up) * scale
            steps: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
            inner = F.conv2d(x, down, **steps) if mid is None else F.conv2d(F.conv2d(x, down), mid, **steps)
            return plain(x) + F.conv2d(inner, up) * scale

        return forward

    for name, module in layers_of(model).items():
        if f"{name}.lora_down.weight" in tensors:
            module.forward = around(module, module.forward, name)  # type: ignore[method-assign]
    return model


def merged(base: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as its merge scripts compute: the product of the pair, scaled and added."""
    model = copy.deepcopy(base)
    for name, module in layers_of(model).items():
        if f"{name}.lora_down.weight" not in tensors:
            continue
        down, up = (tensors[f"{name}.lora_{which}.weight"] for which in ("down", "up"))
        if down.ndim == 2:
            delta = up @ down
        elif tuple(down.shape[2:]) == (1, 1):
            delta = (up[..., 0, 0] @ down[..., 0, 0])[..., None, None]
        else:
            delta = F.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        module.weight.data += 1.0 * delta * scale_of(tensors, name)  # type: ignore[union-attr,operator]
    return model.state_dict()


def random_file(
    base: nn.Module, path: Path, *, mid: bool = False, alpha: float | None = 3.0, **metadata: str
) -> dict[str, Tensor]:
    """Write a file as sd-scripts would have trained it, or LoCon with cores."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in layers_of(base).items():
        out, fan, *kernel = module.weight.shape  # type: ignore[union-attr,misc]
        ones, core = [1] * len(kernel), mid and max(kernel, default=1) > 1
        shapes = {"down": (2, fan, *(ones if core else kernel)), "up": (out, 2, *ones)}
        shapes |= {"mid": (2, 2, *kernel)} if core else {}
        for which, shape in shapes.items():
            tensors[f"{name}.lora_{which}.weight"] = torch.randn(shape, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_network_module": "networks.lora", **metadata})
    return tensors


@pytest.mark.parametrize("mid", [False, True], ids=["plain", "cores"])
@pytest.mark.parametrize("alpha", [3.0, None], ids=["alpha", "no alpha"])
def test_its_files_give_its_outputs_here(mid: bool, alpha: float | None, base: nn.Module, tmp_path: Path) -> None:
    tensors = random_file(base, tmp_path / "file", mid=mid, alpha=alpha)
    adapter, report = read(tmp_path / "file", base)
    assert_attached_is(base, adapter, attached(base, tensors), X)
    how = {line.name: line.how for line in report.lines}
    assert ("alpha" in how) == (alpha is None)
    if alpha is None:
        assert how["alpha"].startswith("r, as is meant where a file has none: lora_unet_conv_in")
    core = how["lora_unet_conv_in.lora_down.weight"]
    assert ("lora_mid multiplied into lora_down in float64, rounded once to F32, relative error" in core) == mid


def test_cores_whose_products_need_no_rounding_are_exact(base: nn.Module, tmp_path: Path) -> None:
    tensors = random_file(base, tmp_path / "file", mid=True)
    tensors = {key: value.mul(4).round() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "file")
    adapter, report = read(tmp_path / "file", base)
    lines = {line.name: line.how for line in report.lines}
    assert lines["lora_unet_conv_in.lora_mid.weight"].endswith("without rounding")
    down, up, mid = (tensors[f"lora_unet_conv_in.lora_{which}.weight"].double() for which in ("down", "up", "mid"))
    factors = adapter.factors_of("conv_in.weight")
    product = torch.einsum("oa,abhw,bi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    assert (factors["lora_B"].double() @ factors["lora_A"].double()).equal(product.flatten(1))


def test_our_file_gives_our_outputs_in_sd_scripts(base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, rank_pattern={"fc": 1}, alpha_pattern={"fc": 0.3})
    assert not write(adapter, base, tmp_path / "file").lost
    tensors = load_file(tmp_path / "file")
    assert_attached_is(base, adapter, attached(base, tensors), X)
    peers.assert_merged_close(base, adapter, merged(base, tensors))


def test_our_file_gives_our_outputs_in_lycoris(base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, scale_rule="alpha/sqrt(r)")
    write(adapter, base, tmp_path / "file.safetensors")
    model = copy.deepcopy(base)
    network, _ = create_network_from_weights(1.0, str(tmp_path / "file.safetensors"), None, None, model)
    assert len(network.unet_loras) == len(adapter.targets)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    assert_attached_is(base, adapter, model, X)


def test_rank_stabilised_training_of_lycoris_is_read(base: nn.Module, tmp_path: Path) -> None:
    """It stores alpha times the root of r, so that every reader gets the right scale."""
    named = type("ResnetBlock2D", (Net,), {})()  # a class that its module for sd-scripts looks for
    named.load_state_dict(base.state_dict())
    model, whole = nn.ModuleDict({"body": named.eval()}), nn.ModuleDict({"body": base})
    network = create_network(1.0, 4, 2.0, None, None, model, rs_lora=True)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    move_(network.parameters())
    save_file(
        {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}, tmp_path / "file"
    )
    adapter = loraio.load(tmp_path / "file", base=whole)
    assert {target.scale for target in adapter.targets.values()} == {1.0}
    with loraio.attach(whole, adapter):
        assert close(base(X), named(X))


def test_a_round_trip_keeps_the_weights_the_record_and_the_bytes(base: nn.Module, tmp_path: Path) -> None:
    random_file(
        base, tmp_path / "theirs", ss_training_comment="a b", **{"modelspec.title": "t", "modelspec.hash_sha256": "0x0"}
    )
    adapter = loraio.load(tmp_path / "theirs", base=base)
    assert adapter.training[ORIGIN]["settings"]["metadata"]["ss_training_comment"] == "a b"
    peers.assert_written_twice_alike(KOHYA, adapter, base, tmp_path / "one")
    report = write(adapter, base, tmp_path / "two")
    assert "modelspec.hash_sha256" in {line.name for line in report.of_fate("changed")}
    first, second = load_file(tmp_path / "theirs"), load_file(tmp_path / "one")
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[key]) for key, tensor in first.items())
    with safe_open(tmp_path / "one", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_training_comment"], metadata["modelspec.title"]) == ("a b", "t")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "3.0")
    assert loraio.load(tmp_path / "one", base=base) == adapter


@pytest.mark.parametrize("size", [4, 700_000], ids=["small", "large"])
def test_hashes_are_those_of_the_file_with_the_record_alone(size: int) -> None:
    values = {"b": torch.arange(size, dtype=torch.float32), "a": torch.ones(3, dtype=torch.float16)}
    data = safetensors.torch.save(values, {"ss_one": "1"})
    length = int.from_bytes(data[:8], "little")
    assert hashes(values, {"ss_one": "1"}) == {
        "sshs_model_hash": hashlib.sha256(data[8 + length :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }
    assert (hashes(values, {})["sshs_legacy_hash"] == "e3b0c442") == (size == 4)


def test_a_file_holds_its_own_hash(base: nn.Module, tmp_path: Path) -> None:
    write(adapter_for(base), base, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == "e3b0c442"


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te2", "lycoris"])
def test_a_prefix_may_be_chosen_and_is_kept(prefix: str, base: nn.Module, tmp_path: Path) -> None:
    report = write(adapter_for(base), base, tmp_path / "file", prefix=prefix)
    assert f"setting prefix: carried, {prefix}, in front of every name" in map(str, report.lines)
    assert all(key.startswith(f"{prefix}_") for key in load_file(tmp_path / "file"))
    save_file(load_file(tmp_path / "file"), tmp_path / "file")
    adapter = loraio.load(tmp_path / "file", base=base)
    if prefix != "lycoris":
        write(adapter, base, tmp_path / "again")
        assert load_file(tmp_path / "again").keys() == load_file(tmp_path / "file").keys()
    with pytest.raises(LoraioError, match="no prefix 'lora_x'"):
        write(adapter_for(base), base, tmp_path / "other", prefix="lora_x")


def test_parts_of_a_pipeline_have_prefixes_of_their_own(base: nn.Module, tmp_path: Path) -> None:
    pipeline = nn.ModuleDict({"unet": base, "text_encoder_2": nn.Sequential(nn.Linear(3, 4))})
    adapter = adapter_for(pipeline)
    write(adapter, pipeline, tmp_path / "file")
    keys = load_file(tmp_path / "file").keys()
    assert {"lora_unet_conv_in.alpha", "lora_te2_0.alpha"} <= keys
    assert loraio.load(tmp_path / "file", base=pipeline) == adapter


def test_names_that_collide_are_refused_both_ways(tmp_path: Path) -> None:
    both = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    adapter = loraio.new_adapter(both, loraio.TrainConfig(digit=0, targets=("a_b",), rank=1))
    with pytest.raises(AdapterError, match=r"a\.b, a_b have one name there, 'lora_unet_a_b'"):
        write(adapter, both, tmp_path / "file")
    tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(1, 2), "lora_unet_a_b.lora_up.weight": torch.ones(2, 1)}
    save_file(tensors, tmp_path / "file")
    refused(tmp_path / "file", both, "'lora_unet_a_b' may be a.b.weight, a_b.weight", BaseMismatchError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"lora_unet_fc.alpha": torch.tensor(0.0)},
            "'lora_unet_fc.alpha' is 0: attached, sd-scripts takes that as r, 2",
        ),
        ({"lora_unet_fc.alpha": torch.tensor(float("nan"))}, "'lora_unet_fc.alpha' is nan"),
        ({"lora_unet_fc.lora_up.weight": torch.ones(5, 3)}, "'lora_unet_fc': lora_down (2, 4), lora_up (5, 3)"),
        ({"lora_unet_fc.lora_up.weight": torch.ones(5)}, "'lora_unet_fc': lora_down (2, 4), lora_up (5,)"),
        ({"lora_unet_fc.lora_mid.weight": torch.ones(2, 3, 1, 1)}, "lora_mid (2, 3, 1, 1) do not go together"),
        ({"lora_unet_fc.lora_up.weight": torch.ones(5, 2, dtype=torch.int32)}, "lora_up.weight' is I32"),
        ({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}, "'lora_unet_x': lora_up.weight is missing"),
        ({"lora_unet_fc.lora_down.0.weight": torch.ones(1, 2)}, "'lora_unet_fc.lora_down.0.weight' is no slot"),
        ({"else": torch.ones(1)}, "'else' is no slot of LoRA or LoCon"),
    ],
)
def test_an_unclear_file_is_refused_by_its_key(
    change: dict[str, Tensor], says: str, base: nn.Module, tmp_path: Path
) -> None:
    save_file(random_file(base, tmp_path / "file") | change, tmp_path / "file")
    refused(tmp_path / "file", base, says)


def test_an_alpha_of_several_numbers_is_refused(base: nn.Module, tmp_path: Path) -> None:
    tensors = random_file(base, tmp_path / "file")
    save_file(tensors | {"lora_unet_fc.alpha": torch.ones(1)}, tmp_path / "file")
    assert loraio.load(tmp_path / "file", base=base).targets["fc.weight"].alpha == 1
    save_file(tensors | {"lora_unet_fc.alpha": torch.ones(2)}, tmp_path / "file")
    refused(tmp_path / "file", base, "'lora_unet_fc.alpha' has the shape (2,)", FormatError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"lora_unet_gone.lora_down.weight": torch.ones(1, 2), "lora_unet_gone.lora_up.weight": torch.ones(2, 1)},
            "'lora_unet_gone' is no layer of it",
        ),
        (
            {"lora_te_fc.lora_down.weight": torch.ones(1, 4), "lora_te_fc.lora_up.weight": torch.ones(5, 1)},
            "'fc.weight' is adapted twice",
        ),
        (
            {"lora_unet_down_0_conv_1.lora_down.weight": torch.ones(2, 6, 2, 3)},
            "has the kernel (2, 3), 'down.0.conv_1.weight' of the base (3, 2)",
        ),
        ({"lora_unet_fc.lora_down.weight": torch.ones(2, 7)}, "lora_A is (2, 7)"),
    ],
)
def test_a_file_that_does_not_fit_the_base_is_refused(
    change: dict[str, Tensor], says: str, base: nn.Module, tmp_path: Path
) -> None:
    save_file(random_file(base, tmp_path / "file") | change, tmp_path / "file")
    refused(tmp_path / "file", base, says, BaseMismatchError)


def test_a_linear_layer_may_have_the_tensors_of_a_1x1_convolution(base: nn.Module, tmp_path: Path) -> None:
    tensors = random_file(base, tmp_path / "file")
    expected = loraio.load(tmp_path / "file", base=base)
    for name in ("lora_unet_fc.lora_down.weight", "lora_unet_fc.lora_up.weight"):
        tensors[name] = tensors[name][..., None, None]
    for name in ("lora_unet_down_0_proj_in.lora_down.weight", "lora_unet_down_0_proj_in.lora_up.weight"):
        tensors[name] = tensors[name][..., 0, 0]
    save_file(tensors, tmp_path / "file")
    found = loraio.load(tmp_path / "file", base=base)
    assert all(found.factors[name].equal(tensor) for name, tensor in expected.factors.items())


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv2d(2, 4, 3, dilation=2), "sd-scripts ignores the layer's dilation (2, 2)"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), "ignores the layer's padding_mode 'circular'"),
        (type("Other", (nn.Linear,), {})(4, 4), "goes by class names, and passes over 'Other'"),
        (nn.Linear(4, 4), "alpha is 0, which sd-scripts takes as r, 1"),
    ],
)
def test_an_adapter_that_it_would_use_wrongly_is_not_written(layer: nn.Module, says: str, tmp_path: Path) -> None:
    model = nn.Sequential(layer)
    adapter = loraio.new_adapter(model, loraio.TrainConfig(digit=0, targets=("all",), rank=1, alpha=1))
    if "alpha" in says:
        adapter = replace(adapter, targets={name: replace(t, alpha=0) for name, t in adapter.targets.items()})
    with pytest.raises(AdapterError) as caught:
        write(adapter, model, tmp_path / "file")
    assert says in str(caught.value)


def test_an_alpha_that_float32_cannot_hold_comes_back(base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, alpha=0.1)
    write(adapter, base, tmp_path / "file")
    assert load_file(tmp_path / "file")["lora_unet_fc.alpha"].dtype == torch.float64
    save_file(load_file(tmp_path / "file"), tmp_path / "file")
    assert loraio.load(tmp_path / "file", base=base).targets["fc.weight"].alpha == 0.1
