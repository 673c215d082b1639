"""Put an adapter on one layer with each tool, as its own documents say.

PEFT: `get_peft_model` with `target_modules`, `merge_adapter(safe_merge=
True)`, `unmerge_adapter`, `unload`; where it takes no such module, `target_parameters`. LyCORIS: `create_lycoris`,
`apply_to`, `restore`, `merge_to`; for merge and back `merge_to(1, precise=True)` and `merge_to(-1, precise=True)`, with
dora (whose lengths a precise merge leaves out) `onfly_merge` and `onfly_restore` (on the CPU what these keep is the
weight itself, not a copy); where it makes no module, its parametrize API. minLoRA: `add_lora` with a configuration for
the layer, `merge_lora`, `remove_lora`; its parametrization is asked for any weight, not only those that it names.
loraio: `attach` and `merge`; its way back from a merge is that the base was never written to.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loraio

RANK, ALPHA = 4, 8
"""Four divides by every number of groups in the grid, which PEFT asks for; the scale is 2, so that a lost one shows."""

State = dict[str, Tensor]


class Only(nn.Module):
    """A network of one layer, `inner`, whose input is a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The layer's output; of attention without its weights."""
        result = self.inner(*inputs)
        return result[0] if isinstance(result, tuple) else result


class AdaptsNothingError(Exception):
    """The tool does nothing for this layer, without an error of its own."""


@dataclass(kw_only=True)
class Attached:
    """A tool's adapter on a network, as the five things that are asked of it; None where the tool has no such thing.

    Attributes:
        forward: output with the adapter attached.
        weights: the adapted weights by the tool's formula, float64, by their names in the base; read before a merge.
        merge: merges, and gives the merged network.
        unmerge: goes on from there: back to the base by the tool's own way, giving the state dict.
        detach: in place of merge: takes the adapter off, giving the state dict.
    """

    forward: Callable[[Any], Tensor]
    weights: Callable[[], State | None]
    merge: Callable[[], nn.Module]
    unmerge: Callable[[], State] | None
    detach: Callable[[], State]


