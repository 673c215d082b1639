"""Plan an adapter: the weights to adapt, their ranks and alphas, and start values that change nothing yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraio.adapter import Adapter, Target, WholeTensor
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import tensor_name
from loraio.bases.identity import base_reference
from loraio.bases.networks import fresh_head
from loraio.bases.sketches import sketch
from loraio.bases.targets import TargetModule, find_head, matches, normalisation_tensors, refuse_shared, select_targets
from loraio.errors import ConfigError, UnknownNameError
from loraio.files.tensors import dtype_code, tensor_sha256
from loraio.live.base_state import base_state_dict, refuse_attached
from loraio.registry import known
from loraio.training.config import TrainConfig

Value = TypeVar("Value")


def plan_targets(model: nn.Module, config: TrainConfig) -> dict[str, Target]:
    """Return the metadata of each target that an adapter with these settings has, in the model's order.

    A weight that is replaced as a whole is no target.

    Args:
        model: the base model; it is only read.
        config: targets, exclude, kind, ranks, alphas, heads and norm count.

    Raises:
        UnknownNameError: a pattern for targets, ranks or alphas matches nothing, or as for `plan_whole`.
        ConfigError: ranks are larger than weights allow, without ``clamp_rank``; all are listed. Or no target is left
            beside the whole tensors.
        StateError: a target is shared or parametrized, for example by an attached adapter.
    """
    return _targets(_selected(model, config, plan_whole(model, config)), config)


def _targets(modules: Mapping[str, TargetModule], config: TrainConfig) -> dict[str, Target]:
    for what, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(module, pattern) for module in modules.values()):
                raise UnknownNameError(f"the {what} pattern {pattern!r} matches no target", hint=known(modules))
    targets, problems = {}, []
    for name, module in modules.items():
        rank = _last_match(module, config.rank_pattern, config.rank)
        matrix = module.layer.matrix_shape(module.weight.shape, module.groups)
        limit = min(matrix)
        if rank > limit and not config.clamp_rank:
            problems.append((f"rank {rank} is more than {name!r} can use: as a matrix it is {matrix}", limit))
        else:
            rank = min(rank, limit)
            alpha = _last_match(module, config.alpha_pattern, config.alpha)
            targets[name] = _target(module, config, rank, rank if alpha is None else alpha)
    if problems:
        least = min(limit for _, limit in problems)
        (first, _), *others = problems
        raise ConfigError(
            first,
            problems=[line for line, _ in others],
            hint=f"--rank {least} or less, --clamp-rank for the largest that each allows, or other --targets",
        )
    return targets


def plan_whole(model: nn.Module, config: TrainConfig) -> dict[str, WholeTensor]:
    """Return the metadata of each whole tensor that an adapter with these settings has, heads first.

    Args:
        model: the base model; it is only read.
        config: heads and norm count.

    Raises:
        UnknownNameError: there is no such layer, or it cannot be a head.
        ConfigError: the network has no normalisation layers that can adapt in this way.
        StateError: a head's weight is shared, or the model carries an adapter.
    """
    refuse_attached(model)
    state = model.state_dict()
    sizes: dict[str, int] = {}
    for path, outputs in config.heads.items():
        module, _ = find_head(model, path)
        sizes |= {tensor_name(path, name): outputs for name, _ in module.named_parameters(recurse=False)}
    refuse_shared(model, sizes)
    whole = {name: _whole(state[name], "head", (outputs, *state[name].shape[1:])) for name, outputs in sizes.items()}
    if config.norm != "frozen":
        norms = normalisation_tensors(model, affine=config.norm == "affine")
        if not norms:
            what = "running statistics" if config.norm == "stats" else "normalisation layers"
            raise ConfigError(f"the network has no {what} that can adapt", hint="without --norm")
        whole |= {name: _whole(state[name], "norm", tuple(state[name].shape)) for name in norms}
    return whole


def _whole(tensor: Tensor, role: str, shape: tuple[int, ...]) -> WholeTensor:
    return WholeTensor(
        role=role,
        shape=shape,
        dtype=dtype_code(tensor.dtype),
        base_sha256=tensor_sha256(tensor),
        base_shape=tuple(tensor.shape),
    )


def _selected(model: nn.Module, config: TrainConfig, whole: Mapping[str, WholeTensor]) -> dict[str, TargetModule]:
    modules = select_targets(model, config.targets, exclude=config.exclude)
    left = {name: module for name, module in modules.items() if name not in whole}
    if not left:
        raise ConfigError("nothing is left to adapt: all targets are replaced as a whole", hint="other --targets")
    return left


def _last_match(module: TargetModule, patterns: Mapping[str, Value], otherwise: Value) -> Value:
    found = [value for pattern, value in patterns.items() if matches(module, pattern)]
    return found[-1] if found else otherwise


def _target(module: TargetModule, config: TrainConfig, rank: int, alpha: int | float) -> Target:
    weight = module.weight
    return Target(
        kind=config.kind,
        rank=rank,
        alpha=alpha,
        scale_rule=config.scale_rule,
        shape=tuple(weight.shape),
        dtype=dtype_code(weight.dtype),
        layer=module.layer.name,
        groups=module.groups,
        base_sha256=tensor_sha256(weight),
        sketch=sketch(weight),
    )


def new_adapter(model: nn.Module, config: TrainConfig) -> Adapter:
    """Return an adapter with start values. It changes nothing yet, apart from its fresh heads.

    Raises:
        UnknownNameError, ConfigError, StateError: as for `plan_targets`.
    """
    whole = plan_whole(model, config)
    modules = _selected(model, config, whole)
    targets = _targets(modules, config)
    kind = KINDS[config.kind]
    generator = torch.Generator().manual_seed(config.seed)
    factors: dict[str, Tensor] = {}
    for name, target in targets.items():
        module = modules[name]
        matrix = module.layer.to_matrix(module.weight.detach(), module.groups)
        start = kind.init(matrix, target.rank, method=config.init, generator=generator)
        factors |= {f"{name}.{short}": factor for short, factor in start.items()}
    state = model.state_dict()
    tensors = {name: state[name].detach().cpu().clone() for name in whole}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for path, outputs in config.heads.items():
            fresh = fresh_head(find_head(model, path)[0], outputs)
            tensors |= {tensor_name(path, name): values.cpu() for name, values in fresh.items()}
    base = base_reference(state, model=model)
    return Adapter(targets=targets, factors=factors, base=base, whole=whole, tensors=tensors)


def parameter_report(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Count the parameters of the adapted layers and of the adapter.

    The adapter may be attached to the model.

    Returns:
        ``adapted``: parameters of the adapted layers, with biases. ``added``: numbers in the factors. ``percent``:
        100 * added / adapted. ``replaced``: numbers in whole tensors.
    """
    owners = {name.rpartition(".")[0] for name in adapter.targets}
    state = base_state_dict(model)
    adapted = sum(tensor.numel() for name, tensor in state.items() if name.rpartition(".")[0] in owners)
    replaced = sum(whole.parameters for whole in adapter.whole.values())
    percent = 100 * adapter.parameters / adapted
    return {"adapted": adapted, "added": adapter.parameters, "percent": percent, "replaced": replaced}
