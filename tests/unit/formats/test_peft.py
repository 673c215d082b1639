"""Files of other tools before and after they are bound to a base, with PEFT's as the example."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    FormatError,
    LoraioError,
    MissingFileError,
    OutputError,
    StateError,
)
from loraio.formats import dialects, loading
from loraio.formats.exported import ORIGIN
from loraio.formats.foreign import Options
from loraio.formats.peft import Peft
from loraio.formats.report import Report
from loraio.formats.sources import open_source, source_of

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


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def fc_tensors(**more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pair = {"lora_A.weight": torch.randn(2, 4, generator=generator), "lora_B.weight": torch.ones(6, 2)}
    return {f"{PREFIX}fc.{slot}": value for slot, value in pair.items()} | {PREFIX + k: v for k, v in more.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A PEFT folder with a pair on fc; ``None`` takes a setting away."""

    def made(tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], **settings}
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        save_file(fc_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return made


def refusal(path: Path, base: nn.Module, error: type[LoraioError] = AdapterError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        loading.load_reported(path, base=base, options=Options(**options))
    return str(caught.value)


def encode(adapter: Adapter, base: nn.Module, *, state: bool = True) -> dialects.Encoded:
    return Peft().encode(adapter, network=base, state=base.state_dict() if state else None, options=Options())


def on(base: nn.Module, *targets: str, **settings: Any) -> Adapter:
    return loraio.new_adapter(base, loraio.TrainConfig(digit=0, targets=targets, rank=2, **settings))


# Reading


def test_the_factors_and_the_scale_are_those_of_the_file(write: Write, base: nn.Module) -> None:
    adapter = loraio.load(write(), base=base)
    target = adapter.targets["fc.weight"]
    assert (target.rank, target.alpha, target.scale, target.layer, target.shape) == (2, 4, 2.0, "Linear", (6, 4))
    assert adapter.factors["fc.weight.lora_A"].equal(fc_tensors()[f"{PREFIX}fc.lora_A.weight"])
    assert adapter.training[ORIGIN]["dialect"] == "peft"
    assert adapter.training[ORIGIN]["settings"]["lora_alpha"] == 4
    assert loraio.merge(base.state_dict(), adapter).keys() == base.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': the factors are relative to a base"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
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
def test_what_is_not_plain_lora_is_refused_by_name(
    settings: dict[str, Any], says: str, write: Write, base: nn.Module
) -> None:
    assert says in refusal(write(**settings), base)


def test_all_reasons_are_listed_at_once(write: Write, base: nn.Module) -> None:
    text = refusal(write(init_lora_weights="pissa", use_qalora=True, r=7), base)
    assert all(word in text for word in ("pissa", "use_qalora", "rank 7"))


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
            fc_tensors(**{"fc.lora_A.one.weight": torch.ones(2, 4), "fc.lora_B.two.weight": torch.ones(6, 2)}),
            "it holds 2 adapters, one, two",
        ),
    ],
)
def test_tensors_that_contradict_are_refused(
    tensors: dict[str, Tensor], says: str, write: Write, base: nn.Module
) -> None:
    assert says in refusal(write(tensors), base)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            fc_tensors(**{"fd.lora_A.weight": torch.ones(2, 4), "fd.lora_B.weight": torch.ones(6, 2)}),
            "'fd' is no layer",
        ),
        (fc_tensors(**{"else.weight": torch.ones(2)}), "the base has no 'else.weight'"),
        (fc_tensors() | {f"{PREFIX}fc.lora_A.weight": torch.ones(2, 5)}, "lora_A is (2, 5)"),
        (fc_tensors(**{"conv.bias": torch.ones(5)}), "shape is (5,), the base has (4,)"),
        (fc_tensors(**{"conv.bias": torch.ones(4, dtype=torch.int64)}), "is torch.int64"),
        (fc_tensors(**{"fc.base_layer.weight": torch.ones(6, 4)}), "another base"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    tensors: dict[str, Tensor], says: str, write: Write, base: nn.Module
) -> None:
    assert says in refusal(write(tensors, target_modules=None), base, BaseMismatchError)


def test_a_missing_alpha_has_to_be_given(write: Write, base: nn.Module) -> None:
    path = write(lora_alpha=None)
    assert "--alpha" in refusal(path, base)
    assert loraio.load(path, base=base, alpha=1.5).targets["fc.weight"].alpha == 1.5


