"""PEFT itself: it loads what we write and gives our outputs, and we load what it writes and give its outputs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.errors import AdapterError
from loraio.formats import loading
from loraio.formats.foreign import Options
from loraio.formats.peft import Peft

ULP = 16
"""PEFT multiplies, scales and adds in float32, ours is rounded once: so many eps of the largest number at most."""

PEFT = Peft()

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


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(1))


def trained(base: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """A PEFT model with random values in all that it would train, saved by itself."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*invalid shape.*")  # of lora_B.bias
        model.save_pretrained(folder)
    return model.eval()


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


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= ULP * torch.finfo(torch.float32).eps * expected.abs().max())


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_what_peft_trained_gives_its_outputs_here(
    settings: dict[str, Any], base: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    theirs = trained(base, tmp_path / "peft", r=3, **settings)
    adapter = loraio.load(tmp_path / "peft", base=base)
    before = base(tokens)
    with loraio.attach(base, adapter):
        assert not close(before, theirs(tokens))
        assert close(base(tokens), theirs(tokens))
    assert base(tokens).equal(before)
    merged = loraio.merge(base.state_dict(), adapter)
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        assert close(merged[name].double(), tensor.double()), name


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_what_we_write_gives_our_outputs_in_peft(
    settings: dict[str, Any], base: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    trained(base, tmp_path / "peft", r=3, **settings)
    adapter = loraio.load(tmp_path / "peft", base=base)
    loading.write(
        PEFT, PEFT.encode(adapter, network=base, state=base.state_dict(), options=Options()), tmp_path / "ours"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with loraio.attach(base, adapter):
        assert close(theirs(tokens), base(tokens))


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_round_trip_keeps_the_bytes(settings: dict[str, Any], base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "peft", r=3, **settings)
    adapter = loraio.load(tmp_path / "peft", base=base)
    for name in ("one", "two"):
        loading.write(
            PEFT, PEFT.encode(adapter, network=base, state=base.state_dict(), options=Options()), tmp_path / name
        )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    loraio.save(adapter, tmp_path / "first")
    loraio.save(loraio.load(tmp_path / "one", base=base), tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("file", ["adapter_model.bin", "raw.pt"])
def test_pickles_and_live_state_dicts_are_read(file: str, base: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path / "peft", r=3, target_modules=LAYERS, modules_to_save=["bn"])
    if file == "raw.pt":
        torch.save(theirs.state_dict(), tmp_path / file)
        with pytest.raises(AdapterError, match="does not say alpha"):
            loraio.load(tmp_path / file, base=base)
        adapter = loraio.load(tmp_path / file, base=base, alpha=8)
    else:
        theirs.save_pretrained(tmp_path / "pickle", safe_serialization=False)
        adapter = loraio.load(tmp_path / "pickle", base=base)
    with loraio.attach(base, adapter):
        assert close(base(tokens), theirs(tokens))


def test_an_adapter_of_one_projection_alone_is_completed(base: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    for targets in (("at.out_proj",), ("at.in_proj_weight",), ("at*",)):
        config = loraio.TrainConfig(digit=0, targets=targets, rank=2, rank_pattern={targets[0]: 2})
        fresh = loraio.new_adapter(base, config)
        factors = {name: factor + 0.3 for name, factor in fresh.factors.items()}
        adapter = Adapter(targets=fresh.targets, factors=factors, base=fresh.base)
        encoded = PEFT.encode(adapter, network=base, state=None, options=Options())
        folder = tmp_path / targets[0].strip("*")
        loading.write(PEFT, encoded, folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        with loraio.attach(base, adapter):
            assert close(theirs(tokens), base(tokens))
        again, _ = loading.load_reported(folder, base=base, options=Options())
        merged, remerged = (loraio.merge(base.state_dict(), one) for one in (adapter, again))
        assert all(merged[name].equal(remerged[name]) for name in merged)


def test_a_bias_that_peft_passes_over_is_said_and_left_out(base: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    """As mergekit writes what it extracts: a pattern for each rank, and biases without lora_bias."""
    folder = tmp_path / "extracted"
    trained(base, folder, r=3, lora_alpha=3, target_modules=["c1", "fc"], rank_pattern={"fc": 2}, lora_bias=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"lora_bias": False, "alpha_pattern": {"fc": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="lora_bias is not set: PEFT would pass over it") as caught:
        loraio.load(folder, base=base)
    assert "base_model.model.fc.lora_B.bias" in str(caught.value)
    adapter, report = loading.load_reported(folder, base=base, options=Options(lossy=True))
    assert report is not None
    assert [line.name for line in report.lost] == [f"base_model.model.{path}.lora_B.bias" for path in ("c1", "fc")]
    assert not adapter.whole
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with loraio.attach(base, adapter):
        assert close(theirs(tokens), base(tokens))


@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_our_own_gives_its_outputs_in_peft(
    kind: str, rule: str, base: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    """As trained here: dora's magnitudes are float64, and the statistics of the normalisation are its own."""
    patterns = {"rank_pattern": {"c2": 1}, "alpha_pattern": {"fc": 5.5}}
    config = loraio.TrainConfig(
        digit=0, targets=tuple(LAYERS), rank=2, kind=kind, scale_rule=rule, norm="stats", **patterns
    )
    fresh = loraio.new_adapter(base, config)
    generator = torch.Generator().manual_seed(5)
    moved = {
        name: factor + 0.2 * torch.randn(factor.shape, generator=generator) for name, factor in fresh.factors.items()
    }
    tensors = {name: tensor + 1 for name, tensor in fresh.tensors.items()}
    adapter = Adapter(targets=fresh.targets, factors=moved, base=fresh.base, whole=fresh.whole, tensors=tensors)
    encoded = PEFT.encode(adapter, network=base, state=base.state_dict(), options=Options())
    loading.write(PEFT, encoded, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with loraio.attach(base, adapter):
        assert close(theirs(tokens), base(tokens))
    assert loraio.load(tmp_path / "ours", base=base) == adapter
