"""PEFT's files are read, bound to a base and written; so would be those of other tools."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import base_of, read, refused
from peers import write as write_as
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.errors import AdapterError, BaseMismatchError, LoraioError, OutputError, StateError
from loraio.formats import loading
from loraio.formats.exported import ORIGIN
from loraio.formats.foreign import Context, Encoded
from loraio.formats.peft import PEFT

PREFIX = "base_model.model."
Write = Callable[..., Path]


class Net(nn.Module):
    """Layers that PEFT adapts, some in ways that its own forward pass does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.fc = nn.Linear(4, 6)
        self.bare = nn.Linear(6, 6, bias=False)
        self.wide = nn.Conv2d(2, 4, 3, dilation=2)
        self.round = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.point = nn.Conv2d(2, 4, 1, dilation=2)
        self.thin = nn.Conv3d(2, 4, (1, 1, 3))
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 6)})
        self.norm = nn.BatchNorm2d(4)
        self.at = nn.MultiheadAttention(4, 2)
        self.apart = nn.MultiheadAttention(4, 2, kdim=3)


base = base_of(Net)


def pair(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}


def fc_tensors(**more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    own = pair("fc", torch.randn(2, 4, generator=generator), torch.ones(6, 2))
    return own | {PREFIX + key: value for key, value in more.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a PEFT folder with a pair on fc; ``None`` removes a setting."""

    def made(tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], **settings}
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        save_file(fc_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return made


def encode(adapter: Adapter, base: nn.Module, *, state: bool = True) -> Encoded:
    return PEFT.encode(adapter, Context(network=base, state=base.state_dict() if state else None))


def config_of(adapter: Adapter, base: nn.Module) -> Mapping[str, Any]:
    config = encode(adapter, base).config
    assert config is not None
    return config


def export(adapter: Adapter, base: nn.Module, folder: Path) -> Path:
    write_as(PEFT, adapter, base, folder)
    return folder


def on(base: nn.Module, *targets: str, **settings: Any) -> Adapter:
    return loraio.new_adapter(base, loraio.TrainConfig(digit=0, targets=targets, rank=2, **settings))


# Reading


def test_the_factors_and_the_scale_are_those_of_the_file(write: Write, base: nn.Module) -> None:
    adapter = loraio.load(write(), base=base)
    target = adapter.targets["fc.weight"]
    assert (target.rank, target.alpha, target.scale, target.layer, target.shape) == (2, 4, 2.0, "Linear", (6, 4))
    assert adapter.factors["fc.weight.lora_A"].equal(fc_tensors()[f"{PREFIX}fc.lora_A.weight"])
    origin = adapter.training[ORIGIN]
    assert (origin["dialect"], origin["settings"]["lora_alpha"]) == ("peft", 4)
    assert loraio.merge(base.state_dict(), adapter).keys() == base.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': the factors are relative to a base"),
        *(({"init_lora_weights": start}, start) for start in ("pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
        ({"use_qalora": True}, "use_qalora is set, which changes the maths"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"target_parameters": ["fc.weight"]}, "target_parameters is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"modules_to_save": "fc"}, "modules_to_save is 'fc', not a list of names"),
        ({"exclude_modules": ["fc"]}, "'fc' is in exclude_modules: PEFT would pass over it"),
        ({"use_tomorrow": True}, "unknown setting 'use_tomorrow': True"),
        ({"r": 3}, "'fc': the configuration says rank 3, the tensors have 2"),
        ({"rank_pattern": {"fc": 8}}, "the configuration says rank 8"),
        ({"alpha_pattern": {"fc": "two"}}, "alpha is 'two', not a number"),
        ({"alpha_pattern": ["fc"]}, "alpha_pattern is ['fc'], not an object"),
        ({"use_dora": True}, "use_dora is True, a magnitude is not there"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"target_modules": ["fc", "missing"]}, "target_modules names 'missing', of which the file has no factors"),
        ({"target_modules": ["conv"]}, "'fc' is not in target_modules: PEFT would pass over it"),
        ({"target_modules": "inner.*"}, "'fc' is not in target_modules"),
        ({"target_modules": "(("}, "no regular expression"),
    ],
)
def test_a_setting_that_is_not_plain_lora_is_refused_by_name(
    settings: dict[str, Any], says: str, write: Write, base: nn.Module
) -> None:
    refused(write(**settings), base, says)


def test_all_reasons_are_listed_at_once(write: Write, base: nn.Module) -> None:
    text = refused(write(init_lora_weights="pissa", use_qalora=True, r=7), base, "pissa")
    assert all(word in text for word in ("use_qalora", "rank 7"))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{PREFIX}fc.lora_A.weight": torch.ones(2, 4)}, "'fc': lora_B is missing"),
        (fc_tensors() | {f"{PREFIX}fc.lora_B.weight": torch.ones(6, 3)}, "lora_A has rank 2, lora_B 3"),
        (fc_tensors() | {f"{PREFIX}fc.lora_B.weight": torch.ones(6)}, "factors of shapes"),
        (fc_tensors(**{"fc.lora_B.bias": torch.ones(6)}), "lora_bias is not set: PEFT would pass over it"),
        (fc_tensors(**{"fc.lora_magnitude_vector": torch.ones(6)}), "use_dora is False, a magnitude is there"),
        (fc_tensors(**{"fc.base_layer.weight.absmax": torch.ones(6)}), "the base is quantised"),
        (
            fc_tensors(**{f"fc.lora_A.{name}.weight": torch.ones(2, 4) for name in ("one", "two")}),
            "it holds 2 adapters, one, two",
        ),
    ],
)
def test_tensors_that_contradict_are_refused(
    tensors: dict[str, Tensor], says: str, write: Write, base: nn.Module
) -> None:
    refused(write(tensors), base, says)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (fc_tensors() | pair("fd", torch.ones(2, 4), torch.ones(6, 2)), "'fd' is no layer"),
        (fc_tensors(**{"else.weight": torch.ones(2)}), "the base has no 'else.weight'"),
        (fc_tensors() | {f"{PREFIX}fc.lora_A.weight": torch.ones(2, 5)}, "lora_A is (2, 5)"),
        (fc_tensors(**{"conv.bias": torch.ones(5)}), "shape is (5,), the base has (4,)"),
        (fc_tensors(**{"conv.bias": torch.ones(4, dtype=torch.int64)}), "is torch.int64"),
        (fc_tensors(**{"fc.base_layer.weight": torch.ones(6, 4)}), "another base"),
    ],
)
def test_a_tensor_that_does_not_fit_the_base_is_refused(
    tensors: dict[str, Tensor], says: str, write: Write, base: nn.Module
) -> None:
    refused(write(tensors, target_modules=None), base, says, BaseMismatchError)


def test_a_missing_alpha_has_to_be_given_and_one_in_the_file_wins(write: Write, base: nn.Module) -> None:
    assert loraio.load(write(), base=base, alpha=1.5).targets["fc.weight"].alpha == 4
    path = write(lora_alpha=None)
    refused(path, base, "--alpha")
    assert loraio.load(path, base=base, alpha=1.5).targets["fc.weight"].alpha == 1.5


@pytest.mark.parametrize("given", [None, 6])
def test_a_bias_beside_the_factors_is_scaled_and_added_to_the_layers_own(
    given: int | None, write: Write, base: nn.Module
) -> None:
    tensors = fc_tensors(**{"fc.lora_B.bias": torch.arange(6.0)})
    path = write(tensors, lora_bias=True, lora_alpha=None if given else 4)
    adapter, report = read(path, base, alpha=given)
    scale = 3 if given else 2
    assert adapter.tensors["fc.bias"].equal((base.fc.bias.double() + scale * torch.arange(6.0)).float())  # type: ignore[union-attr,operator]
    assert adapter.whole["fc.bias"].role == "bias"
    how = {line.name: line.how for line in report.of_fate("changed")}
    assert "replaced whole, at any strength" in how.pop(f"{PREFIX}fc.lora_B.bias")
    assert how == ({"alpha": "6 as given, the file does not say it"} if given else {})


def test_patterns_are_looked_up_as_peft_does(write: Write, base: nn.Module) -> None:
    tensors = fc_tensors() | pair("inner.fc", torch.ones(3, 4), torch.ones(6, 3))
    path = write(tensors, rank_pattern={"inner.fc": 3}, alpha_pattern={"^fc": 9, "fc": 5})
    targets = loraio.load(path, base=base).targets.items()
    assert {name: (t.rank, t.alpha) for name, t in targets} == {"fc.weight": (2, 9), "inner.fc.weight": (3, 5)}


def test_a_bias_without_a_place_is_lost_only_when_asked(write: Write, base: nn.Module) -> None:
    tensors = pair("bare", torch.ones(2, 6), torch.ones(6, 2)) | {f"{PREFIX}bare.lora_B.bias": torch.ones(6)}
    path = write(tensors, lora_bias=True, target_modules=["bare"])
    refused(path, base, "has no bias to add it to")
    adapter, report = read(path, base, lossy=True)
    assert not adapter.whole
    assert [line.name for line in report.lost] == [f"{PREFIX}bare.lora_B.bias"]


def test_replaced_tensors_that_equal_the_bases_are_not_kept(write: Write, base: nn.Module) -> None:
    saved = {f"norm.{name}": tensor.clone() for name, tensor in base.norm.state_dict().items()}  # type: ignore[union-attr,operator]
    saved["norm.running_mean"] += 1
    adapter = loraio.load(write(fc_tensors(**saved), modules_to_save=["norm"]), base=base)
    assert {name: whole.role for name, whole in adapter.whole.items()} == {"norm.running_mean": "norm"}


def test_a_saved_layer_may_have_another_number_of_outputs(write: Write, base: nn.Module) -> None:
    head = {"inner.fc.weight": torch.ones(9, 4), "inner.fc.bias": torch.ones(9)}
    adapter = loraio.load(write(fc_tensors(**head), modules_to_save=["inner.fc"]), base=base)
    assert adapter.heads == {"inner.fc": 9}
    with loraio.attach(base, adapter):
        assert base.inner["fc"](torch.ones(1, 4)).shape == (1, 9)  # type: ignore[index,operator]


def test_any_other_tensor_may_be_replaced_and_is_put_back(write: Write, base: nn.Module) -> None:
    new = {f"apart.{name}": torch.ones_like(t) for name, t in base.apart.state_dict().items()}  # type: ignore[union-attr,operator]
    adapter = loraio.load(write(fc_tensors(**new), modules_to_save=["apart"]), base=base)
    assert {whole.role for whole in adapter.whole.values()} == {"layer", "head", "bias"}
    before = copy.deepcopy(base.state_dict())
    with loraio.attach(base, adapter):
        assert base.apart.k_proj_weight.eq(1).all()  # type: ignore[union-attr]
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())
    assert loraio.merge(before, adapter)["apart.in_proj_bias"].eq(1).all()


def test_a_tensor_of_another_float_dtype_takes_the_bases(write: Write, base: nn.Module) -> None:
    adapter, report = read(write(fc_tensors(**{"conv.bias": torch.ones(4, dtype=torch.float64)})), base)
    assert adapter.tensors["conv.bias"].dtype == torch.float32
    assert [line.name for line in report.of_fate("changed")] == [f"{PREFIX}conv.bias"]


def test_a_base_with_an_adapter_or_a_shared_weight_is_refused(write: Write, base: nn.Module) -> None:
    adapter = loraio.load(write(), base=base)
    with loraio.attach(base, adapter), pytest.raises(StateError, match="carries an adapter"):
        loraio.load(write(), base=base)
    base.inner["fc"].weight = base.fc.weight  # type: ignore[index,union-attr]
    with pytest.raises(StateError, match="is shared"):
        loraio.load(write(), base=base)


def test_a_layer_with_a_wrong_forward_pass_in_peft_is_reported(write: Write, base: nn.Module) -> None:
    tensors = pair("wide", torch.ones(2, 2, 3, 3), torch.ones(4, 2, 1, 1))
    _, report = read(write(tensors, target_modules=["wide"]), base)
    assert {line.how for line in report.of_fate("changed")} == {
        "as PEFT merges it; attached, PEFT ignores the layer's dilation (2, 2)"
    }


def test_an_export_that_was_edited_is_read_as_it_is_now(base: nn.Module, tmp_path: Path) -> None:
    adapter = on(base, "fc", alpha=6)
    assert loraio.load(export(adapter, base, tmp_path / "out"), base=base) == adapter
    config = tmp_path / "out/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    again = loraio.load(tmp_path / "out", base=base)
    assert again.targets["fc.weight"].alpha == 7
    assert ORIGIN in again.training


# Writing


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("wide", "'wide.weight': PEFT ignores the layer's dilation (2, 2)"),
        ("round", "'round.weight': PEFT ignores the layer's padding_mode 'circular'"),
        ("thin", "PEFT fails to merge a Conv3d with the kernel (1, 1, 3)"),
        ("apart.k_proj_weight", "PEFT has no LoRA for attention whose projections are apart"),
    ],
)
def test_an_adapter_that_peft_would_use_wrongly_is_not_written(target: str, says: str, base: nn.Module) -> None:
    with pytest.raises(AdapterError) as caught:
        encode(on(base, target), base)
    assert says in str(caught.value)
    assert "loraio merge" in str(caught.value)
    # a kernel of one point has no dilation
    assert f"{PREFIX}point.lora_A.weight" in encode(on(base, "point"), base).tensors


@pytest.mark.parametrize(
    ("network", "says"),
    [(None, "which only the network says"), (nn.Linear(2, 2), "is no Linear with groups=1 of the network")],
)
def test_peft_needs_the_network_of_the_adapter(network: nn.Module | None, says: str, base: nn.Module) -> None:
    with pytest.raises(AdapterError, match=says):
        PEFT.encode(on(base, "fc"), Context(network=network))


def test_ranks_and_alphas_are_the_commonest_and_the_exceptions_are_anchored(base: nn.Module) -> None:
    adapter = on(base, "fc", "inner.fc", "point", rank_pattern={"fc": 3}, alpha_pattern={"point": 9})
    config = config_of(adapter, base)
    assert (config["r"], config["rank_pattern"]) == (2, {"^fc": 3})
    assert config["alpha_pattern"] == {"^fc": 3, "^point": 9}
    assert config["target_modules"] == ["fc", "inner.fc", "point"]
    # a name that ends other names becomes an expression
    assert config_of(on(base, "fc"), base)["target_modules"] == "fc"


def test_scale_rules_become_one_if_that_is_exact(base: nn.Module) -> None:
    adapter = on(base, "fc", "point", alpha=4)
    rooted = replace(adapter.targets["fc.weight"], scale_rule="alpha/sqrt(r)", alpha=2**0.5 * 3)
    mixed = replace(adapter, targets={**adapter.targets, "fc.weight": rooted})
    config = config_of(mixed, base)
    assert not config["use_rslora"]
    assert config["alpha_pattern"]["^fc"] / 2 == rooted.scale


def test_kinds_cannot_be_mixed(base: nn.Module) -> None:
    one, two = on(base, "fc"), on(base, "point", kind="dora")
    mixed = replace(one, targets={**one.targets, **two.targets}, factors={**one.factors, **two.factors})
    with pytest.raises(AdapterError, match="one use_dora for all layers"):
        encode(mixed, base)


def test_a_replaced_part_of_a_module_needs_the_rest_from_the_base(base: nn.Module, tmp_path: Path) -> None:
    adapter = on(base, "fc", norm="stats")
    with pytest.raises(AdapterError, match="of the base is needed, since PEFT saves the module"):
        encode(adapter, base, state=False)
    encoded = encode(adapter, base)
    assert {f"{PREFIX}norm.{name}" for name in base.norm.state_dict()} <= encoded.tensors.keys()  # type: ignore[union-attr,operator]


# Reports and outputs


def test_written_files_are_not_replaced_without_being_asked(base: nn.Module, tmp_path: Path) -> None:
    encoded = encode(on(base, "fc"), base)
    loading.write(PEFT, encoded, tmp_path / "out")
    with pytest.raises(LoraioError, match="exists"):
        loading.write(PEFT, encoded, tmp_path / "out")
    loading.write(PEFT, encoded, tmp_path / "out", overwrite=True)
    with pytest.raises(LoraioError, match="folder"):
        loading.write(PEFT, encoded, tmp_path / "no/such")
    assert sorted(load_file(tmp_path / "out/adapter_model.safetensors")) == sorted(encoded.tensors)


# The base of an export


@pytest.fixture
def exported(base: nn.Module, tmp_path: Path) -> Path:
    """An adapter on fc, as loraio writes it for PEFT."""
    return export(on(base, "fc"), base, tmp_path / "exported")


def changed(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """Change a folder, and give it digests that fit."""
    file, config_file = path / "adapter_model.safetensors", path / "adapter_config.json"
    document = loraio.files.tensorfile.read_header(file).document()
    tensors, config = load_file(file), json.loads(config_file.read_text())
    change(tensors, config)
    loraio.files.tensorfile.write(tensors, file, document=document, metadata={"format": "pt"}, overwrite=True)
    config_file.write_text(json.dumps(config))
    return path


def other_of(base: nn.Module, name: str) -> nn.Module:
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_parameter(name).mul_(1.25)
    return other


def double_alpha(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2


@pytest.mark.parametrize("change", [lambda *_: None, double_alpha])
@pytest.mark.parametrize(
    ("name", "says"), [("fc.weight", "'fc.weight': changed weights"), ("bare.weight", "other tensors of the network")]
)
def test_an_export_knows_its_base_even_after_a_change_of_the_file(
    change: Any, name: str, says: str, exported: Path, base: nn.Module
) -> None:
    path, other = changed(exported, change), other_of(base, name)
    assert str(path) in refused(path, other, says, BaseMismatchError)
    adapter = loraio.load(path, base=other, allow_base_mismatch=True)
    assert adapter.base.sha256 == loraio.load(path, base=base).base.sha256
    with pytest.raises(BaseMismatchError, match=says):
        loraio.merge(other.state_dict(), adapter)
    loraio.merge(base.state_dict(), adapter)


def test_an_export_for_a_base_of_another_dtype_is_refused_too(exported: Path, base: nn.Module) -> None:
    half = copy.deepcopy(base).half()
    refused(exported, half, "same weights cast to float16", BaseMismatchError)
    adapter = loraio.load(exported, base=half, allow_base_mismatch=True)
    assert adapter.targets["fc.weight"].dtype == "F32"
    assert adapter == loraio.load(exported, base=base)


def test_an_export_without_our_metadata_cannot_know_its_base(exported: Path, base: nn.Module) -> None:
    path, other = exported, other_of(base, "fc.weight")
    save_file(load_file(path / "adapter_model.safetensors"), path / "adapter_model.safetensors", {"format": "pt"})
    assert loraio.merge(other.state_dict(), loraio.load(path, base=other)).keys() == other.state_dict().keys()


def test_replaced_tensors_belong_to_the_base_of_the_export_too(write: Write, base: nn.Module, tmp_path: Path) -> None:
    head = {"inner.fc.weight": torch.ones(6, 4), "inner.fc.bias": torch.zeros(6)}
    adapter = loraio.load(write(fc_tensors(**head), modules_to_save=["inner.fc"]), base=base)
    path = export(adapter, base, tmp_path / "exported")
    other = other_of(base, "inner.fc.weight")
    refused(path, other, "'inner.fc.weight': other values", BaseMismatchError)
    assert loraio.load(path, base=other, allow_base_mismatch=True) == loraio.load(path, base=base)
    with torch.no_grad():
        other.get_parameter("inner.fc.weight").fill_(1)  # as in the file, which then has nothing to replace there
    refused(path, other, "other tensors of the network differ", BaseMismatchError)


def test_a_link_in_the_folder_is_not_written_through(base: nn.Module, tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    encoded = encode(on(base, "fc"), base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).symlink_to(outside)
        with pytest.raises(OutputError, match="is a link"):
            loading.write(PEFT, encoded, folder, overwrite=True)
        (folder / name).unlink()
    assert outside.read_text() == "mine"
    assert not list(folder.iterdir())
    loading.write(PEFT, encoded, folder)
