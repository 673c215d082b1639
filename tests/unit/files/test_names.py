"""Names: what a line shows of them, and folders of ours in whose place a link stands.

Packs, banks and parts have the tests of the names that they refuse.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loraio.errors import OutputError
from loraio.files.folders import working_folder
from loraio.files.names import name_key, shown
from loraio.merging.finished_shards import FinishedShards


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain größe 数 👩", "plain größe 数 👩"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066\u200b\ufeff\x9b2J", "\\u2066\\u200b\\ufeff\\x9b2J"),
        ("\udcff\U000e0041", "\\udcff\\U000e0041"),
    ],
)
def test_what_is_no_printable_character_is_escaped(text: str, line: str) -> None:
    assert shown(text) == line
    assert shown(line) == line


@pytest.mark.parametrize(
    ("a", "b"), [("É", "e\u0301"), ("\u017f", "S"), ("a\u200db", "AB"), ("\u212a", "k"), ("ß", "SS")]
)
def test_what_some_systems_take_for_one_name_has_one_key(a: str, b: str) -> None:
    assert name_key(a) == name_key(b)


def test_a_link_in_the_place_of_a_working_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (tmp_path / ".out.merging").symlink_to(outside, target_is_directory=True)
    with pytest.raises(OutputError, match="is a link"), working_folder(tmp_path / "out"):
        pass
    assert (outside / "mine").read_text() == "mine"


def test_a_link_in_a_working_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("{}")
    work = tmp_path / "work"
    work.mkdir()
    (work / "receipt.json").symlink_to(tmp_path / "outside")
    (work / "a.safetensors").write_bytes(b"part")
    parts = FinishedShards(work, {})
    (work / "a.safetensors").write_bytes(b"part")
    parts.add("a.safetensors", [], {})
    assert (tmp_path / "outside").read_text() == "{}"
    assert (work / "receipt.json").is_file()