def test_a_given_alpha_scales_a_bias_beside_the_factors_too(write: Write, base: nn.Module) -> None:
    path = write(fc_tensors(**{"fc.lora_B.bias": torch.arange(6.0)}), lora_bias=True, lora_alpha=None)
    adapter, report = loading.load_reported(path, base=base, options=Options(alpha=6))
    assert adapter.tensors["fc.bias"].equal((base.fc.bias.double() + 3 * torch.arange(6.0)).float())  # type: ignore[union-attr,operator]
    assert report is not None
    assert "setting alpha: changed, 6 as given, the file does not say it" in map(str, report.lines)


def test_alpha_of_the_file_wins_over_the_one_given(write: Write, base: nn.Module) -> None:
    assert loraio.load(write(), base=base, alpha=1.5).targets["fc.weight"].alpha == 4


def test_patterns_are_looked_up_as_peft_does(write: Write, base: nn.Module) -> None:
    tensors = fc_tensors(**{"inner.fc.lora_A.weight": torch.ones(3, 4), "inner.fc.lora_B.weight": torch.ones(6, 3)})
    patterns = {"rank_pattern": {"inner.fc": 3}, "alpha_pattern": {"^fc": 9, "fc": 5}}
    targets = loraio.load(write(tensors, **patterns), base=base).targets
    assert {name: (t.rank, t.alpha) for name, t in targets.items()} == {
        "fc.weight": (2, 9),
        "inner.fc.weight": (3, 5),
    }


def test_a_bias_beside_the_factors_is_added_to_the_layers_own(write: Write, base: nn.Module) -> None:
    path = write(fc_tensors(**{"fc.lora_B.bias": torch.arange(6.0)}), lora_bias=True)
    adapter, report = loading.load_reported(path, base=base, options=Options())
    assert adapter.tensors["fc.bias"].equal((base.fc.bias.double() + 2 * torch.arange(6.0)).float())  # type: ignore[union-attr,operator]
    assert adapter.whole["fc.bias"].role == "bias"
    assert report is not None
    (changed,) = report.of_fate("changed")
    assert "replaced whole, at any strength" in changed.how


def test_a_bias_without_a_place_is_lost_only_when_asked(write: Write, base: nn.Module) -> None:
    tensors = {
        f"{PREFIX}bare.lora_A.weight": torch.ones(2, 6),
        f"{PREFIX}bare.lora_B.weight": torch.ones(6, 2),
        f"{PREFIX}bare.lora_B.bias": torch.ones(6),
    }
    path = write(tensors, lora_bias=True, target_modules=["bare"])
    assert "has no bias to add it to" in refusal(path, base)
    adapter, report = loading.load_reported(path, base=base, options=Options(lossy=True))
    assert not adapter.whole
    assert report is not None
    assert [line.name for line in report.lost] == [f"{PREFIX}bare.lora_B.bias"]


def test_replaced_tensors_that_are_the_bases_own_are_not_kept(write: Write, base: nn.Module) -> None:
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
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with loraio.attach(base, adapter):
        assert base.apart.k_proj_weight.eq(1).all()  # type: ignore[union-attr]
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())
    assert loraio.merge(before, adapter)["apart.in_proj_bias"].eq(1).all()


def test_a_tensor_of_another_float_dtype_takes_the_bases(write: Write, base: nn.Module) -> None:
    path = write(fc_tensors(**{"conv.bias": torch.ones(4, dtype=torch.float64)}))
    adapter, report = loading.load_reported(path, base=base, options=Options())
    assert adapter.tensors["conv.bias"].dtype == torch.float32
    assert report is not None
    assert [line.name for line in report.of_fate("changed")] == [f"{PREFIX}conv.bias"]


def test_a_base_with_an_adapter_on_it_is_refused(write: Write, base: nn.Module) -> None:
    adapter = loraio.load(write(), base=base)
    with loraio.attach(base, adapter), pytest.raises(StateError, match="carries an adapter"):
        loraio.load(write(), base=base)


def test_a_weight_that_two_layers_share_is_refused(write: Write, base: nn.Module) -> None:
    base.inner["fc"].weight = base.fc.weight  # type: ignore[index,union-attr]
    with pytest.raises(StateError, match="is shared"):
        loraio.load(write(), base=base)


