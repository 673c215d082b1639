"""Keep the heads of adapters in merged files and bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import outputs, same_bits
from torch import nn

import loraio
from loraio.errors import BaseMismatchError, FormatError
from loraio.files import tensorfile

STEPS: dict[str, Any] = {"steps": 6, "batch_size": 16, "rank": 2}


def test_a_merged_file_is_a_base_with_the_new_head(tmp_path: Path, digits: loraio.Dataset) -> None:
    # its head is a convolution
    base = loraio.build_network("torchvision:squeezenet1_1", args={"num_classes": 7}, seed=1)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rgb = replace(digits, images=digits.images[:64].expand(-1, 3, -1, -1), labels=digits.labels[:64])
    loraio.save_base(base, tmp_path / "base")
    config = loraio.TrainConfig(heads={"classifier.1": 10}, targets=("features.3.squeeze",), **STEPS)
    adapter = loraio.train(base, config, rgb)
    loraio.save(adapter, tmp_path / "adapter")
    loraio.merge_file(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = loraio.load_base(tmp_path / "merged")
    assert loraio.read_base(tmp_path / "merged").heads == {"classifier.1": 10}
    with loraio.attach(base, adapter):
        assert base.get_submodule("classifier.1").out_channels == 10
        assert same_bits(outputs(base, images), outputs(merged, images))
    loraio.save_base(merged, tmp_path / "again")
    assert loraio.read_base(tmp_path / "again").heads == {"classifier.1": 10}
    twelve = replace(rgb, classes=12, class_names=tuple(map(str, range(12))))
    second = loraio.train(merged, replace(config, heads={"classifier.1": 12}, seed=2), twelve)
    assert second.base.heads == {"classifier.1": 10}
    loraio.save(second, tmp_path / "second")
    loraio.merge_file(tmp_path / "merged", tmp_path / "second", tmp_path / "twice")
    assert loraio.load_base(tmp_path / "twice").get_submodule("classifier.1").out_channels == 12
    report = loraio.verify(merged.state_dict(), second, loraio.read_base(tmp_path / "twice").state, inputs=images)
    assert report.ok


@pytest.mark.parametrize("heads", [{"fc": 0}, {"fc": "10"}, ["fc"], {"nowhere": 3}])
def test_a_base_file_with_wrong_heads_is_refused(tmp_path: Path, base: nn.Module, heads: Any) -> None:
    document = {"format_version": 1, "network": "digit-cnn", "heads": heads}
    tensorfile.write(base.state_dict(), tmp_path / "base", document=document)
    with pytest.raises((FormatError, BaseMismatchError), match=r"heads are|no layer"):
        loraio.load_base(tmp_path / "base")
