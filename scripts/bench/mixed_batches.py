"""What does a batch cost in which each image has its own adapter, against the same batch without any?

usage: python scripts/bench/mixed_batches.py [--network NAME] [--size PIXELS] [--rounds N] [--json]

Ten adapters of rank 8 with random factors on every convolution and linear layer, 64 random images, adapters drawn at
random. First it checks that `loraio.Bank.forward` gives for each image what the attached model gives for that image
alone. Then, one thread, in turn, the order rotated: the base on the whole batch; the bank; the bank made to take each
of its routes; and PEFT's ``adapter_names``, where PEFT is installed and takes the network, checked likewise. The
ratio is the median over the rounds of each round's time over that of the base, by the wall clock and in processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import loraio
from loraio import bank as bank_module
from loraio.networks import find_network

ADAPTERS, RANK, IMAGES = 10, 8, 64
TOLERANCE = 1e-5
"""Of the largest output, between a batch and its images one by one: float32 sums in another order."""


def make_adapters(model: nn.Module) -> dict[str, loraio.Adapter]:
    """Random factors whose effect is about that of a trained adapter: some percent of the weight."""
    plain = loraio.new_adapter(
        model, loraio.TrainConfig(rank=RANK, alpha=RANK, targets=("conv", "linear"), clamp_rank=True)
    )
    generator = torch.Generator().manual_seed(1)
    made = {}
    for number in range(ADAPTERS):
        factors = {}
        for name, target in plain.targets.items():
            scale = float(model.get_parameter(name).std()) * 0.1
            lora_A = torch.randn(target.factor_shapes["lora_A"], generator=generator)
            lora_B = torch.randn(target.factor_shapes["lora_B"], generator=generator) * scale / target.rank**0.5
            factors |= {f"{name}.lora_A": lora_A, f"{name}.lora_B": lora_B}
        made[f"adapter-{number}"] = replace(plain, factors=factors)
    return made


def one_by_one(model: nn.Module, bank: loraio.Bank, x: Tensor, names: list[str]) -> Tensor:
    """The outputs of each image alone."""
    rows: dict[int, Tensor] = {}
    for name in sorted(set(names)):
        with bank.attach(model, name):
            rows |= {row: model(x[row : row + 1])[0] for row, own in enumerate(names) if own == name}
    return torch.stack([rows[row] for row in range(len(names))])


def peft_forward(
    model: nn.Module, adapters: Mapping[str, loraio.Adapter], names: list[str]
) -> Callable[[Tensor], Tensor] | str:
    """PEFT's mixed batch with the same adapters, or why there is none."""
    if importlib.util.find_spec("peft") is None:
        return "not installed"
    import copy

    import peft

    targets = next(iter(adapters.values())).targets
    paths = [name.removesuffix(".weight") for name in targets]
    wrapped: Any = None
    try:
        for name, adapter in adapters.items():
            ranks = {path: adapter.targets[f"{path}.weight"].rank for path in paths}
            config = peft.LoraConfig(
                r=RANK, lora_alpha=RANK, target_modules=paths, rank_pattern=ranks, alpha_pattern=ranks
            )
            if wrapped is None:
                wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
            for path in paths:
                layer = wrapped.base_model.model.get_submodule(path)
                for short in ("lora_A", "lora_B"):
                    weight = getattr(layer, short)[name].weight
                    weight.copy_(adapter.factors[f"{path}.weight.{short}"].view_as(weight))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"refuses: {str(error).splitlines()[0]}"
    wrapped.eval()
    return lambda x: wrapped(x, adapter_names=names)


def measure(ways: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, and median ratios to the first; one round beforehand is not counted."""
    names = list(ways)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start, start_cpu = time.perf_counter(), time.process_time()
            ways[name]()
            if number:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(own / base for own, base in zip(times[name], times[names[0]], strict=True))

    return {
        name: {"ms": statistics.median(wall[name]) * 1e3, "ratio": ratio(wall, name), "cpu_ratio": ratio(cpu, name)}
        for name in names
    }


def forced(layers: bool, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The bank with one of its routes wherever there is a choice."""

    def forward() -> Tensor:
        before = bank_module.takes_layers
        bank_module.takes_layers = lambda *_: layers
        try:
            return run()
        finally:
            bank_module.takes_layers = before

    return forward


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digit-cnn")
    parser.add_argument("--size", type=int, default=None, help="height and width of the images; default: the network's")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    model = loraio.build_network(options.network, seed=1).eval()
    channels, height, width = find_network(options.network).input_shape or (3, 224, 224)
    x = torch.randn(IMAGES, channels, options.size or height, options.size or width)
    adapters = make_adapters(model)
    bank = loraio.Bank(adapters)
    names = [f"adapter-{int(number)}" for number in torch.randint(ADAPTERS, (IMAGES,))]
    expected, base = one_by_one(model, bank, x, names), model(x)
    largest = float(expected.abs().max())
    assert float((expected - base).abs().max()) > 100 * TOLERANCE * largest, "the adapters do nothing"

    def mixed() -> Tensor:
        outputs: Tensor = bank.forward(model, x, names)
        return outputs

    ways = {"base": lambda: model(x), "bank": mixed, "groups": forced(False, mixed), "layers": forced(True, mixed)}
    peer = peft_forward(model, adapters, names)
    if not isinstance(peer, str):
        ways["PEFT"] = lambda: peer(x)
    apart = {name: float((way() - expected).abs().max()) / largest for name, way in ways.items() if name != "base"}
    for name, difference in apart.items():
        if name == "PEFT" and difference > TOLERANCE:
            peer = f"another result: apart by {difference:.2g} of the largest output"
            del ways["PEFT"]
        else:
            assert difference <= TOLERANCE, (name, difference)
    found = measure(ways, options.rounds)
    if options.json:
        setting = {
            "network": options.network,
            "shape": list(x.shape),
            "torch": torch.__version__,
            "rounds": options.rounds,
        }
        print(json.dumps({**setting, "ways": found, "apart": apart, "peft": peer if isinstance(peer, str) else None}))
        return
    print(f"{options.network}, {tuple(x.shape)}, torch {torch.__version__}, one thread, {options.rounds} rounds")
    for name, row in found.items():
        check = f", apart from one by one {apart[name]:.1g}" if name in apart else ""
        print(
            f"{name:<8} {row['ms']:9.2f} ms   ratio {row['ratio']:.2f}, in processor time {row['cpu_ratio']:.2f}{check}"
        )
    if isinstance(peer, str):
        print(f"PEFT: {peer}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
