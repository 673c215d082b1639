"""Packs give their files back byte for byte, read one without the others, and trust no index unchecked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from sealing import resealed

import loraio
from loraio.errors import ConfigError, FormatError, MissingFileError, OutputError, OutputExistsError, UnknownNameError
from loraio.files import tensorfile
from loraio.files.names import name_problem
from loraio.formats.pack import read_index, read_member

Rewrite = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture
def packed(files: Path, tmp_path: Path) -> Path:
    """A pack of three and seven."""
    loraio.pack([files / "seven.safetensors", files / "three.safetensors"], tmp_path / "all.pack")
    return tmp_path / "all.pack"


def rewritten(path: Path, change: Rewrite) -> Path:
    """Give the pack another header: ``change`` gets the safetensors header and loraio's document."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["loraio"])
    change(header, document)
    header["__metadata__"]["loraio"] = json.dumps(document)
    text = json.dumps(header).encode()
    path.write_bytes(resealed(len(text).to_bytes(8, "little") + text) + data[8 + length :])
    return path


def renamed(path: Path, name: str) -> Path:
    """Give the member "three" another name."""

    def rename(header: dict[str, Any], document: dict[str, Any]) -> None:
        header[name] = header.pop("three")
        document["pack"][name] = document["pack"].pop("three")

    return rewritten(path, rename)


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


@pytest.mark.parametrize("names", [[], ["three"]])
def test_unpacked_files_are_the_packed_ones_byte_for_byte(
    names: list[str], packed: Path, files: Path, tmp_path: Path
) -> None:
    written = loraio.unpack(packed, tmp_path / "out", names=names)
    assert written == [tmp_path / f"out/{name}.safetensors" for name in names or ("seven", "three")]
    assert sorted(names_in(tmp_path / "out")) == [path.name for path in written]
    for path in written:
        assert path.read_bytes() == (files / path.name).read_bytes()


def test_a_folder_packs_its_adapters_and_ignores_bases(packed: Path, files: Path, tmp_path: Path) -> None:
    assert list(loraio.pack([files], tmp_path / "folder.pack").members) == ["seven", "three"]
    assert (tmp_path / "folder.pack").read_bytes() == packed.read_bytes()  # whatever the order


def test_the_safetensors_library_reads_a_pack_and_lays_it_out_the_same(packed: Path, files: Path) -> None:
    tensors = safetensors.torch.load_file(packed)
    assert bytes(tensors["three"].numpy()) == (files / "three.safetensors").read_bytes()
    text = tensorfile.read_header(packed).metadata["loraio"]
    assert safetensors.torch.save(tensors, metadata={"loraio": text}) == packed.read_bytes()


