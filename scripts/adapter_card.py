"""Write the card of a folder of digit adapters, from the files themselves.

usage: python scripts/adapter_card.py FOLDER > FOLDER/README.md
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import loraio

COMMAND = "scripts/train_adapters"


def card(folder: Path) -> str:
    """Return the card as Markdown."""
    base = loraio.read_base(folder / "base.safetensors")
    adapters = [loraio.load(folder / f"digit-{digit}.safetensors") for digit in range(10)]
    trainings = [adapter.training for adapter in adapters]
    first: dict[str, Any] = dict(trainings[0])
    settings, results = first["hyperparameters"], first["results"]
    before = results["before"]
    epochs = base.document["training"]["hyperparameters"]["epochs"]
    target = next(iter(adapters[0].targets.values()))
    own = [(before["wrong"][n], training["results"]["after"]["wrong"][n]) for n, training in enumerate(trainings)]
    others = [
        (sum(before["wrong"]) - was, sum(training["results"]["after"]["wrong"]) - now)
        for (was, now), training in zip(own, trainings, strict=True)
    ]
    seed = "" if first["seed"] == 1 else f" --seed {first['seed']}"
    lines = [
        "# Digit adapters for digit-cnn on MNIST",
        "",
        f"`base.safetensors` is a `{base.network}` after {epochs} epoch of MNIST; `digit-0.safetensors` to "
        "`digit-9.safetensors` are one adapter for each digit, trained on it. "
        "`scripts/adapter_card.py` writes this page from the files.",
        "",
        "|                |                                                                     |",
        "|----------------|---------------------------------------------------------------------|",
        f"| made by        | `{COMMAND}{seed}`, one thread, on a CPU |",
        f"| data           | {first['dataset']}: {first['images']:,} images to train, {results['images']:,} to test |",
        f"| seed           | {first['seed']} |",
        f"| base           | sha256 `{base.document['sha256']}` |",
        f"| adapter        | rank {target.rank}, alpha {target.alpha}, on {', '.join(adapters[0].targets)}: "
        f"{adapters[0].parameters:,} parameters |",
        f"| training       | {first['steps']:,} steps of {settings['batch_size']} images, {settings['focus']:.0%} of "
        f"them the digit's; Adam, lr {settings['lr']:g}, {settings['schedule']}; init {settings['init']} |",
        f"| versions       | {', '.join(f'{name} {version}' for name, version in sorted(first['versions'].items()))} |",
        "| licence        | MIT, as the project; MNIST is by Yann LeCun and Corinna Cortes, under CC BY-SA 3.0 |",
        "",
        "Misread test images, without the adapter and with it:",
        "",
        "| file | bytes | own digit, base | with it | other digits, base | with it | accuracy, base | with it |",
        "|------|------:|----------------:|--------:|-------------------:|--------:|---------------:|--------:|",
    ]
    for digit, training in enumerate(trainings):
        name = f"digit-{digit}.safetensors"
        after = training["results"]["after"]["accuracy"]
        lines.append(
            f"| `{name}` | {(folder / name).stat().st_size:,} | {own[digit][0]} | {own[digit][1]} | {others[digit][0]} "
            f"| {others[digit][1]} | {before['accuracy']:.2%} | {after:.2%} |"
        )
    sums = [sum(column) for column in (*zip(*own, strict=True), *zip(*others, strict=True))]
    lines += [
        f"| all ten | | {sums[0]} | {sums[1]} | {sums[2]} | {sums[3]} | | |",
        "",
        f"Together the ten adapters make {sums[1] / sums[0]:.3f} times the base's errors on their own digits, and "
        f"{sums[3] / sums[2]:.3f} times on the others. `python scripts/bench/digit_adapters.py` counts again and "
        "verifies all ten merges.",
        "",
        "SHA-256 of the files:",
        "",
        "```",
    ]
    for path in sorted(folder.glob("*.safetensors")):
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(card(Path(sys.argv[1])), end="")
