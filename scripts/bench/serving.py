"""What does an attached adapter cost when the network answers, and what does a swap cost?

usage: python scripts/bench/serving.py [--networks NAME...] [--rounds N] [--json]

Rank 8 on every convolution and linear layer, float32, eval mode, no gradients, one thread. Forward passes with the
adapter on against the plain network, and a swap with the next forward pass against a plain forward pass; with PEFT in
the same rounds where it is installed: its forward pass, and its `set_adapter` and forward pass. First the outputs are
compared with those of the merged network.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _paired import machine, ratios
from torch import Tensor, nn

import loraio

NETWORKS = {
    "digit-cnn": ((1, 28, 28), (1, 64), 200),
    "torchvision:mobilenet_v3_small": ((3, 224, 224), (1, 64), 20),
    "torchvision:resnet50": ((3, 224, 224), (1, 64), 8),
}
"""Input shape, batch sizes, and rounds at batch 1; a tenth of them, but at least 3, for larger batches."""

RANK = 8


def adapter(model: nn.Module, seed: int) -> loraio.Adapter:
    """Random factors."""
    fresh = loraio.new_adapter(model, loraio.TrainConfig(targets=("conv", "linear"), rank=RANK, clamp_rank=True))
    generator = torch.Generator().manual_seed(seed)
    factors = {name: 0.02 * torch.randn(factor.shape, generator=generator) for name, factor in fresh.factors.items()}
    return replace(fresh, factors=factors)


def peft_model(model: nn.Module, adapters: list[loraio.Adapter]) -> Any:
    """The same adapters on PEFT's wrapper, named "0" and "1"; layers that it refuses stay plain."""
    import peft

    names = [name.removesuffix(".weight") for name in adapters[0].targets]
    modules = dict(model.named_modules())
    names = [name for name in names if getattr(modules[name], "groups", 1) == 1]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="0")
    wrapped.add_adapter("1", config)
    return wrapped.eval()


def measure(name: str, rounds: int | None) -> dict[str, Any]:
    """All figures of one network."""
    shape, batches, usual = NETWORKS[name]
    plain = loraio.build_network(name, seed=1)
    one, two = adapter(plain, 1), adapter(plain, 2)
    attached = copy.deepcopy(plain)
    live = loraio.attach(attached, one)
    peft = peft_model(plain, [one, two]) if importlib.util.find_spec("peft") else None
    found: dict[str, Any] = {}
    for batch in batches:
        x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
        check(plain, attached, live, (one, two), x)
        works: dict[str, Callable[[], Any]] = {
            "plain": functools.partial(plain, x),
            "attached": functools.partial(attached, x),
        }
        if peft is not None:
            works["peft"] = functools.partial(peft, x)
        if batch == 1:
            works["swap and forward"] = in_turn(live.swap, (one, two), works["attached"])
            if peft is not None:
                works["peft swap and forward"] = in_turn(peft.set_adapter, ("0", "1"), works["peft"])
        count = rounds or (usual if batch == 1 else max(3, usual // 10))
        with torch.no_grad():
            found[f"batch {batch}"] = ratios(works, against="plain", rounds=count)
    return found


def in_turn(swap: Callable[[Any], Any], adapters: tuple[Any, ...], forward: Callable[[], Any]) -> Callable[[], Any]:
    """A swap to the next adapter, and the forward pass after it."""
    following = itertools.cycle(adapters)

    def work() -> None:
        swap(next(following))
        forward()

    return work


def check(plain: nn.Module, attached: nn.Module, live: Any, adapters: tuple[loraio.Adapter, ...], x: Tensor) -> None:
    """Attached and merged give the same bits, before and after a swap."""
    for each in adapters:
        live.swap(each)
        merged = copy.deepcopy(plain)
        merged.load_state_dict(loraio.merge(plain.state_dict(), each))
        with torch.no_grad():
            assert merged(x).equal(attached(x))
            assert not plain(x).equal(attached(x))


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(name, options.rounds) for name in options.networks}
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for name, batches in rows.items():
        for batch, works in batches.items():
            for work, row in works.items():
                figures = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                print(f"{name:<31} {batch:<9} {work:<22} {figures}, {row['seconds'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