def test_layers_whose_forward_pass_peft_gets_wrong_are_said(write: Write, base: nn.Module) -> None:
    tensors = {
        f"{PREFIX}wide.lora_A.weight": torch.ones(2, 2, 3, 3),
        f"{PREFIX}wide.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    path = write(tensors, target_modules=["wide"])
    _, report = loading.load_reported(path, base=base, options=Options())
    assert report is not None
    assert {line.how for line in report.of_fate("changed")} == {
        "as PEFT merges it; attached, PEFT ignores the layer's dilation (2, 2)"
    }


def test_an_export_that_was_edited_is_read_as_it_is_now(base: nn.Module, tmp_path: Path) -> None:
    adapter = on(base, "fc", alpha=6)
    loading.write(Peft(), encode(adapter, base), tmp_path / "out")
    assert loraio.load(tmp_path / "out", base=base) == adapter
    config = tmp_path / "out/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    again = loraio.load(tmp_path / "out", base=base)
    assert again.targets["fc.weight"].alpha == 7
    assert ORIGIN in again.training


def test_an_export_remembers_the_base_that_it_was_made_for(base: nn.Module, tmp_path: Path) -> None:
    loading.write(Peft(), encode(on(base, "fc"), base), tmp_path / "out")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.fc.weight += 1  # type: ignore[union-attr,operator]
    with pytest.raises(BaseMismatchError, match=r"fc\.weight"):
        loraio.merge(other.state_dict(), loraio.load(tmp_path / "out", base=other))


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
def test_what_peft_would_use_wrongly_is_not_written(target: str, says: str, base: nn.Module) -> None:
    with pytest.raises(AdapterError) as caught:
        encode(on(base, target), base)
    assert says in str(caught.value)
    assert "loraio merge" in str(caught.value)


def test_a_kernel_of_one_point_has_no_dilation(base: nn.Module) -> None:
    assert f"{PREFIX}point.lora_A.weight" in encode(on(base, "point"), base).tensors


def test_peft_needs_the_network(base: nn.Module) -> None:
    with pytest.raises(AdapterError, match="which only the network says"):
        Peft().encode(on(base, "fc"), network=None, state=None, options=Options())


def test_ranks_and_alphas_are_the_commonest_and_the_exceptions_are_anchored(base: nn.Module) -> None:
    adapter = on(base, "fc", "inner.fc", "point", rank_pattern={"fc": 3}, alpha_pattern={"point": 9})
    config = encode(adapter, base).config
    assert config is not None
    assert (config["r"], config["rank_pattern"]) == (2, {"^fc": 3})
    assert config["alpha_pattern"] == {"^fc": 3, "^point": 9}
    assert config["target_modules"] == ["fc", "inner.fc", "point"]


def test_a_name_that_ends_other_names_becomes_an_expression(base: nn.Module) -> None:
    config = encode(on(base, "fc"), base).config
    assert config is not None
    assert config["target_modules"] == "fc"


def test_scale_rules_are_brought_together_where_that_is_exact(base: nn.Module) -> None:
    adapter = on(base, "fc", "point", alpha=4)
    rooted = replace(adapter.targets["fc.weight"], scale_rule="alpha/sqrt(r)", alpha=2**0.5 * 3)
    mixed = replace(adapter, targets={**adapter.targets, "fc.weight": rooted})
    config = encode(mixed, base).config
    assert config is not None
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


def test_an_adapter_of_another_network_is_not_written(base: nn.Module) -> None:
    with pytest.raises(AdapterError, match=r"is no Linear with groups=1 of the network"):
        Peft().encode(on(base, "fc"), network=nn.Linear(2, 2), state=None, options=Options())


# Sources and reports


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(4), 4),
        (torch.tensor([2.5]), 2.5),
        (torch.tensor(0.3, dtype=torch.bfloat16), 0.30078125),
        (torch.tensor(1.5, dtype=torch.float16), 1.5),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(-3, dtype=torch.int32), -3),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "pickle", "memory"])
def test_one_number_is_read_from_any_container(value: Tensor, expected: float, form: str, tmp_path: Path) -> None:
    path = tmp_path / ("file.pt" if form == "pickle" else "file")
    tensors = {"first": torch.ones(3), "x.alpha": value}
    torch.save(tensors, path) if form == "pickle" else save_file(tensors, path)
    source = open_source(path)
    if form == "memory":
        source = source_of(loraio.files.tensorfile.parse_file(path.read_bytes(), path))
    assert source.number("x.alpha") == expected
    assert type(source.number("x.alpha")) is type(expected)
    with pytest.raises(FormatError, match="it should be one number"):
        source.number("first")


def test_a_number_of_no_number_dtype_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.tensor(True)}, tmp_path / "file")
    with pytest.raises(FormatError, match="BOOL"):
        open_source(tmp_path / "file").number("x")


def test_folders_without_an_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no adapter in the folder"):
        loraio.load(tmp_path)
    assert not dialects.is_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="not a JSON object"):
        loraio.load(tmp_path)


