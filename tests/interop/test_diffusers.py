"""diffusers loads our files and gives our outputs, and we load its files, also those of its past."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import peft
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peers import adapter_for, base_of, move_, read, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraio
from loraio.errors import FormatError, LoraioError
from loraio.formats.diffusers import Diffusers
from loraio.formats.exported import ORIGIN

DIFFUSERS = Diffusers()
write = partial(peers.write, DIFFUSERS)
assert_attached_is = partial(peers.assert_attached_is, ulp=16)
X = peers.random((2, 3, 5, 4))
NAME = "pytorch_lora_weights.safetensors"
Save = Callable[..., Path]


class Attention(nn.Module):
    """Layers with the names that files of earlier eras use."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 5)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(x).tanh() * self.to_k(x) + self.to_v(x))  # type: ignore[no-any-return]


class Net(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A model on which diffusers can put an adapter."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv1d(4, 4, 3, padding=1)
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.one(self.conv(x).flatten(2)).mean(2))  # type: ignore[no-any-return]


base = base_of(Net)


def loaded(base: nn.Module, folder: Path | dict[str, Tensor], **options: Any) -> Any:
    """Return a model with an adapter on it, as diffusers loads it."""
    model = copy.deepcopy(base)
    names = {} if isinstance(folder, dict) else {"weight_name": NAME}
    model.load_lora_adapter(folder, prefix="unet", **names, **options)  # type: ignore[operator]
    return model.eval()


