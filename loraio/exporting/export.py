"""Write a network for other programs, and run the file before it gets its name."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraio.bases.checkpoints import read_base
from loraio.bases.models import model_from, stripped_of
from loraio.bases.networks import input_shape_of, network_of
from loraio.errors import ConfigError, VerificationError
from loraio.exporting import onnx, pt2
from loraio.exporting.outputs import RTOL, ExportedOutput, compare, expected_outputs
from loraio.exporting.runtimes import Runtime, quiet, root_cause
from loraio.files.atomic import check_output, staged
from loraio.files.sharded import checkpoint_files
from loraio.registry import lookup

RUNTIMES = {".onnx": onnx.RUNTIME, ".pt2": pt2.RUNTIME}
"""By the ending of the file's name."""

BATCHES = (1, 3)
"""Batch sizes that every file is run with: not the one of the trace, and the one that tracers like to make constant."""

_TRACED_BATCH = 2  # torch.export makes sizes 0 and 1 constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that `export` wrote.

    Attributes:
        path: the file.
        format: "onnx" or "pt2".
        bytes: its size.
        opset: of an ONNX file; None for others.
        network: the network's name.
        input_shape: of one sample; the batch may have any size.
        batches: the batch sizes that it was run with.
        outputs: how far each of its outputs is off.
        stripped: the prefix that was taken off the names of the checkpoint.
    """

    path: Path
    format: str
    bytes: int
    opset: int | None
    network: str
    input_shape: tuple[int, ...]
    batches: tuple[int, ...]
    outputs: tuple[ExportedOutput, ...]
    stripped: str

    @property
    def max_abs(self) -> float:
        """The largest absolute difference of all outputs."""
        return max(output.max_abs for output in self.outputs)


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    opset: int | None = None,
    batches: Sequence[int] = (),
    seed: int = 1,
    rtol: float | None = None,
    atol: float = 0.0,
    overwrite: bool = False,
) -> Exported:
    """Write a checkpoint's network for other programs, with its weights, in eval mode, for batches of any size.

    The file is written under a temporary name, read back, and run on random inputs in [0, 1): by onnxruntime, or by
    torch from the file alone. It gets its name only if it computes the same as the network.

    Args:
        checkpoint: a merged checkpoint or any other base; see `loraio.read_base`.
        output: the file to make: ``*.onnx``, or ``*.pt2`` for ``torch.export.load``.
        model, model_args: as `loraio.load_base`.
        input_shape: of one sample, (channels, height, width) for images; only needed where the network's name does not
            say it, or for another size.
        opset: of the ONNX file; torch's own default without it.
        batches: sizes of batches that are compared besides `BATCHES`.
        seed: of the inputs.
        rtol: allowed difference as a share of the largest output; by default `RTOL` of the network's dtype.
        atol: allowed difference besides.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file is there already, is an input, or cannot be written.
        UnknownNameError: the name ends otherwise, or the network is not known.
        ConfigError: a package for ONNX is missing, or the input shape is not known or does not fit, or the outputs are
            not a tensor or a flat list or dict of tensors with a row for each sample, or torch cannot export it.
        VerificationError: the file cannot be run, or computes something else; it was removed.
        MissingFileError, FormatError, BaseMismatchError: as `loraio.load_base`.
    """
    suffix, where = Path(output).suffix.lower(), f"{os.fspath(output)!r}"
    runtime = lookup(RUNTIMES, suffix, what="export format")
    if opset is not None and not runtime.opsets:
        raise ConfigError(f"an opset, {opset}, is for *.onnx, not for {where}")
    _check_settings(batches, input_shape, atol=atol, rtol=rtol)
    check_output(output, overwrite=overwrite, inputs=checkpoint_files(checkpoint))
    read = read_base(checkpoint).for_network(model, model_args)
    network = model_from(read)
    shape = _input_shape(network, input_shape)
    dtype = next((tensor.dtype for tensor in network.parameters() if tensor.dtype in RTOL), torch.float32)
    runtime.check(network, dtype)
    sizes = (*BATCHES, *batches)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(size, *shape, generator=generator).to(dtype) for size in sizes]
    expected = expected_outputs(network, inputs)
    with staged(output, overwrite=overwrite, inputs=[read.path, *read.parts]) as temporary:
        program = _trace(network, torch.zeros(_TRACED_BATCH, *shape, dtype=dtype))
        opset = runtime.write(program, temporary, list(expected), opset)
        found = _run_file(temporary, runtime, inputs, where)
        outputs = compare(expected, found, atol=atol, rtol=RTOL[dtype] if rtol is None else rtol)
        problems = [str(one) for one in outputs if not one.ok]
        if problems:
            raise VerificationError(
                "the exported network computes something else; nothing was written", problems=problems, where=where
            )
        size = temporary.stat().st_size
    return Exported(
        path=Path(output),
        format=suffix.removeprefix("."),
        bytes=size,
        opset=opset,
        network=network_of(network) or "",
        input_shape=shape,
        batches=sizes,
        outputs=outputs,
        stripped=stripped_of(network),
    )


def _check_settings(batches: Sequence[int], shape: Sequence[int] | None, *, atol: float, rtol: float | None) -> None:
    for setting, sizes in (("batch sizes", batches), ("an input shape", () if shape is None else shape)):
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ConfigError(f"{setting} cannot be {tuple(sizes)}", hint="whole numbers of at least 1")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value}, not a finite number of at least 0")


def _input_shape(network: nn.Module, asked: Sequence[int] | None) -> tuple[int, ...]:
    if asked is not None:
        return tuple(asked)
    shape = input_shape_of(network)
    if shape is None:
        raise ConfigError(
            f"the input shape of {network_of(network)!r} is not known",
            hint="--input-shape 3,224,224 (input_shape= in Python), of one sample",
        )
    return tuple(shape)


def _trace(network: nn.Module, example: Tensor) -> Any:
    """Trace a network with torch.export for batches of any size, without the paths of source files that torch adds.

    Raises:
        ConfigError: torch cannot trace it, or not for batches of any size.
    """
    try:
        with quiet(), torch.no_grad():
            batch = torch.export.Dim("batch", min=1, max=2**31 - 1)  # torch 2.6 guards against sizes without a bound
            program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch names no class
        raise ConfigError(f"torch.export cannot export the network: {root_cause(error)}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    program._example_inputs = None  # they would be written too; the setter of torch 2.6 refuses None
    return program


def _run_file(path: Path, runtime: Runtime, inputs: Sequence[Tensor], where: str) -> list[list[Tensor]]:
    """Run the written file on each batch.

    Raises:
        VerificationError: it cannot be read or run.
    """
    try:
        run = runtime.open(path)
        return [run(batch) for batch in inputs]
    except Exception as error:  # onnxruntime's own classes have no common root
        raise VerificationError(
            f"the exported network cannot be run; nothing was written: {root_cause(error)}", where=where
        ) from error
