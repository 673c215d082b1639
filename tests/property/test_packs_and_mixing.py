"""Packs of any bytes are read or refused; a batch mixed at random is each of its samples alone."""

from __future__ import annotations

import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import names, states_and_adapters
from torch import nn

import loraio
from loraio.errors import LoraioError
from loraio.files.names import name_key, name_problem
from loraio.formats.pack import read_index, read_member
from loraio.serving import convolutions, mixed_batches

HOSTILE = settings(max_examples=250, deadline=None)


@pytest.fixture(scope="module")
def valid(files: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a pack of two."""
    path = tmp_path_factory.mktemp("valid") / "all.pack"
    loraio.pack([files / "three.safetensors", files / "seven.safetensors"], path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "some.pack"


def read_all(path: Path, content: bytes) -> dict[str, bytes]:
    """The members that can be read; an error is ours and names the file."""
    path.write_bytes(content)
    found, errors = {}, []
    try:
        index = read_index(path)
        for name in index.members:
            try:
                found[name] = read_member(index, name)
            except LoraioError as error:
                errors.append(str(error))
    except LoraioError as error:
        errors.append(str(error))
    assert all(repr(str(path)) in error for error in errors)
    return found


@HOSTILE
@given(st.data())
def test_a_pack_with_changed_bytes_gives_what_was_packed_or_nothing(
    valid: bytes, path: Path, data: st.DataObject
) -> None:
    original = read_all(path, valid)
    assert original.keys() == {"seven", "three"}
    header = 8 + int.from_bytes(valid[:8], "little")
    places = st.integers(0, header + 20) | st.integers(0, len(valid) - 1)
    content = bytearray(valid)
    for position, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[position] = value
    for found in read_all(path, bytes(content)).values():  # the name may be another, the bytes may not
        assert found in original.values()


@HOSTILE
@given(st.data())
def test_a_pack_with_bytes_cut_out_or_put_in_is_refused(valid: bytes, path: Path, data: st.DataObject) -> None:
    begin, end = (data.draw(st.integers(0, len(valid))) for _ in range(2))
    content = valid[:begin] + data.draw(st.binary(max_size=12)) + valid[end:]
    if len(content) != len(valid):
        assert read_all(path, content) == {}


@HOSTILE
@given(st.lists(names, min_size=1, max_size=6, unique=True))
def test_any_names_pack_and_unpack_or_are_refused(files: Path, names: list[str]) -> None:
    data = (files / "three.safetensors").read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "in"
        folder.mkdir()
        possible = [name for name in names if "/" not in name and "\0" not in name and len(name.encode()) < 200]
        plain = [unicodedata.normalize("NFC", name) for name in possible]
        sources = [folder / f"{name}.safetensors" for name in possible]
        for source in sources:
            source.write_bytes(data)
        distinct = len({name_key(name) for name in plain}) == len(plain)
        fine = bool(plain) and distinct and not any(name_problem(name) for name in plain)
        try:
            index = loraio.pack(sources, Path(temporary) / "all.pack")
        except LoraioError:
            assert not fine
            return
        assert fine
        unpacked = loraio.unpack(index.path, Path(temporary) / "out")
        assert [file.read_bytes() for file in unpacked] == [data] * len(possible)
        assert len(loraio.Bank(index.path)) == len(possible) == len(index.members)


@settings(max_examples=60, deadline=None)
@given(states_and_adapters())
def test_any_adapter_comes_out_of_a_bank_as_it_went_in(drawn: tuple[dict[str, torch.Tensor], loraio.Adapter]) -> None:
    adapter = drawn[1]
    with tempfile.TemporaryDirectory() as folder:
        loraio.save(adapter, Path(folder) / "one.safetensors")
        loraio.pack([folder], Path(folder) / "all.pack")
        for source in (folder, Path(folder) / "all.pack", {"one": adapter}):
            assert loraio.Bank(source)["one"] == adapter


class Small(nn.Module):
    """Plain, depthwise and one-by-one convolutions, then a linear layer."""

    def __init__(self, width: int, kernel: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, width, kernel, stride, padding=kernel // 2, bias=bias)
        self.b = nn.Conv2d(width, width, 3, groups=width, padding=1)
        self.c = nn.Conv2d(width, 6, 1, bias=bias)
        self.d = nn.Linear(6, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.d(self.c(torch.relu(self.b(self.a(x)))).mean((2, 3)))
        return logits


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_batch_mixed_at_random_is_each_of_its_samples_alone(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 2, 3, 5])), data.draw(st.integers(1, 3))]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = Small(*shape, bias=data.draw(st.booleans())).eval()
    adapters = {}
    for name in "abcd"[: data.draw(st.integers(1, 4))]:
        targets = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
        rank = data.draw(st.integers(1, 5))
        config = loraio.TrainConfig(
            targets=tuple(targets), rank=rank, clamp_rank=True, alpha=data.draw(st.integers(1, 9))
        )
        plain = loraio.new_adapter(model, config)
        adapters[name] = replace(plain, factors={key: torch.randn_like(one) for key, one in plain.factors.items()})
    bank = loraio.Bank(adapters)
    chosen = data.draw(st.lists(st.sampled_from([None, *adapters]), min_size=1, max_size=12))
    strengths = [data.draw(st.sampled_from([1.0, 0.5, -2.0, 0.0])) for _ in chosen]
    x = torch.randn(len(chosen), 2, 6, data.draw(st.integers(4, 7)))
    rows = []
    with torch.no_grad():
        for row, (name, strength) in enumerate(zip(chosen, strengths, strict=True)):
            if name is None:
                rows.append(model(x[row : row + 1]))
            else:
                with bank.attach(model, name, strength):
                    rows.append(model(x[row : row + 1]))
    expected = torch.cat(rows)
    for layers, spared in ((True, 0), (True, 1 << 40), (False, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixed_batches, "takes_layers", lambda *_, layers=layers: layers)
            patch.setattr(convolutions, "SPARED_BYTES", spared)
            found = bank.forward(model, x, chosen, strength=strengths)
        # a row may cancel to less than its terms: the tolerance is of the largest output
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1)
