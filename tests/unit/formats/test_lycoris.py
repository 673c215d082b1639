"""LyCORIS' files are recognised, refused and reported on, without LyCORIS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import peers
import pytest
import torch
from peers import base_of, read, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraio
from loraio.errors import AdapterError, BaseMismatchError
from loraio.formats import dialects
from loraio.formats.foreign import Context, Options
from loraio.formats.lycoris import Lycoris
from loraio.formats.products import nearest_pair, whole

LYCORIS = Lycoris()
write_lycoris = partial(peers.write, LYCORIS)
Write = Callable[..., Path]


class Net(nn.Module):
    """Layers and normalisation for one tensor of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.bare = nn.Linear(4, 6, bias=False)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.round = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(6)
        self.at = nn.MultiheadAttention(4, 2)


base = base_of(Net)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a file; a shape stands for ones."""

    def made(name: str = "lycoris_fc", **slots: Tensor | tuple[int, ...]) -> Path:
        tensors = {f"{name}.{slot.replace('__', '.')}": value for slot, value in slots.items()}
        ones = {key: torch.ones(value) if isinstance(value, tuple) else value for key, value in tensors.items()}
        save_file(ones, tmp_path / "file")
        return tmp_path / "file"

    return made


PAIR = {"lora_down__weight": (2, 4), "lora_up__weight": (6, 2)}
HADA = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4), "alpha": ()}
CORES = {"hada_w1_a": (2, 6), "hada_w1_b": (2, 4), "hada_w2_a": (2, 6), "hada_w2_b": (2, 4), "hada_t1": (2, 2, 3, 2)}


@pytest.mark.parametrize(
    ("name", "slots", "dialect"),
    [
        ("lora_unet_fc", PAIR, "kohya"),
        ("lycoris_fc", PAIR, "lycoris"),
        ("lora_unet_fc", PAIR | {"dora_scale": (6, 1)}, "lycoris"),
        ("lora_unet_fc", {"lora_down__weight": (2, 4, 3), "lora_up__weight": (6, 2, 1)}, "lycoris"),
        ("lora_te_fc", HADA, "lycoris"),
        ("lora_te_fc", {"diff": (6, 4)}, "lycoris"),
        ("own_fc", {"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, "lycoris"),
    ],
)
def test_the_keys_tell_the_dialect(name: str, slots: dict[str, tuple[int, ...]], dialect: str, write: Write) -> None:
    found = dialects.identify(write(name, **slots))
    assert found.dialect is dialects.DIALECTS[dialect]
    assert name in found.reason


def test_the_metadata_may_tell_the_dialect_and_other_networks_are_none(write: Write) -> None:
    path = write("lora_unet_fc", **PAIR)
    save_file(load_file(path), path, {"ss_network_module": "lycoris.kohya"})
    assert dialects.identify(path).dialect is dialects.DIALECTS["lycoris"]
    save_file({"x.a1.weight": torch.ones(2, 2), "x.diff": torch.ones(2)}, path)
    assert not dialects.is_adapter(path)


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ({"oft_blocks": (2, 2, 2)}, "'lycoris_fc.oft_blocks': OFT multiplies"),
        ({"weight": (6,), "on_input": ()}, "'lycoris_fc.on_input': (IA)3 multiplies"),
        ({"a1__weight": (2, 4)}, "'lycoris_fc.a1.weight': GLoRA multiplies"),
        ({"lambda_layer": (2,), **HADA}, "'lycoris_fc.lambda_layer': T-LoRA"),
        ({"bias_indices": (2, 3), **PAIR}, "'lycoris_fc.bias_indices': a sparse change"),
        (PAIR | {"scalar": ()}, "'lycoris_fc.scalar' is no slot of LoCon"),
        ({"dora_scale": (6, 1)}, "'lycoris_fc.dora_scale' is no key that LyCORIS knows"),
        ({"lora_down__weight": (2, 4)}, "'lycoris_fc': lora_up.weight is missing"),
        ({"diff_b": (6,), "w_norm": (6,)}, "'lycoris_fc.diff_b' is no slot of a normalisation layer"),
        ({"diff": (6,)}, "'lycoris_fc.diff' is (6,), the change of no weight"),
        ({"hada_w1_a": (6, 2)}, "'lycoris_fc': hada_w1_b is missing"),
        (HADA | {"hada_w2_b": (3, 4)}, "of shapes [(6, 2), (2, 4), (6, 2), (3, 4)] do not go together"),
        (HADA | {"hada_w2_a": (5, 2)}, "do not go together"),
        (HADA | {"hada_w2_b": (2, 2, 2)}, "do not go together"),
        (CORES, "one of hada_t1 and hada_t2 is missing"),
        (CORES | {"hada_t2": (2, 3, 3, 2)}, "do not go together"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (), "lokr_w2_b": (2, 2)}, "lokr_w2 is neither whole nor a pair"),
        ({"lokr_w1": (2, 2, 1, 1), "lokr_w2": (3, 2)}, "lokr_w1 is neither whole nor a pair"),
        ({"lokr_w1": (2, 2)}, "lokr_w2 is neither whole nor a pair"),
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 2), "lokr_w2_a": (3, 1)}, "lokr_w2 is neither whole nor a pair"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (2, 2)}, "lokr_w2 is neither whole nor a pair"),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)}, "do not go together"),
        (
            {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2), "lokr_t2": (2, 1, 3, 2)},
            "lokr_t2 is (2, 1, 3, 2), its factors have rank 2",
        ),
        (PAIR | {"dora_scale": torch.ones(6, 1, dtype=torch.int64)}, "'lycoris_fc.dora_scale' is I64"),
    ],
)
def test_a_tensor_without_a_form_is_refused_by_its_key(
    slots: dict[str, Tensor | tuple[int, ...]], says: str, write: Write, base: nn.Module
) -> None:
    refused(write(**slots), base, says, approximate=True)


@pytest.mark.parametrize(
    ("name", "slots", "says"),
    [
        (
            "lycoris_fc",
            HADA | {"hada_w1_b": (2, 5), "hada_w2_b": (2, 5)},
            "it changes a weight of (6, 5), 'fc.weight' of the base is (6, 4)",
        ),
        (
            "lycoris_conv",
            {"diff": (6, 4, 2, 3)},
            "'lycoris_conv.diff' has the kernel (2, 3), 'conv.weight' of the base (3, 2)",
        ),
        ("lycoris_conv", {**CORES, "hada_t1": (2, 2, 2, 3), "hada_t2": (2, 2, 2, 3)}, "hada_t1' has the kernel (2, 3)"),
        ("lycoris_conv", {"lokr_w1": (2, 2), "lokr_w2": (3, 2, 2, 3)}, "lokr_w2' has the kernel (2, 3)"),
        ("lycoris_fc", {**PAIR, "dora_scale": (1, 4)}, "'lycoris_fc.dora_scale' is (1, 4): lengths of the columns"),
        ("lycoris_fc", {"diff": (6, 4), "diff_b": (5,)}, "'lycoris_fc.diff_b' is (5,), 'fc.bias' of the base (6,)"),
        ("lycoris_fc", {"lokr_w1": (999, 999), "lokr_w2": (999, 999)}, "a weight of (998001, 998001)"),
        ("lycoris_fc", {"diff": torch.full((6, 4), torch.nan)}, "'lycoris_fc.diff' holds NaN"),
        ("lycoris_fc", {**PAIR, "dora_scale": ()}, "'lycoris_fc.dora_scale' is ()"),
        ("lycoris_at", PAIR, "'lycoris_at' is no layer of it"),
    ],
)
def test_a_tensor_that_does_not_fit_the_base_is_refused(
    name: str, slots: dict[str, tuple[int, ...]], says: str, write: Write, base: nn.Module
) -> None:
    refused(write(name, **slots), base, says, BaseMismatchError, approximate=True)


def test_products_are_offered_a_rank_that_is_exact(write: Write, base: nn.Module) -> None:
    assert "--approximate" in refused(write(**HADA), base, "'lycoris_fc': LoHa of rank 2; a pair of rank 4 is exact")
    kron = {"lokr_w1": (3, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}
    refused(write(**kron), base, "LoKr of rank 1; a pair of rank 2 is exact")


def test_two_whole_halves_have_the_scale_1(write: Write, base: nn.Module) -> None:
    path = write(lokr_w1=torch.full((3, 2), 2.0), lokr_w2=torch.full((2, 2), 3.0), alpha=torch.tensor(7.0))
    adapter, report = read(path, base, approximate=True)
    target, factors = adapter.targets["fc.weight"], adapter.factors_of("fc.weight")
    assert (target.scale * factors["lora_B"] @ factors["lora_A"]).equal(torch.full((6, 4), 6.0))
    assert "tensor lycoris_fc.alpha: carried, not used: LyCORIS scales nothing by it here" in map(str, report.lines)


def test_alpha_0_is_r(write: Write, base: nn.Module) -> None:
    adapter, report = read(write(**PAIR, alpha=torch.tensor(0.0)), base)
    assert adapter.targets["fc.weight"].alpha == 2
    assert "setting lycoris_fc.alpha: changed, 0, which LyCORIS takes as r, 2" in map(str, report.lines)


def test_changes_of_biases_and_norms_are_added_to_the_bases(write: Write, base: nn.Module, tmp_path: Path) -> None:
    write(diff=(6, 4), diff_b=(6,))
    norm = {"lycoris_norm.w_norm": torch.full((6,), 0.5), "lycoris_norm.b_norm": torch.full((6,), 0.25)}
    save_file(load_file(tmp_path / "file") | norm, tmp_path / "file")
    adapter, report = read(tmp_path / "file", base)
    roles = {name: whole.role for name, whole in adapter.whole.items()}
    assert roles == {"fc.bias": "bias", "norm.weight": "norm", "norm.bias": "norm"}
    assert adapter.tensors["norm.weight"].equal(base.norm.weight + 0.5)  # type: ignore[union-attr,operator]
    assert adapter.tensors["fc.bias"].equal(base.fc.bias + 1)  # type: ignore[union-attr,operator]
    assert loraio.merge(base.state_dict(), adapter)["fc.weight"].equal(base.fc.weight + 1)  # type: ignore[union-attr,operator]
    assert all("at any strength" in line.how for line in report.lines if line.name.endswith(("norm", "_b")))


def test_deltas_without_a_place_are_refused(write: Write, base: nn.Module) -> None:
    refused(write("lycoris_bare", diff=(6, 4), diff_b=(6,)), base, "layer 'bare' of the base has no bias")
    path = write(**PAIR)
    save_file(load_file(path) | {"lycoris_nurm.w_norm": torch.ones(6)}, path)
    says = "'lycoris_nurm.w_norm': 'lycoris_nurm' is no module of it; did you mean 'lycoris_norm'?"
    refused(path, base, says, BaseMismatchError)
    refused(write("lycoris_norm", w_norm=(6,)), base, "it holds no layer's factors")


def test_rows_so_short_that_its_epsilon_matters_are_reported(write: Write, base: nn.Module, tmp_path: Path) -> None:
    path = write(**PAIR, dora_scale=(6, 1))
    _, report = read(path, base)
    assert not any("to the length" in line.how for line in report.lines)
    with torch.no_grad():
        base.fc.weight.mul_(1e-4)  # type: ignore[union-attr,operator]
    path = write(lora_down__weight=torch.zeros(2, 4), lora_up__weight=torch.zeros(6, 2), dora_scale=(6, 1))
    adapter, report = read(path, base)
    assert any("LyCORIS adds 1.2e-07 to the length of each row" in line.how for line in report.lines)
    assert any("LyCORIS adds" in line.how for line in write_lycoris(adapter, base, tmp_path / "out").lines)


def test_padding_that_its_forward_pass_ignores_is_reported_and_not_written(
    write: Write, base: nn.Module, tmp_path: Path
) -> None:
    path = write("lycoris_round", lora_down__weight=(2, 2, 3, 3), lora_up__weight=(4, 2, 1, 1))
    adapter, report = read(path, base)
    assert any("attached, it ignores the layer's padding_mode 'circular'" in line.how for line in report.lines)
    with pytest.raises(AdapterError, match="LyCORIS ignores the layer's padding_mode 'circular'"):
        write_lycoris(adapter, base, tmp_path / "out")


def test_alpha_0_is_written_as_a_whole_change(write: Write, base: nn.Module, tmp_path: Path) -> None:
    adapter = loraio.load(write(**PAIR), base=base)
    adapter = replace(adapter, targets={name: replace(t, alpha=0) for name, t in adapter.targets.items()})
    with pytest.raises(AdapterError, match="alpha is 0, which LyCORIS takes as r, 2; --as-full-delta writes it"):
        write_lycoris(adapter, base, tmp_path / "out")
    write_lycoris(adapter, base, tmp_path / "out", as_full_delta=True)
    assert load_file(tmp_path / "out")["lycoris_fc.diff"].equal(torch.zeros(6, 4))
    with pytest.raises(AdapterError, match="its whole change is that of a base"):
        LYCORIS.encode(adapter, Context(network=base, options=Options(as_full_delta=True)))


def test_a_replaced_tensor_without_a_place_is_lost(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    config = loraio.TrainConfig(digit=0, targets=("all",), rank=1, norm="affine")
    adapter = loraio.new_adapter(model, config)
    assert {line.name for line in write_lycoris(adapter, model, tmp_path / "out").lost} == {
        f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_a_base_with_a_module_named_as_a_part_of_a_pipeline_is_none(tmp_path: Path) -> None:
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)})
    adapter = loraio.new_adapter(model, loraio.TrainConfig(digit=0, targets=("transformer.fc",), rank=1))
    for dialect, key in (("lycoris", "lycoris_transformer_fc.alpha"), ("kohya", "lora_unet_transformer_fc.alpha")):
        made = dialects.DIALECTS[dialect].encode(adapter, Context(network=model))
        assert key in made.tensors
    made = dialects.DIALECTS["diffusers"].encode(adapter, Context(network=model))
    assert "unet.transformer.fc.lora_A.weight" in made.tensors


def test_the_nearest_pair_is_no_farther_than_the_singular_values_say() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    pair = nearest_pair(whole(matrix), 2)
    assert pair.rank == 2
    assert pair.note == "approximated at rank 2, relative Frobenius error 0.218"
    assert nearest_pair(whole(matrix), 3).note == "a pair of rank 3 that gives the same change"
