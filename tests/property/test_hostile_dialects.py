"""Files of other tools with any of their keys, of any shape: they are read, or refused by an error of loraio's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import nn

from loraio.errors import LoraioError
from loraio.formats import loading
from loraio.formats.foreign import Options

SLOTS = [
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"),
    *("diff", "diff_b", "w_norm", "b_norm"),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora.down.weight", "lora.up.weight"),
    *("processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight", "oft_blocks", "on_input", "a1.weight"),
]

NAMES = ["lycoris_fc", "lycoris_conv", "lora_unet_fc", "lora_unet_conv", "unet.fc", "unet.conv", "lora_te_norm", ""]

ANY_TIME = settings(deadline=None)

shapes = st.lists(st.sampled_from([0, 1, 2, 4]), max_size=4).map(tuple)

files = st.dictionaries(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(SLOTS)).map(lambda pair: f"{pair[0]}.{pair[1]}"),
    shapes,
    max_size=6,
)

pairs = st.tuples(st.sampled_from(NAMES), st.sampled_from([("hada_", 2), ("lokr_", 2), ("lora_", 2)])).flatmap(
    lambda one: st.fixed_dictionaries(
        {f"{one[0]}.{slot}": shapes for slot in SLOTS if slot.startswith(one[1][0]) and slot.count(".") < 2}
    )
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "file"


def base() -> nn.Module:
    parts = {"fc": nn.Linear(4, 4), "conv": nn.Conv2d(2, 4, (1, 2)), "norm": nn.LayerNorm(4), "attn": nn.Linear(2, 2)}
    return nn.ModuleDict(parts)


def read(shapes_of: Mapping[str, tuple[int, ...]], path: Path) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes_of.items()}, path)
    try:
        _, report = loading.load_reported(path, base=base(), options=Options(approximate=True, lossy=True))
    except LoraioError:  # anything else is a failure
        return
    assert report is not None
    assert {line.name for line in report.lines if line.what == "tensor"} == set(shapes_of)


@ANY_TIME
@given(shapes_of=files)
def test_any_keys_are_read_or_refused(shapes_of: dict[str, tuple[int, ...]], path: Path) -> None:
    read(shapes_of, path)


@ANY_TIME
@given(shapes_of=pairs)
def test_any_shapes_of_one_method_are_read_or_refused(shapes_of: dict[str, tuple[int, ...]], path: Path) -> None:
    read(shapes_of, path)
