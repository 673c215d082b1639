"""Do the digit adapters, exported to PEFT and loaded by PEFT, misread the same images as here?

usage: python scripts/bench/peft_digits.py [--folder adapters] [--dataset mnist] [--data-root FOLDER] [--json]

Each adapter is converted to a PEFT folder, as `loraio convert --to peft` does, and loaded by
`PeftModel.from_pretrained` onto a network with the base's weights, which knows nothing of loraio. Both answer all test
images; the counts of wrong answers by digit must be the same, and so must the answers themselves.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import loraio

ROOT = Path(__file__).resolve().parents[2]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Rows of ten, 256 images at a time."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in images.split(256)])


def wrong(answers: Tensor, labels: Tensor) -> list[int]:
    """Misread images by their digit."""
    return torch.bincount(labels[answers != labels], minlength=10).tolist()


def measure(folder: Path, dataset: str, root: str | None) -> dict[str, Any]:
    """A row for each adapter, and one of the base, as plain JSON values."""
    data = loraio.load_dataset(dataset, "test", root=root)
    base = loraio.load_base(folder / "base.safetensors")
    rows = {}
    with tempfile.TemporaryDirectory() as made:
        for file in sorted(folder.glob("digit-*.safetensors")):
            exported = Path(made) / file.stem
            assert loraio.convert(file, exported, to="peft").done
            theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), exported).eval(), data.images)
            with loraio.attach(base, loraio.load(file)):
                ours = logits(base, data.images)
            rows[file.stem] = {
                "wrong": wrong(ours.argmax(1), data.labels),
                "wrong_in_peft": wrong(theirs.argmax(1), data.labels),
                "other_answers": int((ours.argmax(1) != theirs.argmax(1)).sum()),
                "largest_difference": float((ours - theirs).abs().max()),
            }
    return {
        "dataset": dataset,
        "images": len(data),
        "wrong_without": wrong(logits(base, data.images).argmax(1), data.labels),
        "adapters": rows,
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
    }


def main() -> None:
    """Measure and print; exit code 1 if a count differs, or if there was nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "adapters")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.folder, options.dataset, options.data_root)
    rows = found["adapters"]
    same = bool(rows) and all(row["wrong"] == row["wrong_in_peft"] for row in rows.values())
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{found['images']:,} test images of {found['dataset']}; wrong answers by digit")
        print(f"{'the base':10} {found['wrong_without']}, {sum(found['wrong_without'])} in all")
        for name, row in rows.items():
            print(f"{name:10} {row['wrong']}, {sum(row['wrong'])} in all")
            print(
                f"{'in PEFT':>10} {row['wrong_in_peft']}, {sum(row['wrong_in_peft'])} in all; other answers: "
                f"{row['other_answers']}, largest difference of a logit {row['largest_difference']:.2g}"
            )
        print("the same counts everywhere" if same else "the counts differ")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
