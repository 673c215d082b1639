"""Swap between two adapters on a live model, and show that the base comes back bit for bit.

usage: python scripts/swap.py BASE ADAPTER ADAPTER
"""

from __future__ import annotations

import sys
from pathlib import Path

import loraio


def main(base: str, first: str, second: str) -> None:
    """Print the misread images of each digit: with either adapter, at half strength, without one, and detached."""
    model = loraio.load_base(base)
    adapters = {Path(path).stem: loraio.load(path) for path in (first, second)}
    images = loraio.load_dataset("digits", "test")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def show(what: str) -> None:
        wrong = loraio.evaluate(model, images).wrong
        print(f"  {what:<24} misread, digits 0 to 9: {' '.join(f'{count:3d}' for count in wrong)}")

    a, b = adapters
    with loraio.attach(model, adapters[a]) as live:
        show(a)
        live.swap(adapters[b])
        show(f"swapped to {b}")
        live.swap(adapters[a])
        show(f"swapped back to {a}")
        live.strength = 0.5
        show("at half strength")
        live.disable()
        show("disabled")
    show("detached")

    after = model.state_dict()
    same = list(before) == list(after) and all(before[name].equal(after[name]) for name in before)
    print(f"  after detach the base is {'the same, bit for bit' if same else 'NOT THE SAME'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
