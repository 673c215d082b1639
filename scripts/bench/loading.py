"""How long does it take to load an adapter file and attach it to a fresh model, against reading its tensors?

usage: python scripts/bench/loading.py [--networks NAME ...] [--rounds N] [--json]

Rank 8 on every convolution and linear layer, float32, one thread; what it is against is ``load_file`` of safetensors
on the same file. A fresh model is a copy of the base that was never looked at. Beside it: a model fresh from
`loraio.load_base`, which compared its tensors with the digests in their file; the same model a second time, when the
digests are remembered; PEFT's `PeftModel.from_pretrained` of the folder that it saves itself; and
minLoRA's parametrizations with the factors loaded into them. The share of the time in which the base is hashed, and
that in which the file is read and checked, are figures of their own; neither peer looks at the base at all.

Before any time is taken, the outputs of all are compared with those of the merged network.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _contestants import (
    add_minlora,
    built,
    drawn,
    left_out,
    merged,
    minlora_state,
    peer,
    peft_folder,
    require_outputs,
    ungrouped,
)
from _paired import NETWORKS, Measured, interleaved, ratios, require, run_networks, short
from safetensors.torch import load_file, save_file
from torch import nn

import loraio
from loraio.bases.identity import digests
from loraio.live.base_state import base_state_dict

ROW = "loading"
BASELINE = "load_file"
AGAIN, FROM_FILE = "loraio, same model again", "loraio, from load_base"
HASHING, READING = "hashing the base", "reading and checking the file"
TARGET = 10.0
ROUNDS = {"digit-cnn": 200, "torchvision:mobilenet_v3_small": 40, "torchvision:resnet50": 20}


def measure_one(network: str, folder: Path, count: int, clock: Callable[[], float]) -> Measured:
    """One network."""
    model, case, notes = built(network).requires_grad_(False), short(network), []
    adapter = drawn(model)
    file = folder / "adapter.safetensors"
    loraio.save(adapter, file)
    require(loraio.load(file) == adapter, f"{case}: the file holds another adapter")
    x = torch.rand(2, *NETWORKS[network], generator=torch.Generator().manual_seed(1))

    def fresh() -> nn.Module:
        return copy.deepcopy(model)

    def ours(other: nn.Module) -> loraio.Attachment:
        return loraio.attach(other, loraio.load(file))

    again = fresh()
    held = {"live": ours(again)}

    def once_more(_: None) -> None:
        held["live"] = ours(again)

    state = base_state_dict(model)
    works: dict[str, Callable[..., Any]] = {
        BASELINE: lambda: load_file(file),
        "loraio": ours,
        FROM_FILE: ours,
        AGAIN: once_more,
        HASHING: lambda: digests(state),
        READING: lambda: loraio.load(file),
    }
    before: dict[str, Callable[[], Any]] = {
        "loraio": fresh,
        FROM_FILE: lambda: loraio.load_base(folder / "base.safetensors"),
        AGAIN: lambda: held["live"].detach(),
    }
    expected = merged(model, adapter)(x)
    loraio.save_base(model, folder / "base.safetensors", overwrite=True)
    for who in ("loraio", FROM_FILE):
        other = before[who]()
        ours(other)
        require_outputs(other(x), expected, what=f"{case}, {who}", tolerance=0)
    require_outputs(again(x), expected, what=f"{case}, {AGAIN}", tolerance=0)
    require(not model(x).equal(expected), f"{case}: the adapter does nothing")
    if peft := peer("peft", notes):
        saved = peft_folder(model, adapter, folder / "peft")
        works["PEFT"], before["PEFT"] = lambda plain: peft.PeftModel.from_pretrained(plain, saved).eval(), fresh
        found = works["PEFT"](fresh())(x)
        require_outputs(found, merged(model, ungrouped(adapter))(x), what=f"{case}, PEFT")
        notes += [f"{case}: {line}" for line in left_out(adapter)]
    if peer("minlora", notes):
        factors = folder / "minlora.safetensors"
        save_file(minlora_state(adapter), factors)

        def with_minlora(plain: nn.Module) -> nn.Module:
            add_minlora(plain, adapter).load_state_dict(load_file(factors), strict=False)
            return plain

        works["minLoRA"], before["minLoRA"] = with_minlora, fresh
        require_outputs(with_minlora(fresh())(x), expected, what=f"{case}, minLoRA")
    times = interleaved(works, rounds=count, clock=clock, before=before)
    parts = (HASHING, READING)
    names = [who for who in works if who not in (BASELINE, *parts)]
    targets = dict.fromkeys(("loraio", FROM_FILE), TARGET)
    figures = ratios(times, BASELINE, row=ROW, case=case, unit=f"x {BASELINE}", targets=targets, names=names)
    return figures + ratios(times, "loraio", row=ROW, case=case, unit="share of loraio's time", names=parts), notes


@torch.no_grad()
def in_a_folder(network: str, count: int, clock: Callable[[], float]) -> Measured:
    """One network, with a folder for the files."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_one(network, Path(folder), count, clock)


def main() -> None:
    """Check, measure, print."""
    title = "load an adapter file and attach it to a fresh model"
    run_networks(ROW, __doc__, in_a_folder, title=title, counts=ROUNDS)


if __name__ == "__main__":
    main()
