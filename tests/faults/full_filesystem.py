"""Writes onto a small filesystem that is full but for a few pages, and onto one that is read-only.

usage: unshare -rm python full_filesystem.py FOLDER; prints, for each function, how many times its output did not fit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import loraio
from loraio.errors import OutputError
from loraio.files import tensorfile

SHIPPED = Path(__file__).parents[2] / "adapters"

Write = Callable[[Path, bool], Any]


def cases(folder: Path) -> dict[str, tuple[str, Write]]:
    """The name of the output, and what writes it: the new one or an older one, onto nothing or over another."""
    base, three, seven = (SHIPPED / f"{name}.safetensors" for name in ("base", "digit-3", "digit-7"))
    adapters = {True: loraio.load(three), False: replace(loraio.load(three), training={"note": "older"})}
    model = loraio.load_base(base)
    strength, files = {True: 1.0, False: 0.5}, {True: [three, seven], False: [seven]}
    state = loraio.read_base(base).state
    (folder / "parts").mkdir()
    places = {name: f"a-{n % 2 + 1}-of-2.safetensors" for n, name in enumerate(state)}
    for file in set(places.values()):
        tensorfile.write({n: state[n] for n in state if places[n] == file}, folder / "parts" / file, metadata={})
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "parts/a.safetensors.index.json").write_text(index)
    return {
        "save": ("out", lambda path, new: loraio.save(adapters[new], path, overwrite=path.exists())),
        "save_base": (
            "out",
            lambda path, new: loraio.save_base(model, path, overwrite=path.exists(), training={"new": new}),
        ),
        "merge": (
            "out.safetensors",
            lambda path, new: loraio.merge_file(base, three, path, strength=strength[new], overwrite=path.exists()),
        ),
        "merge, sharded": (
            "out",
            lambda path, new: loraio.merge_file(
                folder / "parts", three, path, strength=strength[new], overwrite=path.exists()
            ),
        ),
        "convert to peft": (
            "out",
            lambda path, new: loraio.convert(files[new][0], path, to="peft", base=base, overwrite=path.exists()),
        ),
        "pack": ("out", lambda path, new: loraio.pack(files[new], path, overwrite=path.exists())),
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder that are not hidden."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def refusal(write: Write, path: Path) -> str:
    """The error of ours, in words; none, if the new output was written."""
    try:
        write(path, True)
    except OutputError as error:
        return str(error)
    return ""


def fill(path: Path, free: int) -> None:
    """Leave so many bytes free."""
    found = os.statvfs(path.parent)
    with path.open("wb") as file:
        file.write(bytes(max(0, found.f_bavail * found.f_frsize - free)))


def main(folder: Path) -> None:
    """Mount, and try all cases."""
    torch.set_num_threads(1)
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
    for name, (output, write) in cases(folder).items():
        place, filler = small / "place", small / "filler"
        path, failed = place / output, 0
        for over in (False, True):
            for pages in (0, 1, 2, 3, 5, 8, 13, 60, 110, 140):
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                if over:
                    write(path, False)
                old = contents(place)
                fill(filler, pages * 4096)
                error = refusal(write, path)
                if error:
                    failed += 1
                    assert "No space left on device" in error, error
                    assert str(path) in error, error
                    assert "free some room" in error, error
                    assert contents(place) == old, (name, pages)
                    assert not list(place.rglob(".*.tmp")), (name, pages)
                filler.unlink()
                write(path, True)
                assert not list(place.rglob(".*")), (name, pages)
        old = contents(place)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        error = refusal(write, path)
        assert "not writable" in error or "Read-only" in error, error
        assert contents(place) == old
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        print(f"{name}: {failed} did not fit")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