def randomize(parameters: Mapping[str, Tensor], lengths: str) -> None:
    """Random factors; DoRA's lengths, those with this word in their name, are stretched or shrunk a little."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if lengths in name:
            parameter.data.mul_(1.0 + 0.5 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
        else:
            parameter.data.normal_(std=0.3, generator=generator)


def lowrank(W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor | None) -> Tensor:
    """``W + scale * (B @ A)`` for a matrix in float64; with lengths m, its rows at these lengths."""
    V = W.double() + scale * (B.double().flatten(1) @ A.double().flatten(1))
    return V if m is None else V * (m.double().flatten() / V.square().sum(1).sqrt())[:, None]


class Loraio:
    """This package."""

    kinds = ("lora", "dora")

    def __init__(self) -> None:
        self.version = loraio.__version__

    def attach(self, model: Only, kind: str) -> Attached:
        """One adapter for every weight; its rank is smaller where a weight matrix is."""
        config = loraio.TrainConfig(kind=kind, rank=RANK, alpha=ALPHA, targets=("all",), clamp_rank=True)
        adapter = loraio.new_adapter(model, config)
        factors = {name: factor.clone() for name, factor in adapter.factors.items()}
        randomize(factors, "magnitude")
        adapter = replace(adapter, factors=factors)
        live = loraio.attach(model, adapter)
        groups = getattr(model.inner, "groups", 1)

        def base() -> State:
            return dict(loraio.base_state_dict(model))

        def weights() -> State:
            state, new = base(), {}
            for name, target in adapter.targets.items():
                own = adapter.factors_of(name)
                A, B, m = own["lora_A"], own["lora_B"], own.get("magnitude")
                W = self.rows(state[name], target.layer, groups)
                folded = lowrank(W, A, B, ALPHA / len(A), m)
                new[name] = self.unrows(folded, target.layer, groups, state[name].shape)
            return new

        def merge() -> nn.Module:
            live.detach()
            merged = copy.deepcopy(model)
            merged.load_state_dict(loraio.merge(model.state_dict(), adapter))
            return merged

        def detach() -> State:
            live.detach()
            return dict(model.state_dict())

        return Attached(
            forward=model, weights=weights, merge=merge, unmerge=lambda: dict(model.state_dict()), detach=detach
        )

    @staticmethod
    def rows(weight: Tensor, layer: str, groups: int) -> Tensor:
        """A row for each output channel, as format.md says."""
        if layer == "Embedding":
            return weight.T
        if "Transpose" in layer:
            return torch.cat([part.transpose(0, 1).flatten(1) for part in weight.chunk(groups)])
        return weight.flatten(1)

    @staticmethod
    def unrows(matrix: Tensor, layer: str, groups: int, shape: torch.Size) -> Tensor:
        """The weight of these rows."""
        if layer == "Embedding":
            return matrix.T
        if "Transpose" in layer:
            inverse = (shape[1], shape[0] // groups, *shape[2:])
            return torch.cat([part.reshape(inverse).transpose(0, 1) for part in matrix.chunk(groups)])
        return matrix.reshape(shape)


class Peft:
    """Hugging Face PEFT."""

    kinds = ("lora", "dora")

    def __init__(self) -> None:
        self.peft = importlib.import_module("peft")
        self.version = self.peft.__version__

    def attach(self, model: Only, kind: str) -> Attached:
        """By module, and by parameter where the module is none of PEFT's."""
        untouched = copy.deepcopy(model)
        settings = {"r": RANK, "lora_alpha": ALPHA, "use_dora": kind == "dora"}
        try:
            wrapped = self.peft.get_peft_model(model, self.peft.LoraConfig(target_modules=["inner"], **settings))
        except ValueError as error:
            names = [f"inner.{name}" for name, _ in untouched.inner.named_parameters(recurse=False) if "weight" in name]
            config = self.peft.LoraConfig(target_modules=[], target_parameters=names, **settings)
            try:
                wrapped = self.peft.get_peft_model(untouched, config)
            except Exception:
                raise error from None
        wrapped.eval()
        randomize({n: p for n, p in wrapped.named_parameters() if "lora_" in n}, "magnitude")

        def merge() -> nn.Module:
            wrapped.merge_adapter(safe_merge=True)
            return wrapped

        def detach() -> State:
            return dict(wrapped.unload().state_dict())

        def unmerge() -> State:
            wrapped.unmerge_adapter()
            return detach()

        return Attached(
            forward=wrapped, weights=partial(self.weights, wrapped), merge=merge, unmerge=unmerge, detach=detach
        )

    def weights(self, wrapped: nn.Module) -> State | None:
        """From lora_A, lora_B and the scaling that each layer has."""
        tuners = importlib.import_module("peft.tuners.lora.layer")
        new: State = {}
        for path, module in list(wrapped.named_modules()):
            if not isinstance(module, tuners.LoraLayer):
                continue
            base, scale = module.get_base_layer(), module.scaling["default"]
            name = path.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight"
            m = module.lora_magnitude_vector["default"].weight if module.use_dora.get("default") else None
            if isinstance(module, tuners.Embedding):
                A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
                new[name] = lowrank(base.weight.T, A, B, scale, m).T
                continue
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            parameter = getattr(module, "parameter_name", None)
            if isinstance(module, tuners.MultiheadAttention):
                parameter = "in_proj_weight"
            if getattr(base, "groups", 1) != 1:
                return None  # A sees all channels: no weight of the layer's shape does the same
            name = name.removesuffix("weight") + (parameter or "weight")
            W = getattr(base, parameter or "weight")
            if W.ndim == 3 and isinstance(module, tuners.ParamWrapper):  # a pair for each matrix, B's interleaved
                pairs = zip(W, A.chunk(len(W)), (B[:, i :: len(W)] for i in range(len(W))), strict=True)
                new[name] = torch.stack([lowrank(w, a, b, scale, None) for w, a, b in pairs])
            else:
                new[name] = lowrank(W.flatten(1), A, B, scale, m).reshape(W.shape)
        return new


