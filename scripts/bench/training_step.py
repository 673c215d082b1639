"""Measure a training step with an adapter against a step of full fine-tuning.

usage: python scripts/bench/training_step.py [--networks NAME ...] [--rounds N] [--optimizer adam|sgd]
       [--channels-last] [--json]

One thread, float32. The adapter has rank 8, or the largest that a layer allows, on every convolution and linear layer.
Normalisation computes as in eval mode, for everyone: that is how loraio trains. A step is zero_grad, forward,
cross-entropy, backward and the optimizer. All contestants take their steps in turn.

- full: every parameter of the network, batch normalisation's included.
- loraio: the factors of an attached adapter.
- full and loraio, channels last: the same on images in that order of memory, in which `loraio.train` trains.
- PEFT: the same rank on the same layers, but for convolutions with groups, which it refuses; where it can be imported.
- bound: forward and the gradients of the inputs of all layers but the first; no parameter learns. It uses torch's
  own operators, and its normalisation keeps its inputs.

Saved bytes are those of the tensors that autograd keeps for the backward pass, each storage counted once, parameters
not counted. Before any time is taken, the gradients of all factors are held against plain autograd's in float64, for
weights that are folded in plain tensor arithmetic: those of the same contestant in float64, which must be the same, and
those in float32, which may be no farther off than twice what the plain arithmetic in float32 is.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from _contestants import RANK, built, drawn, left_out, peer, peft_config, peft_factors, ungrouped
from _paired import (
    CLOCKS,
    NETWORKS,
    Measured,
    exactly,
    gathered,
    interleaved,
    parser,
    ratios,
    require,
    rounds,
    run_row,
    short,
)
from torch import Tensor, nn
from torch.nn import functional as F

import loraio
from loraio.training.batches import in_order

ROW = "training_step"
BATCHES = {"digit-cnn": 64, "torchvision:mobilenet_v3_small": 8, "torchvision:resnet50": 4}
ROUNDS = {"digit-cnn": 150, "torchvision:mobilenet_v3_small": 15, "torchvision:resnet50": 15}
TARGETS = {"digit-cnn": 0.90, "torchvision:mobilenet_v3_small": 0.65, "torchvision:resnet50": 0.75}
SAVED_TARGET = 1.03
FULL_LAST, OWN_LAST = "full, channels last", "loraio, channels last"

SAME = 1e-6
"""Of a gradient's length, in a run in float64: some roundings of float32, which factors and their gradients stay in."""

WORSE, FLOOR = 2.0, 1e-5
"""How many times the largest error of plain float32 arithmetic the error of a gradient may be; errors below the floor,
of a gradient's length, always may. Where an activation has a kink, float32 and float64 can be on either side of it,
which is why the error of plain float32 itself is up to some thousandths, and why there is a run in float64."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-6, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-6, fused=True),
}
"""Fused, the fastest for everyone; a rate at which the networks stay what they are."""

Step = Callable[[], Tensor]
PutOn = Callable[[nn.Module, loraio.Adapter], dict[str, nn.Parameter]]


def loss_of(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss that every contestant minimises."""
    return F.cross_entropy(model(images), labels)


