"""The adapters that rows are measured with, and the same adapters in other tools."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _paired import NETWORKS, require
from torch import Tensor, nn
from torchvision_builders import set_statistics

import loraio

RANK = 8

EFFECT = 0.1
"""Standard deviation of a change of weights, of that of the weights themselves: as a trained adapter's."""

OUTPUT_TOLERANCE = 1e-4
"""Of the largest output, between ours and a peer's: float32 sums in another order, through up to fifty layers."""

PEERS = {"peft": "PEFT", "minlora": "minLoRA"}


def built(network: str) -> nn.Module:
    """A network of `NETWORKS` with random weights, in eval mode.

    Its normalisation has the statistics of images of uniform random numbers, as the rows use them: without them the
    signal of a deep one fades into numbers that take the processor longer.
    """
    model = loraio.build_network(network, seed=1)
    with torch.no_grad():
        set_statistics(model, NETWORKS[network])
    return model.eval()


def drawn(model: nn.Module, *, seed: int = 1, rank: int = RANK) -> loraio.Adapter:
    """Random factors for every convolution and linear layer, of this rank or the largest that a layer allows."""
    config = loraio.TrainConfig(rank=rank, targets=("conv", "linear"), clamp_rank=True)
    plain = loraio.new_adapter(model, config)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, target in plain.targets.items():
        size = float(model.get_parameter(name).detach().float().std()) * EFFECT / (target.scale * target.rank**0.5)
        factors[f"{name}.lora_A"] = torch.randn(target.factor_shapes["lora_A"], generator=generator)
        factors[f"{name}.lora_B"] = torch.randn(target.factor_shapes["lora_B"], generator=generator) * size
    return replace(plain, factors=factors)


def ungrouped(adapter: loraio.Adapter) -> loraio.Adapter:
    """The adapter without convolutions in groups, which PEFT refuses; the adapter itself where it has none."""
    targets = {name: target for name, target in adapter.targets.items() if target.groups == 1}
    if len(targets) == len(adapter.targets):
        return adapter
    factors = {name: factor for name, factor in adapter.factors.items() if name.rpartition(".")[0] in targets}
    return replace(adapter, targets=targets, factors=factors)


def merged(model: nn.Module, adapter: loraio.Adapter) -> nn.Module:
    """A copy of the model with the adapter folded in."""
    other = copy.deepcopy(model)
    other.load_state_dict(loraio.merge(model.state_dict(), adapter))
    return other


def require_outputs(found: Tensor, expected: Tensor, *, what: str, tolerance: float = OUTPUT_TOLERANCE) -> None:
    """Refuse outputs that are others.

    Args:
        tolerance: of the largest expected output; 0 asks for the same bits.

    Raises:
        WrongResultError: they are.
    """
    if tolerance:
        apart = float((found - expected).abs().max() / expected.abs().max())
        require(apart <= tolerance, f"{what}: off by {apart:.2g} of the largest output")
    else:
        require(found.equal(expected), f"{what}: not the same bits")


def module(name: str) -> ModuleType | None:
    """A peer's package; None where it cannot be imported."""
    if importlib.util.find_spec(name) is None:
        return None
    warnings.filterwarnings("ignore", module=name)
    return importlib.import_module(name)


def peer(name: str, notes: list[str]) -> ModuleType | None:
    """Return a peer's package, or None and a note for the table."""
    found = module(name)
    if found is None:
        notes.append(f"{PEERS[name]}: cannot be imported, not measured")
    return found


def left_out(adapter: loraio.Adapter) -> list[str]:
    """Return a row's note on the layers that PEFT refuses; none if it takes all."""
    plain, whole = len(ungrouped(adapter).targets), len(adapter.targets)
    return [] if plain == whole else [f"PEFT: adapts {plain} of {whole} layers, it refuses convolutions in groups"]


def peft_config(adapter: loraio.Adapter) -> Any:
    """PEFT's description of the adapter's layers, ranks and alphas."""
    import peft

    paths = {name.removesuffix(".weight"): target for name, target in adapter.targets.items()}
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(paths),
        rank_pattern={f"^{path}$": target.rank for path, target in paths.items()},
        alpha_pattern={f"^{path}$": target.alpha for path, target in paths.items()},
    )


def peft_factors(wrapped: nn.Module, adapter: loraio.Adapter, name: str) -> dict[str, nn.Parameter]:
    """PEFT's parameters for the adapter's factors, by our names, with the values of ours."""
    found = {}
    for target in adapter.targets:
        layer: Any = wrapped.get_submodule(target.removesuffix(".weight"))
        for factor in ("lora_A", "lora_B"):
            parameter = getattr(layer, factor)[name].weight
            with torch.no_grad():
                parameter.copy_(adapter.factors[f"{target}.{factor}"].view_as(parameter))
            found[f"{target}.{factor}"] = parameter
    return found


def in_peft(model: nn.Module, adapters: Mapping[str, loraio.Adapter]) -> Any:
    """PEFT's model of a copy of ours, with the adapters by their names, but for convolutions in groups."""
    import peft

    wrapped: Any = None
    for name, adapter in adapters.items():
        taken = ungrouped(adapter)
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), peft_config(taken), adapter_name=name)
        else:
            wrapped.add_adapter(name, peft_config(taken))
        peft_factors(wrapped.base_model.model, taken, name)
    return wrapped.eval()


def peft_folder(model: nn.Module, adapter: loraio.Adapter, folder: Path) -> Path:
    """The adapter as PEFT saves it, but for convolutions in groups."""
    in_peft(model, {"default": adapter}).save_pretrained(folder)
    return folder


def add_minlora(model: nn.Module, adapter: loraio.Adapter) -> nn.Module:
    """The model with minLoRA's parametrizations on the adapter's layers, their factors as minLoRA starts them."""
    import minlora

    names = {layer: f"{name}.weight" for name, layer in model.named_modules()}

    def made(layer: nn.Module) -> nn.Module:
        target = adapter.targets[names[layer]]
        out, fan_in = target.matrix_shape
        part: nn.Module = minlora.LoRAParametrization(fan_in, out, rank=target.rank, lora_alpha=target.alpha)
        return part

    kinds = {type(layer) for layer, name in names.items() if name in adapter.targets}
    minlora.add_lora(model, lora_config={kind: {"weight": made} for kind in kinds})
    return model


def minlora_state(adapter: loraio.Adapter) -> dict[str, Tensor]:
    """The adapter's factors by the names that minLoRA gives them."""
    return {
        f"{path}.parametrizations.weight.0.{factor}": adapter.factors[f"{path}.weight.{factor}"]
        for path in (name.removesuffix(".weight") for name in adapter.targets)
        for factor in ("lora_A", "lora_B")
    }


def in_minlora(model: nn.Module, adapter: loraio.Adapter) -> nn.Module:
    """A copy of the model with the adapter on it by minLoRA's parametrizations."""
    other = add_minlora(copy.deepcopy(model), adapter)
    other.load_state_dict(minlora_state(adapter), strict=False)
    return other.eval()
