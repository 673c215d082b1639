"""LyCORIS loads our files and gives our outputs, and we load its files and give its outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lycoris
import peers
import pytest
import torch
from peers import adapter_for, assert_attached_is, base_of, read, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.formats.lycoris import Lycoris

LYCORIS = Lycoris()
write = partial(peers.write, LYCORIS)
X = peers.random((4, 6, 8))


class Net(nn.Module):
    """One layer of each type that LyCORIS adapts, with steps, gaps and groups, and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(6, 8, 3, padding=1)
        self.c2 = nn.Conv2d(1, 4, (3, 2), stride=2, padding=1)
        self.wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.c3 = nn.Conv3d(1, 3, 2)
        self.ln = nn.LayerNorm(8)
        self.gn = nn.GroupNorm(2, 4)
        self.mid = nn.ModuleDict({"fc": nn.Linear(8, 5)})
        self.head = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(self.c1(x).transpose(1, 2))
        plane = self.grouped(self.point(self.wide(self.gn(self.c2(x.unsqueeze(1)))).relu())).mean((1, 2, 3))
        cube = self.c3(x.reshape(len(x), 1, 2, 4, -1)).mean((1, 2, 3, 4))
        return self.head(self.mid["fc"](x.mean(1)).relu()) + plane[:, None] + cube[:, None]


base = base_of(Net)


def trained(base: nn.Module, file: Path, **settings: Any) -> nn.Module:
    """Return a model with a LyCORIS network of random values, and save the network."""
    model = copy.deepcopy(base)
    settings = {"linear_dim": 3, "linear_alpha": 2, "preset": "full", **settings}
    network = lycoris.create_lycoris(model, 1.0, **settings)
    network.apply_to()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise if "dora" in name else 0.3 * noise)
    save_file({key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}, file)
    return model.eval()


def loaded(base: nn.Module, file: Path, *, merge: bool = False) -> nn.Module:
    """Return a model with a file on it, as LyCORIS loads it."""
    model = copy.deepcopy(base)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model, weights_sd=load_file(file))
    assert len(network.loras) == len({key.partition(".")[0] for key in load_file(file)})
    with torch.no_grad():
        if merge:
            network.merge_to()
        else:
            network.apply_to()
    return model.eval()


PLAIN: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "other ranks of convolutions": {"algo": "locon", "conv_dim": 2, "conv_alpha": 0.5},
    "tucker": {"algo": "locon", "use_tucker": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "tucker and dora": {"algo": "locon", "use_tucker": True, "dora_wd": True},
    "norms": {"algo": "locon", "train_norm": True},
    "full": {"algo": "full"},
}

