"""What does a training step with an adapter cost, against a step of full fine-tuning?

usage: python scripts/bench/training_step.py [--networks NAME ...] [--runs N] [--optimizer adam|sgd]
       [--channels-last] [--json]

One thread, float32. The adapter has rank 8, or the largest that a layer allows, on every convolution and linear layer.
Normalisation computes as in eval mode, for everyone: that is how loraio trains. A step is zero_grad, forward,
cross-entropy, backward and the optimizer. All contestants take their steps in turn, in an order that rotates, and what
is reported is the median of the ratios to the step of full fine-tuning in the same round. Times are CPU time of the
process, so that neighbours on a shared machine count less.

- full: every parameter of the network, batch normalisation's included.
- loraio: the factors of an attached adapter.
- peft: the same rank on the same layers, but for convolutions with groups that PEFT refuses; if it can be imported.
- bound: forward and the gradients of the inputs of all layers but the first; no parameter learns. It uses torch's
  own operators, and its normalisation keeps its inputs.

Saved bytes are those of the tensors that autograd keeps for the backward pass, each storage counted once, parameters
not counted. Before any time is taken, the gradients of all factors are held against autograd's for weights that are
folded in plain tensor arithmetic.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loraio

NETWORKS = {"digit-cnn": (64, 28), "torchvision:mobilenet_v3_small": (8, 224), "torchvision:resnet50": (4, 224)}
"""Batch size and size of the images."""

RANK = 8

TOLERANCE = 1e-2
"""Of the largest gradient of a factor. 0.0017 was seen in one layer of resnet50, so that 0.001 is too little there."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-6, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-6, fused=True),
}
"""Fused, the fastest for everyone; a rate at which the networks stay what they are."""

Step = Callable[[], Tensor]