class Lycoris:
    """LyCORIS."""

    kinds = ("lora", "dora")

    def __init__(self) -> None:
        self.lycoris = importlib.import_module("lycoris")
        self.version = importlib.metadata.version("lycoris_lora")
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)

    def attach(self, model: Only, kind: str) -> Attached:
        """By the wrapper, and by parametrization where it makes no module."""
        self.lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": ["inner.*"]})
        network = self.lycoris.create_lycoris(
            model, 1.0, linear_dim=RANK, linear_alpha=ALPHA, algo="lora", dora_wd=kind == "dora",
            warn_on_unmatched=False,
        )  # fmt: skip
        if not network.loras:
            return self.parametrized(model, kind)
        network.apply_to()
        network.eval()
        randomize(dict(network.named_parameters()), "dora_scale")
        names = {module: f"{path}.weight" for path, module in model.named_modules()}

        def merge() -> nn.Module:
            network.restore()
            network.merge_to(1.0)
            return model

        def detach() -> State:
            network.restore()
            return dict(model.state_dict())

        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def unmerge() -> State:
            model.load_state_dict(base)
            if kind == "lora":
                network.merge_to(1.0, precise=True)
                network.merge_to(-1.0, precise=True)
            else:
                network.onfly_merge()
                network.onfly_restore()
            return dict(model.state_dict())

        return Attached(
            forward=model,
            weights=lambda: {names[part.org_module[0]]: self.weight(part) for part in network.loras},
            merge=merge,
            unmerge=unmerge,
            detach=detach,
        )

    def parametrized(self, model: Only, kind: str) -> Attached:
        """Through torch, which also merges and takes off."""
        locon = importlib.import_module("lycoris.modules.locon").LoConModule
        names = [name for name, _ in model.inner.named_parameters(recurse=False) if "weight" in name]
        parts = {}
        for name in names:
            parts[name] = locon.parametrize(
                model.inner, name, lora_dim=RANK, alpha=ALPHA, weight_decompose=kind == "dora"
            ).eval()
            randomize({n: p for n, p in parts[name].named_parameters() if n.startswith(("lora", "dora"))}, "dora_scale")

        def off(merge: bool) -> nn.Module:
            for name in names:
                parametrize.remove_parametrizations(model.inner, name, leave_parametrized=merge)
            return model

        return Attached(
            forward=model,
            weights=lambda: {f"inner.{name}": self.weight(part) for name, part in parts.items()},
            merge=partial(off, True),
            unmerge=None,
            detach=lambda: dict(off(False).state_dict()),
        )

    @staticmethod
    def weight(part: Any) -> Tensor:
        """From lora_up, lora_down, scale and dora_scale."""
        W = part.org_module[0].weight
        delta = part.lora_up.weight.flatten(1).double() @ part.lora_down.weight.flatten(1).double()
        V = W.double() + part.scale * delta.reshape(W.shape)
        if not part.wd:
            return V
        return V * part.dora_scale.double() / V.flatten(1).norm(dim=1).reshape(part.dora_scale.shape)


class MinLora:
    """minLoRA."""

    kinds = ("lora",)

    def __init__(self) -> None:
        self.minlora = importlib.import_module("minlora")
        try:
            self.version = importlib.metadata.version("minlora")
        except importlib.metadata.PackageNotFoundError:
            self.version = "of unknown version"

    def attach(self, model: Only, kind: str) -> Attached:
        """With an entry of its configuration for each weight of the layer, and for attention's output."""
        inner, table = model.inner, isinstance(model.inner, nn.Embedding)

        def made(layer: nn.Module, name: str) -> nn.Module:
            fan_out, fan_in = getattr(layer, name).flatten(1).shape
            if table:
                fan_out, fan_in = fan_in, fan_out
            return self.minlora.LoRAParametrization(
                fan_in, fan_out, fan_in_fan_out=table, rank=RANK, lora_alpha=ALPHA
            )  # fmt: skip

        config: dict[type, dict[str, Any]] = {}
        owners: dict[str, tuple[nn.Module, str]] = {}
        for full, _ in list(model.named_parameters()):
            path, _, name = full.rpartition(".")
            if "weight" in name:
                owner = model.get_submodule(path)
                owners[full] = owner, name
                config.setdefault(type(owner), {})[name] = partial(made, name=name)
        self.minlora.add_lora(model, lora_config=config)
        if not hasattr(inner, "parametrizations"):
            raise AdaptsNothingError("no weight of the layer was adapted")
        randomize({n: p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}, "no lengths")

        def weights() -> State:
            new = {}
            for full, (owner, name) in owners.items():
                part, W = owner.parametrizations[name][0], owner.parametrizations[name].original
                first, second = (part.lora_A, part.lora_B) if table else (part.lora_B, part.lora_A)
                new[full] = W.double() + ALPHA / RANK * (first.double() @ second.double()).reshape(W.shape)
            return new

        def merge() -> nn.Module:
            self.minlora.merge_lora(model)
            return model

        def detach() -> State:
            self.minlora.remove_lora(model)
            return dict(model.state_dict())

        return Attached(forward=model, weights=weights, merge=merge, unmerge=None, detach=detach)


TOOLS: dict[str, Callable[[], Any]] = {"loraio": Loraio, "PEFT": Peft, "LyCORIS": Lycoris, "minLoRA": MinLora}