def test_one_member_is_read_without_the_bytes_of_the_others(
    packed: Path, three: loraio.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = read_index(packed)
    read: list[tuple[int, int]] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        read.append((offset, len(data)))
        return data

    monkeypatch.setattr(os, "pread", counted)
    bank = loraio.Bank(packed)
    assert read == []
    assert bank["three"] == three
    assert read == [(index.members["three"].begin, index.members["three"].size)]


def test_a_member_is_whole_if_all_others_are_overwritten(packed: Path, three: loraio.Adapter, files: Path) -> None:
    seven = read_index(packed).members["seven"]
    with packed.open("r+b") as file:
        file.seek(seven.begin)
        file.write(bytes(seven.size))
    index = read_index(packed)
    assert read_member(index, "three") == (files / "three.safetensors").read_bytes()
    with pytest.raises(FormatError, match=r"'seven' is damaged: its bytes have another digest"):
        read_member(index, "seven")
    assert loraio.Bank(packed)["three"] == three


def test_an_unknown_member_gets_the_nearest_name_and_nothing_is_written(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'three'"):
        loraio.unpack(packed, tmp_path / "out", names=["seven", "thre"])
    assert not (tmp_path / "out").exists()


def test_existing_files_are_kept_unless_told_otherwise(packed: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "three.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"1 of 2 files exist\n  .*three"):
        loraio.unpack(packed, tmp_path)
    assert not (tmp_path / "seven.safetensors").exists()
    loraio.unpack(packed, tmp_path, overwrite=True)
    assert (tmp_path / "three.safetensors").read_bytes() == (files / "three.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="exists"):
        loraio.pack([files], packed)


def test_only_adapters_go_into_a_pack(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"base.safetensors' is not an adapter"):
        loraio.pack([files / "base.safetensors"], tmp_path / "all.pack")
    with pytest.raises(MissingFileError, match="does not exist"):
        loraio.pack([tmp_path / "none.safetensors"], tmp_path / "all.pack")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to pack"):
        loraio.pack([tmp_path / "empty"], tmp_path / "all.pack")
    assert not (tmp_path / "all.pack").exists()


def test_an_input_is_never_the_output(files: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((files / "three.safetensors").read_bytes())
    with pytest.raises(OutputExistsError, match="also an input"):
        loraio.pack([tmp_path / "a.safetensors"], tmp_path / "a.safetensors", overwrite=True)


def test_names_that_some_systems_take_for_one_are_refused_together(files: Path, tmp_path: Path) -> None:
    paths = []
    for number, name in enumerate(("A", "a", "e\u0301", "\u00e9", "\u00c9")):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(folder / f"{name}.safetensors")
        paths[-1].write_bytes((files / "three.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="'A' and 'a' are one name") as caught:
        loraio.pack(paths, tmp_path / "all.pack")
    assert len(caught.value.problems) == 2
    loraio.pack([paths[0], paths[2]], tmp_path / "all.pack")
    assert list(read_index(tmp_path / "all.pack").members) == ["A", "\u00e9"]  # in normal form C


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "/x", "a/b", "a\\b", "..\\x", "C:x", "a\0", "a\n", " a", "a ", "a.", ".a", "-a",
        "a" * 201, "e\u0301", "a*", "con", "NUL", "Aux.v2", "com1", "LPT\u00b2", "a\u202eb", "a\u200bb",
        "\ufeffa", "a\u2028b", "a\x1b[2J",
    ],
)  # fmt: skip
def test_a_name_that_is_no_file_name_everywhere_is_refused(packed: Path, name: str) -> None:
    assert name_problem(name)
    with pytest.raises(FormatError):
        read_index(renamed(packed, name))


@pytest.mark.parametrize(
    "name", ["a-b", "console", "null", "com", "com12", "a b", "größe", "\u0645\u06cc\u200c\u062e", "👩\u200d🔬"]
)
def test_other_names_are_fine(name: str, packed: Path, files: Path, tmp_path: Path) -> None:
    (file,) = loraio.unpack(renamed(packed, name), tmp_path / "out", names=[name])
    assert file.read_bytes() == (files / "three.safetensors").read_bytes()
    assert names_in(tmp_path / "out") == [f"{name}.safetensors"]


def test_links_in_the_folder_are_not_written_through(packed: Path, tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    for target in (outside, tmp_path / "not there"):
        (folder / "three.safetensors").symlink_to(target)
        for overwrite, error in ((False, OutputExistsError), (True, OutputError)):
            with pytest.raises(error):
                loraio.unpack(packed, folder, overwrite=overwrite)
        assert names_in(folder) == ["three.safetensors"]
        (folder / "three.safetensors").unlink()
    assert outside.read_text() == "mine"
    assert not (tmp_path / "not there").exists()
    (folder / "three.safetensors").hardlink_to(outside)
    loraio.unpack(packed, folder, overwrite=True)
    assert outside.read_text() == "mine"
    loraio.unpack(packed, tmp_path / "again", names=["three"])
    (tmp_path / "named").symlink_to(tmp_path / "again", target_is_directory=True)  # the folder itself the user names
    loraio.unpack(packed, tmp_path / "named", names=["seven"])
    assert len(names_in(tmp_path / "again")) == 2


def test_a_folder_or_file_in_the_place_of_the_other_is_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out/three.safetensors").mkdir(parents=True)
    with pytest.raises(OutputError, match="is a folder"):
        loraio.unpack(packed, tmp_path / "out", overwrite=True)
    assert names_in(tmp_path / "out") == ["three.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        loraio.unpack(packed, tmp_path / "file")


@pytest.mark.parametrize("there", ["Three", "THREE", "th\u200dree", "thr\u0435e"])
def test_a_file_of_nearly_the_same_name_is_never_replaced(there: str, packed: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{there}.safetensors"
    path.write_text("mine")
    if there == "thr\u0435e":  # a Cyrillic letter is another one to every system
        loraio.unpack(packed, tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3
    else:
        with pytest.raises(OutputExistsError, match="nearly the same names"):
            loraio.unpack(packed, tmp_path)
        with pytest.raises(OutputExistsError, match="are one name to some systems"):
            loraio.unpack(packed, tmp_path, overwrite=True)
        assert [file.name for file in tmp_path.glob("*.safetensors")] == [path.name]
    assert path.read_text() == "mine"


def test_a_file_in_the_other_normal_form_is_the_same_file(files: Path, tmp_path: Path) -> None:
    source = tmp_path / "caf\u00e9.safetensors"
    source.write_bytes((files / "three.safetensors").read_bytes())
    loraio.pack([source], tmp_path / "all.pack")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "cafe\u0301.safetensors").write_text("old")
    with pytest.raises(OutputExistsError, match="1 of 1 files exist"):
        loraio.unpack(tmp_path / "all.pack", folder)
    loraio.unpack(tmp_path / "all.pack", folder, names=["cafe\u0301"], overwrite=True)
    (file,) = folder.iterdir()
    assert file.read_bytes() == source.read_bytes()


def swap_offsets(header: dict[str, Any], _: dict[str, Any]) -> None:
    header["three"]["data_offsets"] = header["seven"]["data_offsets"]
    header["three"]["shape"] = header["seven"]["shape"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_offsets, "overlaps the one before"),
        (lambda h, d: h.pop("three"), "bytes follow the last tensor"),
        (lambda h, d: d["pack"].pop("three"), "'three' is there and not listed"),
        (lambda h, d: d["pack"].update(four="0" * 64), "'four' is listed and not there"),
        (lambda h, d: d["pack"].update(three="0" * 63), "not 64 hexadecimal digits"),
        (lambda h, d: d["pack"].update(three=None), "not 64 hexadecimal digits"),
        (lambda h, d: h["three"].update(dtype="I8"), "I8 of shape .* not a list of bytes"),
        (lambda h, d: h["three"].update(shape=[1, *h["three"]["shape"]]), "not a list of bytes"),
        (lambda h, d: d.update(format_version=3), "pack version 3, this loraio reads versions up to 2"),
        (lambda h, d: d.update(format_version=True), "pack version True"),
        (lambda h, d: d.update(pack=["three", "seven"]), "'pack' is not a JSON object"),
        (lambda h, d: d.pop("pack"), "not a pack of adapters"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(packed: Path, change: Rewrite, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_index(rewritten(packed, change))


def test_names_that_are_one_are_refused(packed: Path) -> None:
    data = packed.read_bytes()
    with pytest.raises(FormatError, match="'Seven' and 'seven' are one name"):
        read_index(renamed(packed, "Seven"))
    packed.write_bytes(data.replace(b'"seven":{"dtype"', b'"three":{"dtype"'))
    with pytest.raises(FormatError, match="occurs twice"):
        read_index(packed)


def test_an_adapter_or_base_is_no_pack_and_a_pack_is_no_adapter(packed: Path, files: Path) -> None:
    with pytest.raises(FormatError, match="not a pack of adapters but an adapter"):
        read_index(files / "three.safetensors")
    with pytest.raises(FormatError, match="not a pack of adapters but a base model"):
        loraio.Bank(files / "base.safetensors")
    with pytest.raises(FormatError, match="is not an adapter but a pack of them"):
        loraio.load(packed)


def test_a_pack_that_was_written_anew_is_not_read_by_the_old_index(packed: Path, files: Path) -> None:
    index = read_index(packed)
    loraio.pack([files / "three.safetensors"], packed, overwrite=True)
    with pytest.raises(FormatError, match="changed after its index was read"):
        read_member(index, "three")
    packed.unlink()
    with pytest.raises(MissingFileError, match="cannot be read"):
        read_member(index, "three")
