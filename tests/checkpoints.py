"""Checkpoints with weights of many layer types, and adapters for them, as files and in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from strategies import tensor
from torch import Tensor

import loraio
from loraio.adapter import Adapter, BaseReference, Target
from loraio.bases.identity import state_sha256, tensor_sha256
from loraio.files.sharded import INDEX_SUFFIX
from loraio.files.tensors import dtype_code

State = dict[str, Tensor]

SHAPES = {
    "Linear": (700, 800),  # more than is folded at once
    "Conv2d": (16, 3, 3, 3),
    "ConvTranspose2d": (8, 4, 2, 2),
    "Embedding": (9000, 40),  # likewise
    "Bilinear": (5, 6, 7),
}


def adapter_of(
    state: State, targets: Mapping[str, str], *, kind: str = "lora", rank: int = 3, seed: int = 1
) -> Adapter:
    """An adapter with random factors for weights of a state dict, whose layer types are given."""
    made, factors = {}, {}
    for name, layer in targets.items():
        made[name] = Target(
            rank=rank, alpha=4, kind=kind, shape=tuple(state[name].shape), dtype=dtype_code(state[name].dtype),
            layer=layer, base_sha256=tensor_sha256(state[name]),
        )  # fmt: skip
        for short, shape in made[name].factor_shapes.items():
            factors[f"{name}.{short}"] = tensor(shape, torch.float32, 1 + len(factors), 0.3)
    return Adapter(targets=made, factors=factors, base=BaseReference(sha256=state_sha256(state)))


def case(dtype: torch.dtype = torch.bfloat16, kind: str = "lora") -> tuple[State, Adapter]:
    """Weights of several layer types, some of them larger than a slice, among tensors that are no targets."""
    state = {f"{layer}.weight": tensor(shape, dtype, seed) for seed, (layer, shape) in enumerate(SHAPES.items())}
    adapted = {f"{layer}.weight": layer for layer in SHAPES}
    state |= {
        "large": tensor((3, 1500, 500), torch.float32, 7),  # more than a block
        "half": tensor((5,), torch.float16, 8),
        "steps": torch.tensor(7),
        "nothing": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }
    return state, adapter_of(state, adapted, kind=kind)


def saved(state: State, adapter: Adapter, folder: Path, prefix: str = "") -> tuple[Path, Path]:
    """Base and adapter as files."""
    folder.mkdir(exist_ok=True)
    save_file({prefix + name: values for name, values in state.items()}, folder / "base.safetensors")
    loraio.save(adapter, folder / "adapter.safetensors", overwrite=True)
    return folder / "base.safetensors", folder / "adapter.safetensors"


def parted(state: State, adapter: Adapter, folder: Path, *, count: int = 3, prefix: str = "") -> tuple[Path, Path]:
    """The same with the base in parts; its folder is returned."""
    folder.mkdir()
    names, places = list(state), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = {prefix + name: state[name] for name in names[number::count]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, file)
    size = sum(values.nbytes for values in state.values())
    index = {"metadata": {"total_size": size, "kept": "x"}, "weight_map": places}
    (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index))
    path = folder.parent / "adapter.safetensors"
    loraio.save(adapter, path, overwrite=True)
    return folder, path


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