def reference(
    model: nn.Module, adapter: loraio.Adapter, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradients of all factors by plain autograd, all of it in one dtype."""
    model = copy.deepcopy(model).to(dtype)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    leaves = {name: factor.to(dtype, copy=True).requires_grad_() for name, factor in adapter.factors.items()}
    for name, target in adapter.targets.items():
        product = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        state[name] = state[name] + target.scale * product.view(target.shape)
    loss = loss_of(lambda x: torch.func.functional_call(model, state, (x,)), images.to(dtype), labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The length of each gradient's difference from the exact one, of the length of that."""
    return {
        name: float((gradient.double().view_as(exact[name]) - exact[name]).norm() / exact[name].norm())
        for name, gradient in found.items()
    }


def check(what: str, put_on: PutOn, base: nn.Module, adapter: loraio.Adapter, images: Tensor, labels: Tensor) -> None:
    """Refuse gradients that are others than those of the adapter's factors, first in float64, then in float32."""
    exact = reference(base, adapter, images, labels, torch.float64)
    plain = errors(reference(base, adapter, images, labels, torch.float32), exact)
    most = {torch.float64: SAME, torch.float32: max(WORSE * max(plain.values()), FLOOR)}
    for dtype, bound in most.items():
        model = copy.deepcopy(base)
        factors = put_on(model, adapter)
        loss_of(model.to(dtype).eval(), images.to(dtype), labels).backward()
        missing = [name for name in exact if name not in factors or factors[name].grad is None]
        require(not missing, f"{what}: no gradient for {missing}")
        found = {name: factor.grad for name, factor in factors.items() if factor.grad is not None}
        for name, error in errors(found, exact).items():
            require(error <= bound, f"{what}, {name} in {dtype}: off by {error:.2g} of its length, not {bound:.2g}")


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


def injected(model: nn.Module, adapter: loraio.Adapter) -> dict[str, nn.Parameter]:
    """The factors of PEFT's LoRA with the same values."""
    import peft

    peft.inject_adapter_in_model(peft_config(adapter), model)
    return peft_factors(model, adapter, "default")


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the bytes that one forward pass saves for its backward pass."""
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


def measure_one(network: str, count: int, options: argparse.Namespace) -> Measured:
    """Checks, bytes and times of one network."""
    case, notes, batch = f"{short(network)}, batch {BATCHES[network]}", [], BATCHES[network]
    base = built(network)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(batch, *NETWORKS[network], generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    if options.channels_last:
        base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    adapter = drawn(base)
    models = {who: copy.deepcopy(base) for who in ("full", "loraio", "bound", FULL_LAST, OWN_LAST)}
    learning = {"full": full(models["full"]), "bound": bound(models["bound"]), FULL_LAST: full(models[FULL_LAST])}
    put_on: dict[str, tuple[PutOn, loraio.Adapter]] = {"loraio": (attached, adapter), OWN_LAST: (attached, adapter)}
    given = {who: in_order(images, channels_last=True) if who in (FULL_LAST, OWN_LAST) else images for who in models}
    if peer("peft", notes):
        models["PEFT"], put_on["PEFT"] = copy.deepcopy(base), (injected, ungrouped(adapter))
        given["PEFT"] = images
        notes += [f"{short(network)}: {line}" for line in left_out(adapter)]
    for who, (put, taken) in put_on.items():
        check(f"{case}, {who}", put, base, taken, given[who], labels)
        learning[who] = list(put(models[who], taken).values())
        models[who].eval()
    saved = {who: saved_bytes(model, given[who], labels) for who, model in models.items()}
    steps = {
        who: stepping(model, learning[who], options.optimizer, given[who], labels) for who, model in models.items()
    }
    times = interleaved(steps, rounds=count, clock=CLOCKS[options.clock], warmup=2)
    targets = dict.fromkeys(("loraio", OWN_LAST), TARGETS[network])
    figures = ratios(times, "full", row=ROW, case=case, unit="x step of full fine-tuning", targets=targets)
    for who in models:
        if who != "full":
            target = SAVED_TARGET if who == "loraio" else None
            unit = "x saved bytes of full fine-tuning"
            figures.append(exactly(ROW, case, who, saved[who] / saved["full"], unit, target=target))
    return figures, notes


def measure(options: argparse.Namespace) -> Measured:
    """All networks."""
    return gathered(measure_one(name, rounds(options, ROUNDS[name]), options) for name in options.networks)


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__)
    made.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam")
    made.add_argument("--channels-last", action="store_true")
    run_row(ROW, made.parse_args(), measure, title=f"training step, rank {RANK} on every layer")


if __name__ == "__main__":
    main()
