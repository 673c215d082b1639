"""PEFT loads our files and gives our outputs, and we load its files and give its outputs."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import peft
import pytest
import torch
from peers import adapter_for, base_of, move_, read, refused
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.formats.peft import PEFT

assert_attached_is = partial(peers.assert_attached_is, ulp=16)
LAYERS = ["c1", "c2", "c3", "fc", "emb"]


class Net(nn.Module):
    """One layer of each type that PEFT adapts, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.c1 = nn.Conv1d(6, 6, 3, padding=1)
        self.c2 = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.c3 = nn.Conv3d(1, 3, 2)
        self.at = nn.MultiheadAttention(6, 2, batch_first=True)
        self.bn = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.c1(self.emb(tokens).transpose(1, 2))
        x = self.bn(x)
        x = x + self.at(x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2), need_weights=False)[0].transpose(1, 2)
        plane = self.c2(x.unsqueeze(1)).mean((1, 2, 3), keepdim=False)
        cube = self.c3(x.reshape(len(x), 1, 2, 3, -1)).mean((1, 2, 3, 4))
        return self.head(self.fc(x.mean(2)).relu()) + plane[:, None] + cube[:, None]


TOKENS = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(1))


base = base_of(Net)


def trained(base: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Return a PEFT model with random values in all that it would train, saved by itself."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, **settings))
    move_(model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*invalid shape.*")  # of lora_B.bias
        model.save_pretrained(folder)
    return model.eval()


def written(adapter: Adapter, base: nn.Module, folder: Path) -> nn.Module:
    """Return a PEFT model with our file, loaded without a warning."""
    peers.write(PEFT, adapter, base, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LAYERS, "lora_alpha": 3},
    "rslora": {"target_modules": LAYERS, "use_rslora": True, "lora_alpha": 1.5},
    "dora": {"target_modules": LAYERS, "use_dora": True},
    "patterns": {"target_modules": LAYERS, "rank_pattern": {"c2": 2, "emb": 1}, "alpha_pattern": {"fc": 0.5, "c.": 3}},
    "attention": {"target_modules": ["at", "fc"]},
    "expression": {"target_modules": "(fc|c[12])"},
    "saved": {"target_modules": ["c2", "fc"], "modules_to_save": ["bn", "head"]},
    "bias of layers": {"target_modules": ["c1", "fc", "at"], "bias": "lora_only"},
    "all biases": {"target_modules": ["c1", "fc"], "bias": "all"},
    "all but linear": {
        "target_modules": ["c1", "c2", "c3"],
        "bias": "all",
        "modules_to_save": ["head"],
        "use_dora": True,
    },
    "bias beside B": {"target_modules": ["c1", "c2", "fc"], "lora_bias": True, "use_rslora": True},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_file_of_peft_gives_its_outputs_here_and_ours_gives_ours_there(
    settings: dict[str, Any], base: nn.Module, tmp_path: Path
) -> None:
    theirs = trained(base, tmp_path / "peft", **settings)
    adapter = loraio.load(tmp_path / "peft", base=base)
    assert_attached_is(base, adapter, theirs, TOKENS)
    assert_attached_is(base, adapter, written(adapter, base, tmp_path / "ours"), TOKENS)
    peers.assert_merged_close(base, adapter, theirs.merge_and_unload().state_dict(), ulp=16)  # type: ignore[operator]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_round_trip_keeps_the_bytes(settings: dict[str, Any], base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "peft", **settings)
    adapter = loraio.load(tmp_path / "peft", base=base)
    peers.assert_written_twice_alike(PEFT, adapter, base, tmp_path / "one")
    loraio.save(adapter, tmp_path / "first")
    loraio.save(loraio.load(tmp_path / "one", base=base), tmp_path / "second")
    peers.assert_same_files(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("file", ["adapter_model.bin", "raw.pt"])
def test_pickles_and_live_state_dicts_are_read(file: str, base: nn.Module, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path / "peft", target_modules=LAYERS, modules_to_save=["bn"])
    if file == "raw.pt":
        torch.save(theirs.state_dict(), tmp_path / file)
        refused(tmp_path / file, base, "does not say alpha")
        adapter = loraio.load(tmp_path / file, base=base, alpha=8)
    else:
        theirs.save_pretrained(tmp_path / "pickle", safe_serialization=False)  # type: ignore[operator]
        adapter = loraio.load(tmp_path / "pickle", base=base)
    assert_attached_is(base, adapter, theirs, TOKENS)


@pytest.mark.parametrize("target", ["at.out_proj", "at.in_proj_weight", "at*"])
def test_an_adapter_of_one_projection_alone_is_completed(target: str, base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, target, rank_pattern={target: 2})
    assert_attached_is(base, adapter, written(adapter, base, tmp_path / "ours"), TOKENS)
    peers.assert_merged_alike(base, adapter, loraio.load(tmp_path / "ours", base=base))


def test_a_bias_that_peft_ignores_is_reported_and_left_out(base: nn.Module, tmp_path: Path) -> None:
    """mergekit writes such files: a pattern for each rank, and biases without lora_bias."""
    folder = tmp_path / "extracted"
    trained(base, folder, lora_alpha=3, target_modules=["c1", "fc"], rank_pattern={"fc": 2}, lora_bias=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"lora_bias": False, "alpha_pattern": {"fc": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = refused(folder, base, "lora_bias is not set: PEFT would pass over it")
    assert "base_model.model.fc.lora_B.bias" in text
    adapter, report = read(folder, base, lossy=True)
    assert [line.name for line in report.lost] == [f"base_model.model.{path}.lora_B.bias" for path in ("c1", "fc")]
    assert not adapter.whole
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert_attached_is(base, adapter, theirs, TOKENS)


@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_our_own_gives_its_outputs_in_peft(kind: str, rule: str, base: nn.Module, tmp_path: Path) -> None:
    """As trained here, dora's magnitudes are float64, and the statistics of the normalisation are its own."""
    patterns = {"rank_pattern": {"c2": 1}, "alpha_pattern": {"fc": 5.5}}
    adapter = adapter_for(base, *LAYERS, kind=kind, scale_rule=rule, norm="stats", size=0.2, **patterns)
    adapter = replace(adapter, tensors={name: tensor + 1 for name, tensor in adapter.tensors.items()})
    assert_attached_is(base, adapter, written(adapter, base, tmp_path / "ours"), TOKENS)
    assert loraio.load(tmp_path / "ours", base=base) == adapter
