"""Makes a file of every kind whose bytes are promised, and prints their digests.

`tests/unit/test_determinism.py` runs it in processes that differ in all that must make no difference:

    python tests/every_output.py FILES FOLDER SEED

FILES has base.safetensors and three.safetensors; SEED shuffles what the system lists of folders.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import loraio
from loraio.training.resuming import SideFile


class Killed(Exception):  # noqa: N818  # no error of the program
    """Stands for a kill."""


def shuffle_listings(seed: int) -> None:
    """Let folders be listed in an order of their own, as on other filesystems."""
    listdir, scandir, order = os.listdir, os.scandir, random.Random(seed)

    def shuffled_names(path: Any = ".") -> list[Any]:
        names = listdir(path)
        order.shuffle(names)
        return names

    @contextlib.contextmanager
    def shuffled_entries(path: Any = ".") -> Iterator[Iterator[os.DirEntry[Any]]]:
        with scandir(path) as found:
            entries = list(found)
        order.shuffle(entries)
        yield iter(entries)

    os.listdir, os.scandir = shuffled_names, shuffled_entries  # type: ignore[assignment]


def train(files: Path, folder: Path) -> None:
    """Adapters of each kind, of a run that was killed and resumed, and of two digits in turn."""
    digits = loraio.load_dataset("digits", "train")
    few = replace(digits, images=digits.images[:80], labels=digits.labels[:80])
    base = loraio.load_base(files / "base.safetensors")
    config = loraio.TrainConfig(digit=3, rank=2, steps=4, batch_size=8, targets=("conv", "fc"))
    for kind in ("lora", "dora"):
        adapter = loraio.train(copy.deepcopy(base), replace(config, kind=kind), few)
        loraio.save(adapter, folder / f"{kind}.safetensors")
    side, real = folder / "side", SideFile.__call__

    def killed(self: SideFile, run: Any, moment: Any) -> bool:
        real(self, run, moment)
        if moment.step == 2:
            raise Killed
        return False

    SideFile.__call__ = killed  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        run_files = loraio.RunFiles(checkpoint=side, checkpoint_every=1, log=folder / "log.csv")
        loraio.train(copy.deepcopy(base), config, few, files=run_files)
    SideFile.__call__ = real  # type: ignore[method-assign]
    run_files = loraio.RunFiles(checkpoint=side, resume=True)
    loraio.save(loraio.train(copy.deepcopy(base), config, few, files=run_files), folder / "resumed.safetensors")
    side.unlink()
    (folder / "log.csv").unlink()
    for digit, adapter in loraio.train_each(copy.deepcopy(base), config, few, digits=(3, 7)).items():
        loraio.save(adapter, folder / f"each-{digit}.safetensors")
    loraio.save_base(base, folder / "base.safetensors")


def merge(files: Path, folder: Path, parts: Path) -> None:
    """Streamed with each number of workers, from a pickle in memory, and in parts."""
    base, adapter = files / "base.safetensors", files / "three.safetensors"
    for workers in (1, 2, 5):
        loraio.merge_file(base, adapter, folder / f"merged-{workers}.safetensors", workers=workers)
        loraio.merge_file(parts, adapter, folder / f"parted-{workers}", workers=workers, model="digit-cnn")
    torch.save(load_file(base), folder / "base.pt")
    loraio.merge_file(folder / "base.pt", adapter, folder / "pickle.safetensors", model="digit-cnn")
    (folder / "base.pt").unlink()
    loraio.merge_file(base, adapter, folder / "fast.safetensors", exact=False)
    for workers in (1, 2):
        loraio.merge_file(base, adapter, folder / f"kept-{workers}", reversible=True, workers=workers)
    loraio.unmerge_file(folder / "kept-1", folder / "unmerged", adapter=adapter)


def parted(files: Path, folder: Path) -> Path:
    """The base in two files."""
    state = load_file(files / "base.safetensors")
    folder.mkdir()
    places = {name: f"part-{len(name) % 2}.safetensors" for name in sorted(state)}
    for file in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    (folder / "base.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return folder


def convert(files: Path, folder: Path) -> None:
    """To each dialect, and back where a file comes back."""
    for dialect in ("peft", "lycoris", "kohya", "diffusers", "minlora", "loralib"):
        pickled = dialect in ("minlora", "loralib")
        made, alpha = folder / f"{dialect}{'.pt' if pickled else ''}", 6 if pickled else None
        loraio.convert(files / "three.safetensors", made, to=dialect, lossy=True)
        base = files / "base.safetensors"
        loraio.convert(made, folder / f"{dialect}-back", to="native", base=base, alpha=alpha)


def pack(files: Path, folder: Path, sources: Path) -> None:
    """Of a folder, and of files in any order."""
    sources.mkdir()
    for number in range(5):
        shutil.copy(files / "three.safetensors", sources / f"digit-{number}.safetensors")
    loraio.pack([sources], folder / "all.pack")
    loraio.pack([*sources.iterdir()], folder / "listed.pack")
    loraio.Bank(folder / "all.pack")


def main() -> None:
    """All of them."""
    files, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    shuffle_listings(seed)
    made = folder / "made"
    made.mkdir(parents=True)
    train(files, made)
    merge(files, made, parted(files, folder / "parts"))
    convert(files, made)
    pack(files, made, folder / "sources")
    found = {
        str(file.relative_to(made)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in made.rglob("*")
        if file.is_file()
    }
    sys.stdout.write(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
