"""How far are exported networks off, run by onnxruntime and by torch from the file?

usage: python scripts/bench/exported_networks.py [NAME ...] [--json]

Networks of torchvision and timm with fresh weights, images of one size each, `loraio.export` to both formats: the
largest difference as a share of the network's largest output, the size of the file, and the seconds until it had its
name.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import loraio
from loraio.exporting.outputs import RTOL

SIZES = {
    "torchvision:convnext_tiny": 64,
    "torchvision:densenet121": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:fcn_resnet50": 64,
    "torchvision:googlenet": 64,
    "torchvision:inception_v3": 96,
    "torchvision:lraspp_mobilenet_v3_large": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:resnet50": 224,
    "torchvision:shufflenet_v2_x1_0": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:swin_t": 64,
    "timm:mobilenetv4_conv_small": 64,
    "timm:resnet18": 64,
    "timm:vit_tiny_patch16_224": 224,
}
"""Pixels of an image's side."""


def measure(name: str, suffix: str, folder: Path) -> dict[str, Any]:
    """Export one network; `loraio.export` raises if the file computes something else."""
    loraio.save_base(loraio.build_network(name, seed=0), folder / "base.safetensors", overwrite=True)
    start = time.perf_counter()
    shape = (3, SIZES[name], SIZES[name])
    done = loraio.export(folder / "base.safetensors", folder / f"net{suffix}", input_shape=shape, overwrite=True)
    seconds = time.perf_counter() - start
    largest = [output.bound / RTOL[torch.float32] for output in done.outputs]
    assert min(largest) > 0, f"{name}: all outputs are zero, which compares nothing"
    share = max(output.max_abs / size for output, size in zip(done.outputs, largest, strict=True))
    return {"network": name, "format": done.format, "share": share, "bytes": done.bytes, "seconds": seconds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of SIZES without one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or SIZES:
            for suffix in (".onnx", ".pt2"):
                rows.append(measure(name, suffix, Path(folder)))
                if not options.json:
                    row = rows[-1]
                    words = f"off by {row['share']:.2g} of the largest output, {row['bytes']:,} bytes"
                    print(f"{name} {row['format']}: {words}, {row['seconds']:.1f} s", flush=True)
    if options.json:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}
        print(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
