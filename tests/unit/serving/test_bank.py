"""A bank: names, files that change, the bound on memory, errors that change nothing, and threads."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import loraio
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FormatError,
    MissingFileError,
    StateError,
    UnknownNameError,
)
from loraio.files import tensorfile
from loraio.formats.native import to_document
from loraio.serving import sources


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    """A folder with three and seven."""
    for name in ("three", "seven"):
        (tmp_path / f"{name}.safetensors").write_bytes((files / f"{name}.safetensors").read_bytes())
    return tmp_path


@pytest.fixture
def data(files: Path) -> bytes:
    """The bytes of an adapter's file."""
    return (files / "three.safetensors").read_bytes()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The file name of every adapter that is read from now on."""
    seen: list[str] = []
    load = sources.load_bytes

    def counted(data: bytes, path: Path | str) -> loraio.Adapter:
        seen.append(Path(path).name)
        return load(data, path)

    monkeypatch.setattr(sources, "load_bytes", counted)
    return seen


def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(images)
    return result


def make_pack(path: Path) -> Path:
    loraio.pack([path], path / "all.pack")
    return path / "all.pack"


def make_mapping(path: Path) -> dict[str, loraio.Adapter | Path]:
    return {"three": loraio.load(path / "three.safetensors"), "seven": path / "seven.safetensors"}


SOURCES = [Path, make_pack, make_mapping]


@pytest.mark.parametrize("make", SOURCES)
def test_a_bank_swaps_and_attaches_the_adapters_of_its_source_by_name(
    make: Callable[[Path], Path],
    folder: Path,
    base: nn.Module,
    three: loraio.Adapter,
    seven: loraio.Adapter,
    digits_test: loraio.Dataset,
) -> None:
    bank, images = loraio.Bank(make(folder)), digits_test.images[:16]
    assert (len(bank), bank.names, list(bank)) == (2, ("seven", "three"), ["seven", "three"])
    assert "three" in bank
    assert (bank["three"], bank["seven"]) == (three, seven)
    assert bank["three"] is bank["three"]
    live = bank.swap(base, "three")
    assert bank.swap(base, "seven") is live
    found = outputs(base, images)
    live.detach()
    with bank.attach(base, "seven"):
        assert outputs(base, images).equal(found)
    with bank.attach(base, "seven", 0.5):
        assert not outputs(base, images).equal(found)
    for call in (lambda: bank["thre"], lambda: bank.swap(base, "thre"), lambda: bank.attach(base, "thre")):
        with pytest.raises(UnknownNameError, match="did you mean 'three'"):
            call()


@pytest.mark.parametrize(
    "name", ["../secret", "/secret", "sub/three", "three.safetensors", "", "\0", ".hidden", "link"]
)
def test_a_name_never_becomes_a_path(folder: Path, data: bytes, name: str) -> None:
    inner = folder / "inner"
    (inner / "sub").mkdir(parents=True)
    for path in (folder / "secret", inner / "sub/three", inner / ".hidden", inner / "three"):
        path.with_name(f"{path.name}.safetensors").write_bytes(data)
    (inner / "link.safetensors").symlink_to(folder / "secret.safetensors")
    bank = loraio.Bank(inner)
    assert bank.names == ("three",)
    with pytest.raises(UnknownNameError):
        bank[name]


def test_a_file_that_became_a_link_or_a_pipe_is_not_read(folder: Path, files: Path) -> None:
    bank = loraio.Bank(folder)
    path = folder / "three.safetensors"
    for replace_file in (lambda: path.symlink_to(files / "three.safetensors"), lambda: os.mkfifo(path)):
        path.unlink()
        replace_file()
        with pytest.raises(FormatError, match="adapter 'three': not a plain file any more"):
            bank["three"]


def test_names_that_differ_in_case_or_normal_form_are_refused_by_name(
    folder: Path, data: bytes, base: nn.Module
) -> None:
    for name in ("Seven", "caf\u00e9", "nai\u0308ve"):
        (folder / f"{name}.safetensors").write_bytes(data)
    if (folder / "seven.safetensors").read_bytes() == data:
        pytest.skip("a file system that knows no case")
    bank = loraio.Bank(folder)
    assert bank.names == ("caf\u00e9", "na\u00efve", "three")  # all in normal form C
    assert bank["na\u00efve"] == bank["three"]
    assert "nai\u0308ve" in bank  # found in either form, wherever it is asked for
    assert bank["nai\u0308ve"] == bank["na\u00efve"]
    given = loraio.Bank({"nai\u0308ve": bank["three"]})
    assert given.names == ("na\u00efve",)
    image = torch.rand(2, 1, 28, 28)
    outputs = given.forward(base, image, ["nai\u0308ve", "na\u00efve"])
    assert outputs.equal(bank.forward(base, image, ["three", "three"]))
    for name in ("seven", "Seven"):
        assert name not in bank
        with pytest.raises(ConfigError, match=f"adapter '{name}' cannot be used: 'Seven' and 'seven' are one name"):
            bank[name]


def test_a_changed_file_is_read_again_and_checked_again(
    folder: Path, seven: loraio.Adapter, base: nn.Module, reads: list[str]
) -> None:
    bank = loraio.Bank(folder)
    live = bank.swap(base, "three")
    loraio.save(seven, folder / "three.safetensors", overwrite=True)
    assert bank.swap(base, "three").adapter == seven
    assert len(reads) == 2
    (folder / "three.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"adapter 'three': 7 bytes are too few[\s\S]*three.safetensors"):
        bank.swap(base, "three")
    assert live.adapter == seven


def test_files_that_come_and_go(folder: Path, files: Path, base: nn.Module) -> None:
    bank = loraio.Bank(folder)
    live = bank.swap(base, "three")
    (folder / "three.safetensors").rename(folder / "four.safetensors")
    with pytest.raises(MissingFileError, match="adapter 'three': its file is gone"):
        bank.swap(base, "three")
    assert "four" not in bank
    bank.refresh()
    assert bank.names == ("four", "seven")
    assert bank.swap(base, "four") is live
    with pytest.raises(UnknownNameError, match="three"):
        bank["three"]
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(MissingFileError):
        bank.refresh()
    assert len(bank) == 2


def test_a_pack_that_was_written_anew_needs_a_refresh(folder: Path, three: loraio.Adapter) -> None:
    bank = loraio.Bank(make_pack(folder))
    assert bank["three"] == three
    loraio.pack([folder / "three.safetensors"], folder / "all.pack", overwrite=True)
    with pytest.raises(FormatError, match="changed after its index was read"):
        bank["three"]
    bank.refresh()
    assert bank.names == ("three",)
    assert bank["three"] == three


def test_a_bad_file_leaves_the_old_adapter_working(
    folder: Path, base: nn.Module, three: loraio.Adapter, data: bytes, digits_test: loraio.Dataset
) -> None:
    images = digits_test.images[:8]
    target = replace(three.targets["conv1.weight"], base_sha256="0" * 64)
    foreign = replace(three, targets={**three.targets, "conv1.weight": target})
    loraio.save(foreign, folder / "foreign.safetensors")
    loraio.save_base(base, folder / "base.safetensors")
    (folder / "cut.safetensors").write_bytes(data[:-1])
    (folder / "damaged.safetensors").write_bytes(data[:-4] + b"\xff\xff\xff\x7f")
    factors = {name: factor * math.nan for name, factor in three.factors.items()}
    tensorfile.write(factors, folder / "nan.safetensors", document=to_document(three))
    bank = loraio.Bank(folder)
    live = bank.swap(base, "three")
    before = outputs(base, images)
    for name, error in (
        ("foreign", BaseMismatchError),
        ("base", FormatError),
        ("cut", FormatError),
        ("damaged", FormatError),
        ("nan", AdapterError),
        ("none", UnknownNameError),
    ):
        with pytest.raises(error):
            bank.swap(base, name)
        assert outputs(base, images).equal(before), name
        assert live.adapter == three


def test_adapters_in_memory_stay_within_the_bound_and_the_least_recently_used_goes_first(
    folder: Path, base: nn.Module, three: loraio.Adapter, data: bytes, reads: list[str]
) -> None:
    for name in "abcd":
        (folder / f"{name}.safetensors").write_bytes(data)
    size = sum(factor.nbytes for factor in three.factors.values())
    bank = loraio.Bank(folder, max_bytes=2 * size + size // 2)
    assert reads == []
    for name in "abacab":
        bank.swap(base, name)
        assert bank.resident_bytes <= bank.max_bytes
    assert reads == [f"{name}.safetensors" for name in "abcb"]
    assert bank.resident_bytes == 2 * size
    tight = loraio.Bank(folder, max_bytes=size - 1)
    assert tight["a"] == tight["a"] == three
    assert tight.resident_bytes == 0


def test_folded_weights_stay_within_the_bound_too_and_go_with_their_model(
    folder: Path, base: nn.Module, digits_test: loraio.Dataset
) -> None:
    images = digits_test.images[:6]
    bank = loraio.Bank(folder)
    expected = bank.forward(base, images, ["three", "seven", None] * 2)
    factors = sum(factor.nbytes for name in bank for factor in bank[name].factors.values())
    folded = bank.resident_bytes - factors
    assert folded > 4 * 300_000
    for bound in (0, factors, factors + folded // 2, factors + folded):
        small = loraio.Bank(folder, max_bytes=bound)
        for _ in range(2):
            assert torch.allclose(small.forward(base, images, ["three", "seven", None] * 2), expected, atol=1e-4)
            assert small.resident_bytes <= bound
    copied = copy.deepcopy(base)
    bank.forward(copied, images, ["three", "seven", None] * 2)
    assert bank.resident_bytes > factors + folded
    del copied
    assert bank.resident_bytes == factors + folded


def test_a_wrong_bound_and_a_missing_source_are_refused(folder: Path, tmp_path: Path) -> None:
    for bound in (-1, 1.5, True, "1"):
        with pytest.raises(ConfigError, match="max_bytes"):
            loraio.Bank(folder, max_bytes=bound)  # type: ignore[arg-type]
    with pytest.raises(MissingFileError):
        loraio.Bank(tmp_path / "none")


def test_nothing_of_a_swap_grows_with_the_number_of_names(
    folder: Path, base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: with 500 names as with 2, a swap looks at one file and lists nothing."""
    for number in range(500):
        (folder / f"n{number}.safetensors").write_bytes(b"")
    bank = loraio.Bank(folder)
    assert len(bank) == 502
    bank.swap(base, "three")
    calls: list[object] = []
    for name in ("stat", "scandir", "listdir", "open"):
        real = getattr(os, name)

        def counted(*args: object, real: Callable[..., object] = real, **options: object) -> object:
            calls.append(args[0])
            return real(*args, **options)

        monkeypatch.setattr(os, name, counted)
    bank.swap(base, "seven")
    assert {Path(str(call)).name for call in calls} == {"seven.safetensors"}


