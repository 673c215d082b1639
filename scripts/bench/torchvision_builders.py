"""Does an adapter go onto every classification network of torchvision, come off again, and merge?

usage: python scripts/bench/torchvision_builders.py [--only NAME]... [--rank R] [--json]

For each builder, with random weights and no download: an adapter with random factors on every convolution and linear
weight, rank 4 or the most that the weight's matrix allows; attached; one image through the network in eval mode, 64x64
or the least that it takes; detached, and every Parameter object, bit and key compared; merged; the merged weights
verified, compared with the attached ones, and run on the same image. BatchNorm first takes its statistics from two
images, since random weights without them let the signal vanish. One network at a time, freed before the next. Exit
code 1 if one fails.

--only takes builders by name, those of the segmentation and detection lists too, and may be repeated. With --json: one
object with `versions`, `networks` (a list: `name`, `ok`, `problem`, `targets`, `refused`, `parameters`, `added`,
`image`, `effect`, `max_ulp`, `seconds`) and `failed`, a list of names.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models

import loraio
from loraio.adapter.kinds import KINDS
from loraio.bases.identity import state_sha256
from loraio.bases.networks import find_network, network_of
from loraio.bases.targets import TargetModule, target_modules
from loraio.errors import LoraioError
from loraio.files.tensors import dtype_code, tensor_bytes, tensor_sha256

USUAL_SIZE = 64
"""Side of the image where the network does not ask for a larger one."""


def main() -> None:
    """Run the builders in turn, print a row for each and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this builder; may be repeated")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    versions = {"loraio": loraio.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["python"] = platform.python_version()
    if not options.json:
        print(", ".join(f"{name} {version}" for name, version in versions.items()), f"rank {options.rank}", sep=", ")
        print(f"{'network':<24} {'targets':>7} {'parameters':>13} {'added':>11} {'image':>5} {'max ulp':>8} {'s':>6}")
    rows = []
    for name in options.only or models.list_models(module=models):
        rows.append(run(name, options.rank))
        gc.collect()
        if not options.json:
            print(line(rows[-1]), flush=True)
    failed = [row["name"] for row in rows if not row["ok"]]
    if options.json:
        print(json.dumps({"versions": versions, "networks": rows, "failed": failed}))
    else:
        targets = sum(row.get("targets", 0) for row in rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        right = len(rows) - len(failed)
        print(f"{right} of {len(rows)} networks right, {targets:,} weights adapted, {peak:.1f} GB at most")
        for row in rows:
            for reason in row.get("refused", []):
                print(f"  {row['name']}: {reason}")
            if row.get("effect") == 0:
                print(f"  {row['name']}: with these random weights no output depends on the image or the adapter")
            if not row["ok"]:
                print(f"  {row['name']} failed: {row['problem']}")
    sys.exit(bool(failed))


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if not row["ok"]:
        return f"{row['name']:<24} FAILED: {row['problem']}"
    return (
        f"{row['name']:<24} {row['targets']:>7,} {row['parameters']:>13,} {row['added']:>11,} {row['image']:>5} "
        f"{row['max_ulp']:>8.6f} {row['seconds']:>6.1f}"
    )


def run(name: str, rank: int) -> dict[str, Any]:
    """Everything for one builder; a failure is a row that says why."""
    start = time.perf_counter()
    try:
        facts = check(name, rank)
        problem = None
    except (LoraioError, AssertionError, RuntimeError) as error:
        facts, problem = {}, f"{type(error).__name__}: {error}"
    return {"name": name, "ok": problem is None, "problem": problem, **facts, "seconds": time.perf_counter() - start}


@torch.no_grad()
def check(name: str, rank: int) -> dict[str, Any]:
    """Attach, forward, detach, merge, verify; an AssertionError says what was not as it must be."""
    model = loraio.build_network(f"torchvision:{name}", seed=0)
    side = image_size(name)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    if name in models.list_models(module=models):
        set_statistics(model, (3, side, side))
    before = [(key, parameter, tensor_bytes(parameter).clone()) for key, parameter in model.named_parameters()]
    digest, keys = state_sha256(model.state_dict()), list(model.state_dict())
    targets, refused = usable_targets(model)
    adapter = random_adapter(model, targets, rank, digest)
    plain = outputs(model, image)
    live = loraio.attach(model, adapter)
    attached = outputs(model, image)
    used = {key: target.weight for key, target in targets.items()}
    live.detach()
    assert list(model.state_dict()) == keys, "detach changed the state dict's keys or their order"
    after = list(model.named_parameters())
    assert [key for key, _ in after] == [key for key, _, _ in before], "detach changed the order of the parameters"
    for (key, found), (_, parameter, bits) in zip(after, before, strict=True):
        assert found is parameter, f"{key!r} is another Parameter after detach"
        assert tensor_bytes(found).equal(bits), f"{key!r} has other bits after detach"
    assert state_sha256(model.state_dict()) == digest, "a buffer has other bits after detach"
    del before, after
    state = model.state_dict()
    merged = loraio.merge(state, adapter)
    report = loraio.verify_weights(state, adapter, merged)
    assert report.ok, f"merged weights are wrong: {'; '.join(report.problems[:3])}"
    for key, weight in used.items():
        assert tensor_bytes(weight).equal(tensor_bytes(merged[key])), f"{key!r}: attached and merged weights differ"
        assert not weight.equal(state[key]), f"{key!r}: the adapter changed nothing"
    model.load_state_dict(merged, assign=True)
    folded = outputs(model, image)
    assert same(attached, folded), "the merged network computes other bits than the attached adapter"
    return {
        "targets": len(adapter.targets),
        "refused": refused,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "added": adapter.parameters,
        "image": side,
        "effect": effect(plain, attached),
        "max_ulp": report.max_ulp,
    }


def set_statistics(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Let every BatchNorm take the mean and variance of what two random images bring it."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(3)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def usable_targets(model: nn.Module) -> tuple[dict[str, TargetModule], list[str]]:
    """Every convolution and linear weight, and a line for each that loraio refuses."""
    found = {name: t for name, t in target_modules(model).items() if t.layer.group in ("conv", "linear")}
    refused = []
    for name in list(found):
        try:
            loraio.bases.targets.refuse_unusable(found[name])
            loraio.bases.targets.refuse_shared(model, [name])
        except LoraioError as error:
            refused.append(f"{name!r}: {error.message}")
            del found[name]
    return found, refused


def random_adapter(model: nn.Module, modules: Mapping[str, TargetModule], rank: int, digest: str) -> loraio.Adapter:
    """An adapter whose factors are all random, each at most of the rank that its matrix allows."""
    generator = torch.Generator().manual_seed(1)
    targets, factors = {}, {}
    for name, module in modules.items():
        weight = module.weight
        matrix = module.layer.matrix_shape(weight.shape, module.groups)
        targets[name] = loraio.Target(
            rank=min(rank, *matrix),
            alpha=1,
            shape=tuple(weight.shape),
            dtype=dtype_code(weight.dtype),
            layer=module.layer.name,
            groups=module.groups,
            base_sha256=tensor_sha256(weight),
        )
        for short, shape in KINDS["lora"].shapes(*matrix, targets[name].rank).items():
            factors[f"{name}.{short}"] = 0.02 * torch.randn(shape, generator=generator)
    base = loraio.BaseReference(sha256=digest, network=network_of(model))
    return loraio.Adapter(targets=targets, factors=factors, base=base)


def image_size(name: str) -> int:
    """The usual size, or the least that the builder's weights say, without loading any; the network's own at most."""
    least = models.get_model_weights(name).DEFAULT.meta.get("min_size", (1, 1))
    shape = find_network(f"torchvision:{name}").input_shape
    side = max(USUAL_SIZE, *least)
    return min(side, shape[1]) if shape else side


def outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The network's outputs for the image, as a flat list; detection networks take a list of images."""
    detects = hasattr(model, "roi_heads") or hasattr(model, "anchor_generator")
    return flat(model(list(image) if detects else image))


def flat(found: Any) -> list[Tensor]:
    """All tensors of a nest of lists and dicts."""
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, Mapping) else found
    return [tensor for part in parts for tensor in flat(part)]


def effect(plain: list[Tensor], attached: list[Tensor]) -> float | None:
    """Largest difference of two outputs; None where there are other detections, 0 where there are none at all."""
    if [x.shape for x in plain] != [x.shape for x in attached]:
        return None
    return max((float((a - b).abs().max()) for a, b in zip(plain, attached, strict=True) if a.numel()), default=0.0)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return True if the outputs are the same numbers."""
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