def pairs(base: nn.Module, *paths: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a random down and up for each of these layers."""
    generator = torch.Generator().manual_seed(4)
    found = {}
    for path in paths:
        out, *rest = base.get_submodule(path).weight.shape  # type: ignore[union-attr,misc]
        up = torch.randn(out, 2, *[1] * (len(rest) - 1), generator=generator)
        found[path] = (torch.randn(2, *rest, generator=generator), up)
    return found


@pytest.fixture
def save(base: nn.Module, tmp_path: Path) -> Save:
    """Return a function that saves a file with a pair on attn.to_q, in the present form."""

    def made(config: dict[str, Any] | None = None, text: str | None = None, **more: Tensor) -> Path:
        ((down, up),) = pairs(base, "attn.to_q").values()
        tensors = {"unet.attn.to_q.lora_A.weight": down, "unet.attn.to_q.lora_B.weight": up, **more}
        metadata = {"format": "pt"}
        if config is not None or text is not None:
            metadata["lora_adapter_metadata"] = json.dumps(config) if text is None else text
        save_file(tensors, tmp_path / "file", metadata)
        return tmp_path / "file"

    return made


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
def test_our_file_gives_our_outputs_in_diffusers(kind: str, rule: str, base: nn.Module, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"one": 1}, "alpha_pattern": {"conv": 0.3}}
    adapter = adapter_for(base, kind=kind, scale_rule=rule, **patterns)
    report = write(adapter, base, tmp_path / NAME)
    assert "setting prefix: carried, unet, in front of every name" in map(str, report.lines)
    assert_attached_is(base, adapter, loaded(base, tmp_path), X)
    assert loraio.load(tmp_path / NAME, base=base) == adapter
    write(adapter, base, tmp_path / "again")
    peers.assert_same_files(tmp_path / "again", tmp_path / NAME)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_a_file_of_diffusers_gives_its_outputs_here(settings: dict[str, Any], base: nn.Module, tmp_path: Path) -> None:
    theirs: Any = copy.deepcopy(base)
    targets = ["conv", "one", "to_q", "to_out.0"]
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, alpha_pattern={"one": 2}, **settings))
    move_(theirs.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*invalid shape.*")  # of lora_B.bias
        theirs.save_lora_adapter(tmp_path)
    adapter = loraio.load(tmp_path / NAME, base=base)
    assert adapter.targets["one.weight"].alpha == 2
    assert adapter.training[ORIGIN]["settings"]["components"] == [""]
    assert_attached_is(base, adapter, theirs, X)


@pytest.mark.parametrize("alphas", [True, False], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("era", ["now", "middle", "text", "old"])
def test_files_of_every_era_give_its_outputs_here(era: str, alphas: bool, base: nn.Module, tmp_path: Path) -> None:
    paths = ["attn.to_q", "attn.to_v", "attn.to_out.0", *(["conv"] if era in ("now", "middle") else [])]
    plain, tensors, given = {}, {}, {}
    for path, (down, up) in pairs(base, *paths).items():
        plain |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
        old = path.replace("attn.", "attn.processor.").replace("to_out.0", "to_out")
        start = {"now": path, "middle": f"{path}.lora", "text": f"{path}.lora_linear_layer", "old": f"{old}_lora"}[era]
        slots = ("lora_A", "lora_B") if era == "now" else ("down", "up")
        tensors |= {f"unet.{start}.{slot}.weight": value for slot, value in zip(slots, (down, up), strict=True)}
        if alphas:
            tensors[f"unet.{start}.alpha"] = torch.tensor(5.0)
            given[f"{path}.alpha"] = 5.0
    save_file(tensors, tmp_path / "file")
    adapter, report = read(tmp_path / "file", base)
    theirs = loaded(
        base, plain, **({"network_alphas": {f"unet.{key}": value for key, value in given.items()}} if alphas else {})
    )
    assert_attached_is(base, adapter, theirs, X)
    assert any(line.how.startswith("r, as is meant") for line in report.lines) == (not alphas)


def test_a_given_alpha_wins_over_the_implied_one(save: Save, base: nn.Module) -> None:
    assert loraio.load(save(), base=base).targets["attn.to_q.weight"].alpha == 2
    assert loraio.load(save(), base=base, alpha=7).targets["attn.to_q.weight"].alpha == 7


def test_parts_of_a_pipeline_are_told_apart(base: nn.Module, tmp_path: Path) -> None:
    pipeline = nn.ModuleDict({"unet": base, "text_encoder": nn.Sequential(nn.Linear(3, 4))})
    adapter = adapter_for(pipeline)
    write(adapter, pipeline, tmp_path / "file")
    assert {"unet.conv.lora_A.weight", "text_encoder.0.lora_A.weight"} <= load_file(tmp_path / "file").keys()
    assert loraio.load(tmp_path / "file", base=pipeline) == adapter


def test_a_part_may_be_chosen_and_is_kept(base: nn.Module, tmp_path: Path) -> None:
    write(adapter_for(base), base, tmp_path / "file", prefix="transformer")
    adapter = loraio.load(tmp_path / "file", base=base)
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "file"))
    plain = replace(adapter, training={ORIGIN: {"dialect": "diffusers", "settings": {"components": ["transformer"]}}})
    write(plain, base, tmp_path / "again")
    assert load_file(tmp_path / "again").keys() == load_file(tmp_path / "file").keys()
    with pytest.raises(LoraioError, match="no part of a pipeline 'unett'; did you mean 'unet'"):
        write(adapter_for(base), base, tmp_path / "other", prefix="unett")


@pytest.mark.parametrize(
    ("config", "more", "says"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 2}, {}, "the configuration says rank 3, the tensors have 2"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}, {}, "is 'pissa'"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_k"]}, {}, "'attn.to_q' is not in target_mod"),
        ({"unet.r": 2, "unet.lora_alpha": 2}, {"unet.attn.to_q.alpha": torch.ones(1)}, "the metadata say 2"),
        (None, {"unet.attn.to_k.alpha": torch.ones(1)}, "'unet.attn.to_k.alpha' is there without factors"),
        (None, {"unet.attn.to_k.lora_A.weight": torch.ones(2, 4)}, "'attn.to_k': lora_B is missing"),
        (None, {"unet.attn.to_q.lora.down.weight": torch.ones(2, 4)}, "to_q.lora_A.weight' is there again as"),
        (None, {"unet.attn.what": torch.ones(1)}, "'unet.attn.what' is no key that diffusers knows"),
    ],
)
def test_an_unclear_file_is_refused_by_its_key(
    config: dict[str, Any] | None, more: dict[str, Tensor], says: str, save: Save, base: nn.Module
) -> None:
    refused(save(config, **more), base, says)


@pytest.mark.parametrize("text", ["[]", "{", '{"unet.r": 1, "unet.r": 2}'])
def test_metadata_that_are_no_object_are_refused(text: str, save: Save, base: nn.Module) -> None:
    refused(save(text=text), base, "lora_adapter_metadata", FormatError)


def test_tensors_without_a_place_are_reported(base: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    adapter = adapter_for(model, norm="stats")
    report = write(adapter, model, tmp_path / "file")
    assert {line.name for line in report.lost} == set(adapter.whole)
    assert report.lost