def test_eight_threads_swap_and_mix_on_their_own_models_from_one_bank(
    folder: Path, trained_base: nn.Module, digits_test: loraio.Dataset
) -> None:
    """There is room for only some of the adapters, so that eviction and reading go on all the time."""
    images, names = digits_test.images[:9], ["three", "seven", None] * 3
    alone, reference = copy.deepcopy(trained_base), loraio.Bank(folder)
    expected: dict[str | None, torch.Tensor] = {None: outputs(alone, images)}
    for name in ("three", "seven"):
        with reference.attach(alone, name):
            expected[name] = outputs(alone, images)
    mixed = torch.stack([expected[name][row] for row, name in enumerate(names)])
    bank = loraio.Bank(folder, max_bytes=1_000_000)
    problems: list[object] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        model = copy.deepcopy(trained_base)
        start.wait()
        try:
            for turn in range(8):
                name = ("three", "seven")[(turn + seed) % 2]
                live = bank.swap(model, name)
                if not outputs(model, images).equal(expected[name]):
                    problems.append((seed, turn, name))
                live.detach()
                if not torch.allclose(bank.forward(model, images, names), mixed, atol=1e-4):
                    problems.append((seed, turn, "mixed"))
                if turn % 5 == seed % 5:
                    bank.refresh()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert bank.resident_bytes <= bank.max_bytes


def test_swap_on_a_model_whose_parts_carry_adapters_is_refused(folder: Path, base: nn.Module) -> None:
    bank = loraio.Bank(folder)
    both = nn.ModuleDict({"a": base, "b": copy.deepcopy(base)})
    for part in both.values():
        bank.attach(part, "three")
    with pytest.raises(StateError, match="carries an adapter already"):
        bank.swap(both, "three")