def test_an_unknown_file_names_its_first_key(tmp_path: Path) -> None:
    save_file({"what.is.this": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(FormatError, match=r"'what\.is\.this' is no adapter's key"):
        loraio.load(tmp_path / "file")
    assert not dialects.is_adapter(tmp_path / "file")


def test_a_pickle_that_needs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="weights_only=True"):
        loraio.load(tmp_path)


def test_a_report_is_sorted_and_speaks(write: Write, base: nn.Module) -> None:
    _, report = loading.load_reported(write(), base=base, options=Options())
    assert report is not None
    assert Report.of(reversed(report.lines)) == report
    assert str(report.lines[0]) == f"tensor {PREFIX}fc.lora_A.weight: carried"
    assert report.to_json()[0] == {
        "what": "tensor",
        "name": f"{PREFIX}fc.lora_A.weight",
        "fate": "carried",
        "how": "",
    }


def test_written_files_are_not_replaced_without_being_asked(base: nn.Module, tmp_path: Path) -> None:
    encoded = encode(on(base, "fc"), base)
    loading.write(Peft(), encoded, tmp_path / "out")
    with pytest.raises(LoraioError, match="exists"):
        loading.write(Peft(), encoded, tmp_path / "out")
    loading.write(Peft(), encoded, tmp_path / "out", overwrite=True)
    with pytest.raises(LoraioError, match="folder"):
        loading.write(Peft(), encoded, tmp_path / "no/such")
    assert sorted(load_file(tmp_path / "out/adapter_model.safetensors")) == sorted(encoded.tensors)


# The base of an export


@pytest.fixture
def export(base: nn.Module, tmp_path: Path) -> Callable[[], Path]:
    """An adapter on fc, as loraio writes it for PEFT."""

    def made() -> Path:
        encoded = encode(on(base, "fc"), base)
        loading.write(Peft(), encoded, tmp_path / "exported")
        return tmp_path / "exported"

    return made


def changed(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The folder after somebody changed it and gave it fitting digests."""
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


def nothing(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize("change", [nothing, double_alpha])
@pytest.mark.parametrize(
    ("name", "says"), [("fc.weight", "'fc.weight': changed weights"), ("bare.weight", "other tensors of the network")]
)
def test_an_export_knows_its_base_whatever_became_of_the_file(
    change: Any, name: str, says: str, export: Callable[[], Path], base: nn.Module
) -> None:
    path, other = changed(export(), change), other_of(base, name)
    text = refusal(path, other, BaseMismatchError)
    assert says in text
    assert str(path) in text
    adapter = loraio.load(path, base=other, allow_base_mismatch=True)
    assert adapter.base.sha256 == loraio.load(path, base=base).base.sha256
    with pytest.raises(BaseMismatchError, match=says):
        loraio.merge(other.state_dict(), adapter)
    loraio.merge(base.state_dict(), adapter)


def test_an_export_for_a_base_of_another_dtype_is_refused_too(export: Callable[[], Path], base: nn.Module) -> None:
    path, half = export(), copy.deepcopy(base).half()
    assert "same weights cast to float16" in refusal(path, half, BaseMismatchError)
    adapter = loraio.load(path, base=half, allow_base_mismatch=True)
    assert adapter.targets["fc.weight"].dtype == "F32"
    assert adapter == loraio.load(path, base=base)


def test_an_export_without_our_metadata_cannot_know_its_base(export: Callable[[], Path], base: nn.Module) -> None:
    path, other = export(), other_of(base, "fc.weight")
    save_file(load_file(path / "adapter_model.safetensors"), path / "adapter_model.safetensors", {"format": "pt"})
    assert loraio.merge(other.state_dict(), loraio.load(path, base=other)).keys() == other.state_dict().keys()


def test_replaced_tensors_belong_to_the_base_of_the_export_too(write: Write, base: nn.Module, tmp_path: Path) -> None:
    head = {"inner.fc.weight": torch.ones(6, 4), "inner.fc.bias": torch.zeros(6)}
    adapter = loraio.load(write(fc_tensors(**head), modules_to_save=["inner.fc"]), base=base)
    path = tmp_path / "exported"
    loading.write(Peft(), encode(adapter, base), path)
    other = other_of(base, "inner.fc.weight")
    assert "'inner.fc.weight': other values" in refusal(path, other, BaseMismatchError)
    assert loraio.load(path, base=other, allow_base_mismatch=True) == loraio.load(path, base=base)
    with torch.no_grad():
        other.get_parameter("inner.fc.weight").fill_(1)  # as in the file, which then has nothing to replace there
    assert "other tensors of the network differ" in refusal(path, other, BaseMismatchError)


def test_a_link_in_the_folder_is_not_written_through(base: nn.Module, tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    encoded = encode(on(base, "fc"), base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).symlink_to(outside)
        with pytest.raises(OutputError, match="is a link"):
            loading.write(Peft(), encoded, folder, overwrite=True)
        (folder / name).unlink()
    assert outside.read_text() == "mine"
    assert not list(folder.iterdir())
    loading.write(Peft(), encoded, folder)
