"""Files and folders are opened by their content, and numbers are read from any container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import loraio
from loraio.errors import FormatError, MissingFileError
from loraio.formats import dialects
from loraio.formats.report import Report, settings, tensors
from loraio.formats.sources import open_source, source_of


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


def test_a_report_is_sorted_and_readable() -> None:
    lines = [*tensors(["b", "a"], "carried"), *settings(["c"], "lost", "nowhere")]
    report = Report.of(reversed(lines))
    assert Report.of(lines) == report
    assert [str(line) for line in report.lines] == [
        "tensor a: carried",
        "tensor b: carried",
        "setting c: has no place there, nowhere",
    ]
    assert report.to_json()[0] == {"what": "tensor", "name": "a", "fate": "carried", "how": ""}
