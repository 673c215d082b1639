"""New classes for a trained network: an adapter with a head of its own against a fine-tuned copy of the network.

usage: python scripts/bench/new_head.py [--data-root FOLDER] [--train N] [--test N] [--steps N] [--json]

ResNet-18 on image folders of real digits, MNIST as PNG of 32x32 pixels. The base learns 0 to 6; adapters with a
ten-class head then learn all ten from it, once with frozen normalisation and once with statistics of their own, and a
copy of the base is fine-tuned whole on the same images in as many steps. The commands of the tool make base and
adapters. Before any figure is printed, base and adapter are loaded in a new process, whose logits must be those of this
one, bit for bit, and merged and attached logits must be equal.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import loraio
from loraio.training.batches import epoch_batches

SIDE = 32
NETWORK = "torchvision:resnet18"
BATCH = 64
LR = 1e-3
LOGITS = """
import hashlib, sys
import loraio
model = loraio.load_base(sys.argv[1])
data = loraio.load_dataset("imagefolder:" + sys.argv[3], "test", form=loraio.image_form(model, size=32))
with loraio.attach(model, loraio.load(sys.argv[2])):
    print(hashlib.sha256(loraio.predict(model, data.images).numpy().data).hexdigest())
"""


def export(folder: Path, classes: int, counts: dict[str, int], root: str | None) -> None:
    """Folders of PNG files, PATH/train/CLASS and PATH/test/CLASS, of the first images of MNIST."""
    for split, count in counts.items():
        data = loraio.load_dataset("mnist", split, root=root)
        for digit in range(classes):
            place = folder / split / str(digit)
            place.mkdir(parents=True)
            for number in torch.nonzero(data.labels == digit)[: count // 10, 0].tolist():
                pixels = (data.images[number, 0] * 255).round().to(torch.uint8).numpy()
                Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number:05}.png")


def command(*words: object) -> dict[str, Any]:
    """Run a command of the tool and return its JSON."""
    line = [sys.executable, "-m", "loraio", *map(str, words), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return found


def fine_tuned(base: nn.Module, data: loraio.Dataset, steps: int) -> nn.Module:
    """A copy of the base with a new head, all of it trained with Adam."""
    model = copy.deepcopy(base).train()
    torch.manual_seed(1)
    model.fc = nn.Linear(512, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    epochs = -(-steps * BATCH // len(data))
    batches = epoch_batches(len(data), BATCH, epochs, generator=torch.Generator().manual_seed(1))
    for _, rows in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
        optimizer.step()
    return model.eval()


def digest(logits: Tensor) -> str:
    """Of the bits."""
    return hashlib.sha256(logits.numpy().data).hexdigest()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain JSON values."""
    counts = {"train": options.train, "test": options.test}
    export(folder / "seven", 7, counts, options.data_root)
    export(folder / "ten", 10, counts, options.data_root)
    seven, ten = (f"imagefolder:{folder / name}" for name in ("seven", "ten"))
    base_file = folder / "base.safetensors"
    size = ("--image-size", SIDE)
    arguments = ("--model", NETWORK, "--model-args", '{"num_classes": 7}')
    made = command("pretrain", "-o", base_file, *arguments, "--dataset", seven, *size, "--epochs", options.epochs)
    base = loraio.load_base(base_file)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    form = loraio.image_form(base, size=SIDE)
    train, test = (loraio.load_dataset(ten, split, form=form) for split in ("train", "test"))
    rows = {}
    for norm in ("frozen", "stats"):
        file = folder / f"{norm}.safetensors"
        words = ("--targets", "conv", "--rank", 8, "--clamp-rank", "--head", "fc=10", "--norm", norm, "--lr", LR)
        command("train", base_file, "-o", file, "--dataset", ten, *size, *words, "--steps", options.steps)
        adapter = loraio.load(file)
        with loraio.attach(base, adapter):
            logits = loraio.predict(base, test.images)
            result = loraio.evaluate(base, test)
        line = [sys.executable, "-c", LOGITS, str(base_file), str(file), str(folder / "ten")]
        again = subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()
        assert again == digest(logits), "another process gives other logits"
        for name, tensor in base.state_dict().items():
            assert tensor.equal(before[name]), f"{name} is not what it was"
        loraio.merge_file(base_file, file, folder / f"merged-{norm}.safetensors")
        merged = loraio.load_base(folder / f"merged-{norm}.safetensors")
        assert digest(loraio.predict(merged, test.images)) == digest(logits), "merged and attached differ"
        rows[f"adapter, norm {norm}"] = _row(file.stat().st_size, result)
    tuned = fine_tuned(base, train, options.steps)
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    rows["fine-tuned network"] = _row((folder / "tuned.safetensors").stat().st_size, loraio.evaluate(tuned, test))
    return {
        "base": {"bytes": made["bytes"], "accuracy_on_0_to_6": made["test"]["accuracy"]},
        "images": {"train": len(train), "test": len(test)},
        "steps": options.steps,
        "rows": rows,
    }


def _row(size: int, result: loraio.Evaluation) -> dict[str, Any]:
    right = [1 - wrong / (result.images / 10) for wrong in result.wrong]
    return {
        "bytes": size,
        "accuracy": result.accuracy,
        "accuracy_0_to_6": sum(right[:7]) / 7,
        "accuracy_7_to_9": sum(right[7:]) / 3,
    }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=None, help="folder of MNIST")
    parser.add_argument("--train", type=int, default=10_000, help="training images of all ten digits")
    parser.add_argument("--test", type=int, default=5_000, help="test images of all ten digits")
    parser.add_argument("--epochs", type=int, default=2, help="of the base")
    parser.add_argument("--steps", type=int, default=300, help="of adapters and fine-tuning")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    found["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    if options.json:
        print(json.dumps(found))
        return
    base = found["base"]
    print(f"base: {base['bytes']:,} bytes, {base['accuracy_on_0_to_6']:.2%} of the digits 0 to 6 right")
    for name, row in found["rows"].items():
        print(
            f"{name:<22} {row['bytes']:>12,} bytes  all {row['accuracy']:.2%}  "
            f"0 to 6 {row['accuracy_0_to_6']:.2%}  7 to 9 {row['accuracy_7_to_9']:.2%}"
        )


if __name__ == "__main__":
    main()