PRODUCTS: dict[str, dict[str, Any]] = {
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "loha, dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "linear_dim": 1},
    "lokr, both halves": {"algo": "lokr", "linear_dim": 1, "decompose_both": True, "factor": 4},
    "lokr, whole": {"algo": "lokr", "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "linear_dim": 1, "use_tucker": True, "factor": 2},
}


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_a_file_of_lycoris_gives_its_outputs_here(settings: dict[str, Any], base: nn.Module, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path / "file.safetensors", **settings)
    adapter = loraio.load(tmp_path / "file.safetensors", base=base)
    assert_attached_is(base, adapter, theirs, X)


@pytest.mark.parametrize("settings", [{"algo": "locon"}, {"algo": "locon", "dora_wd": True}], ids=["locon", "dora"])
def test_it_merges_to_our_weights(settings: dict[str, Any], base: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    trained(base, file, **settings)
    peers.assert_merged_close(base, loraio.load(file, base=base), loaded(base, file, merge=True).state_dict())


@pytest.mark.parametrize("settings", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_is_exact_at_the_rank_of_its_structure(
    settings: dict[str, Any], base: nn.Module, tmp_path: Path
) -> None:
    """One scale is applied: that of its forward pass."""
    theirs = trained(base, tmp_path / "file", **settings)
    assert "--approximate" in refused(tmp_path / "file", base, "no plain pairs")
    adapter, report = read(tmp_path / "file", base, approximate=True, rank=1000)
    assert {line.fate for line in report.lines if line.what == "tensor" and not line.name.endswith("alpha")} == {
        "changed"
    }
    assert all("approximated" not in line.how for line in report.lines)
    assert_attached_is(base, adapter, theirs, X)


def test_the_error_of_an_approximation_is_the_one_that_it_has(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "file", algo="loha")
    exact, rough = (read(tmp_path / "file", base, approximate=True, rank=rank) for rank in (1000, None))
    line = next(line for line in rough[1].lines if line.name == "lycoris_c1.hada_w1_a")
    assert "approximated at rank 3, relative Frobenius error " in line.how
    deltas = []
    for adapter, _ in (exact, rough):
        target, factors = adapter.targets["c1.weight"], adapter.factors_of("c1.weight")
        deltas.append(target.scale * (factors["lora_B"].double() @ factors["lora_A"].double()))
    error = (deltas[0] - deltas[1]).norm() / deltas[0].norm()
    assert 0.01 < error < 1
    assert float(line.how.rpartition(" ")[2]) == pytest.approx(error.item(), rel=1e-2)
    assert rough[0].targets["c1.weight"].rank == 3


def test_a_whole_change_may_be_approximated_too(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "file", algo="full")
    adapter, report = read(tmp_path / "file", base, approximate=True, rank=2)
    assert adapter.targets["mid.fc.weight"].rank == 2
    assert any("approximated at rank 2" in line.how for line in report.lines)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
def test_our_file_gives_our_outputs_in_lycoris(kind: str, rule: str, base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, "all", kind=kind, scale_rule=rule, rank_pattern={"c2": 1})
    report = write(adapter, base, tmp_path / "file.safetensors")
    assert not report.lost
    assert_attached_is(base, adapter, loaded(base, tmp_path / "file.safetensors"), X)
    theirs = loaded(base, tmp_path / "file.safetensors", merge=True).state_dict()
    peers.assert_merged_close(base, adapter, theirs)


def test_its_weights_are_ours_to_the_bit_if_no_sum_rounds(base: nn.Module, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randint(-64, 64, parameter.shape, generator=generator) / 16)
    fresh = adapter_for(base, "all", rank=2, alpha=4)
    whole = {name: torch.randint(-8, 8, one.shape, generator=generator).float() for name, one in fresh.factors.items()}
    adapter = replace(fresh, factors=whole)
    write(adapter, base, tmp_path / "file.safetensors")
    merged = loraio.merge(base.state_dict(), adapter)
    theirs = loaded(base, tmp_path / "file.safetensors", merge=True).state_dict()
    assert not merged["grouped.weight"].equal(base.state_dict()["grouped.weight"])
    assert all(merged[name].equal(tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_whole_changes_give_our_outputs_in_lycoris(kind: str, base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, "all", kind=kind)
    bias = base.state_dict()["mid.fc.bias"]
    made = replace(adapter, **with_bias(adapter, base, bias + 1))
    assert [line.name for line in write(made, base, tmp_path / "pairs.safetensors").lost] == ["mid.fc.bias"]
    assert not write(made, base, tmp_path / "file.safetensors", as_full_delta=True).lost
    theirs = loaded(base, tmp_path / "file.safetensors")
    for adapter in (made, loraio.load(tmp_path / "file.safetensors", base=base)):
        assert_attached_is(base, adapter, theirs, X)


def with_bias(adapter: Adapter, base: nn.Module, value: Tensor) -> Mapping[str, Any]:
    from loraio.adapter import WholeTensor
    from loraio.files.tensors import tensor_sha256

    old = base.state_dict()["mid.fc.bias"]
    shape = tuple(old.shape)
    whole = WholeTensor(role="bias", shape=shape, dtype="F32", base_sha256=tensor_sha256(old), base_shape=shape)
    return {"whole": {"mid.fc.bias": whole}, "tensors": {"mid.fc.bias": value}}


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_a_round_trip_keeps_the_weights_and_the_bytes(
    settings: dict[str, Any], base: nn.Module, tmp_path: Path
) -> None:
    trained(base, tmp_path / "theirs", **settings)
    adapter = loraio.load(tmp_path / "theirs", base=base)
    full = settings["algo"] == "full"
    for name in ("one", "two"):
        assert not write(adapter, base, tmp_path / name, as_full_delta=full).lost
    peers.assert_same_files(tmp_path / "one", tmp_path / "two")
    again = loraio.load(tmp_path / "one", base=base)
    peers.assert_merged_alike(base, adapter, again)
    loraio.save(adapter, tmp_path / "first")
    loraio.save(again, tmp_path / "second")
    peers.assert_same_files(tmp_path / "first", tmp_path / "second")


def test_our_norms_give_our_outputs_in_lycoris(base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, "mid.fc", norm="affine")
    lines = {name: tensor + torch.linspace(0.1, 0.9, len(tensor)) for name, tensor in adapter.tensors.items()}
    adapter = replace(adapter, tensors=lines)
    assert set(adapter.whole) == {"ln.weight", "ln.bias", "gn.weight", "gn.bias"}
    assert not write(adapter, base, tmp_path / "file.safetensors").lost
    assert_attached_is(base, adapter, loaded(base, tmp_path / "file.safetensors"), X)


@pytest.mark.parametrize(
    ("algo", "says"),
    [
        ("diag-oft", "OFT multiplies the weight by a rotation"),
        ("boft", "OFT multiplies the weight by a rotation"),
        ("ia3", "(IA)3 multiplies"),
        ("glora", "GLoRA multiplies the weight itself"),
    ],
)
def test_methods_without_a_form_are_refused_by_name(algo: str, says: str, base: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    trained(model, tmp_path / "file", algo=algo)
    assert "lycoris_0." in refused(tmp_path / "file", model, says)


def test_lengths_of_columns_are_refused(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "file", algo="locon", dora_wd=True, wd_on_output=False)
    text = refused(tmp_path / "file", base, "lengths of the columns have no form here", loraio.LoraioError)
    assert "'lycoris_c1.dora_scale'" in text
