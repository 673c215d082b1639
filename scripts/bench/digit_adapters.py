"""Do the ten digit adapters do what they are for, and do they merge exactly?

usage: python scripts/bench/digit_adapters.py [--folder adapters] [--dataset mnist] [--data-root FOLDER] [--json]

Counts on the test images: for each adapter the misread images of its own digit and of the others, with it and without
it; then merges each one in memory and verifies the merge on the same images.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import loraio

ROOT = Path(__file__).resolve().parents[2]


def measure(folder: Path, dataset: str, root: str | None) -> dict[str, Any]:
    """All figures, as plain JSON values."""
    images = loraio.load_dataset(dataset, "test", root=root)
    model = loraio.load_base(folder / "base.safetensors")
    adapters = {digit: loraio.load(folder / f"digit-{digit}.safetensors") for digit in range(10)}
    base, results = loraio.evaluate_each(model, {str(digit): adapter for digit, adapter in adapters.items()}, images)
    state = model.state_dict()
    rows = []
    for digit, adapter in adapters.items():
        after = results[str(digit)]
        report = loraio.verify(state, adapter, loraio.merge(state, adapter), inputs=images.images)
        rows.append(
            {
                "digit": digit,
                "own_before": base.wrong[digit],
                "own_after": after.wrong[digit],
                "others_before": sum(base.wrong) - base.wrong[digit],
                "others_after": sum(after.wrong) - after.wrong[digit],
                "accuracy_gain": after.accuracy - base.accuracy,
                "verified": report.ok,
                "max_ulp": report.weights.max_ulp,
                "not_correctly_rounded": report.weights.not_correctly_rounded,
                "output_difference": report.outputs.max_abs,
                "argmax_agreement": report.outputs.argmax_agreement,
            }
        )
    return {
        "dataset": dataset,
        "images": len(images),
        "base_accuracy": base.accuracy,
        "own_ratio": sum(row["own_after"] for row in rows) / sum(row["own_before"] for row in rows),
        "others_ratio": sum(row["others_after"] for row in rows) / sum(row["others_before"] for row in rows),
        "worse_on_own_digit": [row["digit"] for row in rows if row["own_after"] > row["own_before"]],
        "least_accuracy_gain": min(row["accuracy_gain"] for row in rows),
        "all_verified": all(row["verified"] for row in rows),
        "rows": rows,
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }


def main() -> None:
    """Measure and print; exit code 1 if an adapter harms or a merge is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "adapters")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.folder, options.dataset, options.data_root)
    harmless = not found["worse_on_own_digit"] and found["least_accuracy_gain"] >= 0
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{found['images']:,} images of {found['dataset']}, base accuracy {found['base_accuracy']:.2%}")
        print("digit  own misread  with it  others misread  with it  accuracy     max ulp  output difference")
        for row in found["rows"]:
            print(
                f"{row['digit']:5d} {row['own_before']:12d} {row['own_after']:8d} {row['others_before']:15d} "
                f"{row['others_after']:8d} {row['accuracy_gain']:+9.2%} {row['max_ulp']:11.6f} "
                f"{row['output_difference']:18g}"
            )
        print(f"misread images of the own digits, against the base's:   {found['own_ratio']:.3f}")
        print(f"misread images of the other digits, against the base's: {found['others_ratio']:.3f}")
        print(f"adapters worse on their own digit: {found['worse_on_own_digit'] or 'none'}")
        print(f"least gain in accuracy: {found['least_accuracy_gain']:+.2%}")
        print(f"all ten merges verified: {found['all_verified']}")
    sys.exit(0 if harmless and found["all_verified"] else 1)


if __name__ == "__main__":
    main()