def adapter_for(model: nn.Module) -> loraio.Adapter:
    """Small random factors, so that no gradient is zero."""
    config = loraio.TrainConfig(rank=RANK, targets=("conv", "linear"), clamp_rank=True)
    adapter = loraio.new_adapter(model, config)
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: 0.003 * torch.randn(factor.shape, generator=generator) if name.endswith("lora_B") else factor
        for name, factor in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def loss_of(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """What every contestant minimises."""
    return F.cross_entropy(model(images), labels)


def reference(model: nn.Module, adapter: loraio.Adapter, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of all factors by plain autograd."""
    state = {name: parameter.detach() for name, parameter in model.state_dict().items()}
    leaves = {name: factor.clone().requires_grad_() for name, factor in adapter.factors.items()}
    for name, target in adapter.targets.items():
        product = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        state[name] = state[name] + target.scale * product.view(target.shape)
    loss = loss_of(lambda x: torch.func.functional_call(model, state, (x,)), images, labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> None:
    """Refuse gradients that are others."""
    for name, gradient in found.items():
        assert gradient is not None, name
        other = expected[name]
        error = float((gradient.view(other.shape) - other).abs().max() / other.abs().max())
        assert error < TOLERANCE, f"{name}: off by {error:.2g} of the largest"


def full(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter learns."""
    return list(model.requires_grad_(True).parameters())


def bound(model: nn.Module) -> list[nn.Parameter]:
    """None learns, but gradients go back to the output of the first layer."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    model.requires_grad_(False)
    return []


def attached(model: nn.Module, adapter: loraio.Adapter) -> dict[str, nn.Parameter]:
    """The factors of an adapter that is attached and stays on."""
    model.requires_grad_(False)
    live = loraio.attach(model, adapter, trainable=True)
    return dict(zip(adapter.factors, live.parameters(), strict=True))


def injected(model: nn.Module, adapter: loraio.Adapter) -> dict[str, nn.Parameter] | None:
    """The factors of PEFT's LoRA with the same values; None without PEFT."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-not-found]
    except ImportError:
        return None
    targets = {
        name.removesuffix(".weight"): target
        for name, target in adapter.targets.items()
        if target.groups == 1
    }  # fmt: skip
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(targets),
        rank_pattern={f"^{name}$": target.rank for name, target in targets.items()},
        alpha_pattern={f"^{name}$": target.rank for name, target in targets.items()},
    )
    inject_adapter_in_model(config, model)
    found = {}
    for name in targets:
        layer: Any = model.get_submodule(name)
        for short in ("lora_A", "lora_B"):
            parameter = getattr(layer, short)["default"].weight
            with torch.no_grad():
                parameter.copy_(adapter.factors[f"{name}.weight.{short}"].view(parameter.shape))
            found[f"{name}.weight.{short}"] = parameter
    return found


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """What one forward pass keeps for its backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, images, labels)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return total


def stepping(model: nn.Module, parameters: list[nn.Parameter], optimizer: str, images: Tensor, labels: Tensor) -> Step:
    """One training step of one contestant."""
    chosen = OPTIMIZERS[optimizer](parameters) if parameters else None

    def step() -> Tensor:
        if chosen is not None:
            chosen.zero_grad(set_to_none=True)
        loss = loss_of(model, images, labels)
        loss.backward()
        if chosen is not None:
            chosen.step()
        return loss

    return step


def measure(name: str, *, runs: int, optimizer: str, channels_last: bool) -> dict[str, Any]:
    """Checks, bytes and times of one network."""
    batch, size = NETWORKS[name]
    base = loraio.build_network(name, seed=0)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch, 1 if name == "digit-cnn" else 3, size, size, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    if channels_last:
        base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    adapter = adapter_for(base)
    expected = reference(base, adapter, images, labels)
    models = {contestant: copy.deepcopy(base) for contestant in ("full", "loraio", "peft", "bound")}
    learning = {"full": full(models["full"]), "bound": bound(models["bound"])}
    for contestant, put_on in (("loraio", attached), ("peft", injected)):
        factors = put_on(models[contestant], adapter)
        if factors is None:
            del models[contestant]
            continue
        models[contestant].eval()
        loss_of(models[contestant], images, labels).backward()
        check({name: factor.grad for name, factor in factors.items()}, expected if put_on is attached else
              expected if all(t.groups == 1 for t in adapter.targets.values()) else
              reference(base, ungrouped(adapter), images, labels))  # fmt: skip
        learning[contestant] = list(factors.values())
    saved = {contestant: saved_bytes(model, images, labels) for contestant, model in models.items()}
    steps = {
        contestant: stepping(model, learning[contestant], optimizer, images, labels)
        for contestant, model in models.items()
    }
    times: dict[str, list[float]] = {contestant: [] for contestant in steps}
    order = list(steps)
    for number in range(runs + 2):
        for contestant in order[number % len(order) :] + order[: number % len(order)]:
            start = time.process_time()
            steps[contestant]()
            if number >= 2:
                times[contestant].append(time.process_time() - start)
    return {
        "batch": batch,
        "saved_bytes": saved,
        "saved_ratio": {contestant: size / saved["full"] for contestant, size in saved.items()},
        "milliseconds": {contestant: 1e3 * statistics.median(row) for contestant, row in times.items()},
        "time_ratio": {
            contestant: statistics.median(own / whole for own, whole in zip(row, times["full"], strict=True))
            for contestant, row in times.items()
        },
    }


def ungrouped(adapter: loraio.Adapter) -> loraio.Adapter:
    """The adapter without convolutions in groups."""
    targets = {name: target for name, target in adapter.targets.items() if target.groups == 1}
    factors = {name: factor for name, factor in adapter.factors.items() if name.rpartition(".")[0] in targets}
    return replace(adapter, targets=targets, factors=factors)


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        runs = options.runs * (10 if name == "digit-cnn" else 1)
        results[name] = measure(name, runs=runs, optimizer=options.optimizer, channels_last=options.channels_last)
        if not options.json:
            print(f"{name}, batch {results[name]['batch']}: the gradients are right", flush=True)
            for contestant, ratio in results[name]["time_ratio"].items():
                print(
                    f"  {contestant:8} {results[name]['milliseconds'][contestant]:8.1f} ms  {ratio:5.2f} x full"
                    f"  saved {results[name]['saved_bytes'][contestant] / 1e6:7.1f} MB"
                    f"  {results[name]['saved_ratio'][contestant]:5.3f} x full"
                )
    if options.json:
        machine = {
            "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "cpus": os.cpu_count(), "threads": 1, "rank": RANK, "optimizer": options.optimizer,
            "channels_last": options.channels_last,
        }  # fmt: skip
        print(json.dumps({"schema": "loraio/bench/training_step/1", "machine": machine, "networks": results}))


if __name__ == "__main__":
    main()
