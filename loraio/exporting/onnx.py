"""Networks as ``*.onnx``, for onnxruntime and other programs."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraio.errors import ConfigError
from loraio.exporting.runtimes import Run, Runtime, quiet, root_cause

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages of the extra ``loraio[onnx]``: torch writes with the first two, the third runs the file."""

MAX_BYTES = 2**31 - 1
"""The largest message of protobuf, and so the most that one ONNX file can hold."""


def check(network: nn.Module, dtype: torch.dtype) -> None:
    """Refuse a missing package, and a network that ONNX or onnxruntime cannot take."""
    for package in PACKAGES:
        _import(package)
    if dtype == torch.bfloat16:
        raise ConfigError(
            "the network is bfloat16, which onnxruntime does not take from NumPy", hint="name the output *.pt2"
        )
    tensors = {id(tensor): tensor.nbytes for tensor in (*network.parameters(), *network.buffers())}
    count = sum(tensors.values())
    if count > MAX_BYTES:
        raise ConfigError(
            f"the network has {count:,} bytes of weights, one ONNX file holds {MAX_BYTES:,} at most",
            hint="name the output *.pt2",
        )


def write(program: Any, path: Path, names: Sequence[str], opset: int | None) -> int:
    """Write a traced program; return its opset."""
    wanted: dict[str, Any] = {"input_names": ["input"], "output_names": list(names), "opset_version": opset}
    try:
        with quiet():
            written: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, **wanted)
            proto = written.model_proto
        _name_batch(proto.graph)
        data: bytes = proto.SerializeToString(deterministic=True)
    except Exception as error:  # each converter raises its own
        raise ConfigError(f"torch.onnx cannot convert the network: {root_cause(error)}") from error
    found = next(int(entry.version) for entry in proto.opset_import if not entry.domain)
    if opset not in (None, found):
        raise ConfigError(f"torch.onnx writes this network with opset {found}, not with {opset}")
    path.write_bytes(data)
    return found


def open_file(path: Path) -> Run:
    """Open a file with onnxruntime."""
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions too
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: [torch.from_numpy(array) for array in session.run(None, {"input": batch.numpy()})]


RUNTIME = Runtime(write=write, open=open_file, check=check, opsets=True)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs the package {name}, which cannot be imported: {error}", hint="pip install 'loraio[onnx]'"
        ) from error


def _name_batch(graph: Any) -> None:
    """Name the first dimension of the input "batch" wherever it occurs; torch gives it a number of its own."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info) if symbol else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)
