"""Networks that leave for other programs, as ONNX or torch.export files; each is run before it gets its name."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraio.bases.checkpoints import model_from, read_base, stripped_of
from loraio.bases.networks import find_network, network_args_of, network_of
from loraio.errors import ConfigError, VerificationError
from loraio.files.atomic import check_output, staged
from loraio.files.sharded import checkpoint_files
from loraio.registry import lookup

BATCHES = (1, 3)
"""Batch sizes that every file is run with: another one than the network was traced with, and the one that tracers
like to take for a constant."""

RTOL = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""For each dtype of the network the share of the largest output that any may be off by. Other programs sum in another
order, and onnxruntime folds normalisation into convolutions; weights in half precision would be off by more."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra ``loraio[onnx]`` brings: torch writes with the first two, the third runs what was written."""

MAX_ONNX_BYTES = 2**31 - 1
"""What protobuf writes into one message, and so what an ONNX file without files beside it can hold."""

_TRACED_BATCH = 2  # torch.export takes sizes 0 and 1 for constants

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedOutput:
    """One output of an exported network against that of the network itself.

    Attributes:
        name: "output", or the key or the place in what the network gives.
        shape: for one sample.
        max_abs: largest absolute difference; infinite where shapes or dtypes differ or a number is not finite.
        bound: what it may be: ``atol + rtol * the largest output``.
        argmax_agreement: share, 0 to 1, of the places where both name the same class along the first dimension of
            ``shape``; None for outputs of one number.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    bound: float
    argmax_agreement: float | None

    @property
    def ok(self) -> bool:
        """Whether the difference is within the bound."""
        return self.max_abs <= self.bound < math.inf


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
        stripped: what was taken off the names of the checkpoint.
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
    torch from the file alone. It gets its name if it computes what the network does.

    Args:
        checkpoint: a merged checkpoint or any other base; see `loraio.bases.read_base`.
        output: the file to make: ``*.onnx``, or ``*.pt2`` for ``torch.export.load``.
        model, model_args: as `loraio.load_base`.
        input_shape: of one sample, (channels, height, width) for images; only needed where the network's name does not
            say it, or for another size.
        opset: of the ONNX file; torch's own default without it.
        batches: sizes of batches that are compared besides `BATCHES`.
        seed: of the inputs.
        rtol: the share of the largest output that any may be off by; that of `RTOL` without it.
        atol: what it may be off by besides.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file is there already, is an input, or cannot be written.
        UnknownNameError: the name ends otherwise, or the network is not known.
        ConfigError: a package for ONNX is missing, the input shape is not known or not the
            network's, what it gives is no tensor nor a flat list or dict of them with a row for each sample, or it
            cannot be exported.
        VerificationError: the file cannot be run, or computes something else; it was removed.
        MissingFileError, FormatError, BaseMismatchError: as `loraio.load_base`.
    """
    suffix = Path(output).suffix.lower()
    made = lookup(FORMATS, suffix, what="export format")
    if opset is not None and suffix != ".onnx":
        raise ConfigError(f"an opset, {opset}, is for *.onnx, not for {os.fspath(output)!r}")
    _check_settings(batches, input_shape, atol=atol, rtol=rtol)
    if suffix == ".onnx":
        for package in ONNX_PACKAGES:
            _package(package)
    check_output(output, overwrite=overwrite, inputs=checkpoint_files(checkpoint))
    read = read_base(checkpoint).for_network(model, model_args)
    network = model_from(read)
    shape = _shape_of(network, input_shape)
    dtype = next((tensor.dtype for tensor in network.parameters() if tensor.dtype in RTOL), torch.float32)
    if suffix == ".onnx":
        _check_onnx(network, dtype)
    rtol = RTOL[dtype] if rtol is None else rtol
    sizes = (*BATCHES, *batches)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(size, *shape, generator=generator).to(dtype) for size in sizes]
    expected = _answers(network, inputs)
    where = f"{os.fspath(output)!r}"
    with staged(output, overwrite=overwrite, inputs=[read.path, *read.parts]) as temporary:
        program = _traced(network, torch.zeros(_TRACED_BATCH, *shape, dtype=dtype))
        opset = made.write(program, temporary, list(expected), opset)
        outputs = _compare(expected, _found(temporary, made, inputs, where), atol=atol, rtol=rtol)
        problems = [_line(found) for found in outputs if not found.ok]
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
    for what, sizes in (("batch sizes", batches), ("an input shape", () if shape is None else shape)):
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ConfigError(f"{what} cannot be {tuple(sizes)}", hint="whole numbers of at least 1")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value}, not a finite number of at least 0")


def _shape_of(network: nn.Module, asked: Sequence[int] | None) -> tuple[int, ...]:
    if asked is not None:
        return tuple(asked)
    name = network_of(network) or ""
    shape = find_network(name, network_args_of(network)).input_shape
    if shape is None:
        raise ConfigError(
            f"which inputs {name!r} takes is not known",
            hint="--input-shape 3,224,224 (input_shape= in Python), of one sample",
        )
    return tuple(shape)


def _check_onnx(network: nn.Module, dtype: torch.dtype) -> None:
    """Refuse, before any work, what ONNX or onnxruntime cannot take."""
    if dtype == torch.bfloat16:
        raise ConfigError(
            "the network is bfloat16, which onnxruntime does not take from NumPy", hint="name the output *.pt2"
        )
    tensors = {id(tensor): tensor.nbytes for tensor in (*network.parameters(), *network.buffers())}
    count = sum(tensors.values())
    if count > MAX_ONNX_BYTES:
        raise ConfigError(
            f"the network has {count:,} bytes of weights, one ONNX file holds {MAX_ONNX_BYTES:,} at most",
            hint="name the output *.pt2",
        )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs the package {name}, which cannot be imported: {error}", hint="pip install 'loraio[onnx]'"
        ) from error


def _answers(network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the network gives for all inputs, by the names of its outputs.

    Raises:
        ConfigError: it does not take them, or gives something that is not tensors with a row for each sample, or not
            finite.
    """
    answers: list[dict[str, Tensor]] = []
    for batch in inputs:
        try:
            with torch.no_grad():
                given = network(batch)
        except Exception as error:  # a network of the user's own may raise anything
            raise ConfigError(
                f"the network does not take inputs of shape {tuple(batch.shape)}: {_words(error)}",
                hint="--input-shape (input_shape= in Python), of one sample",
            ) from error
        answers.append(_named(given))
        for name, tensor in answers[-1].items():
            if tensor.shape[:1] != batch.shape[:1] or not tensor.numel():
                found = f"{name!r} of the network is {tuple(tensor.shape)} for {len(batch)} samples"
                raise ConfigError(f"{found}, not a row of numbers for each")
    together = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    for name, tensor in together.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{name!r} of the network is NaN or infinite, which compares with nothing")
    return together


def _named(given: Any) -> dict[str, Tensor]:
    if isinstance(given, Tensor):
        return {"output": given}
    named = {}
    if isinstance(given, Mapping):
        named = {str(key): value for key, value in given.items()}
    elif isinstance(given, tuple | list):
        named = {f"output_{number}": value for number, value in enumerate(given)}
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise ConfigError(
            f"the network gives {type(given).__name__}, not a tensor nor a flat tuple, list or dict of tensors"
        )
    return named


def _traced(network: nn.Module, example: Tensor) -> Any:
    """The network as a torch.export program, without the places of source files that torch notes in it.

    Raises:
        ConfigError: torch cannot trace it, or not for batches of any size.
    """
    try:
        with _quiet(), torch.no_grad():
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch names no class
        raise ConfigError(f"torch.export cannot export the network: {_words(error)}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    program.example_inputs = None  # would be written too
    return program


def _write_pt2(program: Any, path: Path, names: Sequence[str], opset: int | None) -> None:
    buffer = io.BytesIO()  # of a path the name would go into the bytes, and a full disk would be an error of torch's
    with _quiet():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def _open_pt2(path: Path) -> Run:
    with _quiet(), path.open("rb") as file:
        network = torch.export.load(file).module()

    def run(batch: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(_named(network(batch)).values())

    return run


def _write_onnx(program: Any, path: Path, names: Sequence[str], opset: int | None) -> int:
    wanted: dict[str, Any] = {"input_names": ["input"], "output_names": list(names), "opset_version": opset}
    try:
        with _quiet():
            written: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, **wanted)
            proto = written.model_proto
        _name_batch(proto.graph)
        data: bytes = proto.SerializeToString(deterministic=True)
    except Exception as error:  # each converter raises its own
        raise ConfigError(f"torch.onnx cannot convert the network: {_words(error)}") from error
    found = next(int(entry.version) for entry in proto.opset_import if not entry.domain)
    if opset not in (None, found):
        raise ConfigError(f"torch.onnx writes this network with opset {found}, not with {opset}")
    path.write_bytes(data)
    return found


def _open_onnx(path: Path) -> Run:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions too
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: [torch.from_numpy(array) for array in session.run(None, {"input": batch.numpy()})]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of exported networks.

    Attributes:
        write: a traced program, to a file, with these names of the outputs and this opset; gives the opset it wrote.
        open: that file, to be run; shares nothing with the network it was made of.
    """

    write: Callable[[Any, Path, Sequence[str], int | None], int | None]
    open: Callable[[Path], Run]


FORMATS = {
    ".onnx": Format(write=_write_onnx, open=_open_onnx),
    ".pt2": Format(write=_write_pt2, open=_open_pt2),
}
"""By the ending of the file's name."""


def _name_batch(graph: Any) -> None:
    """Call the first dimension of the input "batch", wherever it occurs; torch calls it by a number of its own."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info) if symbol else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)


def _found(path: Path, made: Format, inputs: Sequence[Tensor], where: str) -> list[list[Tensor]]:
    """What the written file gives for each batch.

    Raises:
        VerificationError: it cannot be read or run.
    """
    try:
        run = made.open(path)
        return [run(batch) for batch in inputs]
    except Exception as error:  # onnxruntime's own classes have no common root
        raise VerificationError(
            f"the exported network cannot be run; nothing was written: {_words(error)}", where=where
        ) from error


def _compare(
    expected: Mapping[str, Tensor], found: Sequence[Sequence[Tensor]], *, atol: float, rtol: float
) -> tuple[ExportedOutput, ...]:
    """Each output of the network against what the file gave, in the same order."""
    outputs = []
    for place, (name, wanted) in enumerate(expected.items()):
        parts = [batch[place] for batch in found if place < len(batch)]
        max_abs, agreement = math.inf, 0.0 if wanted.ndim > 1 else None
        numbers = wanted.double()
        if {(part.shape[1:], part.dtype) for part in parts} == {(wanted.shape[1:], wanted.dtype)}:
            values = torch.cat(parts).double()
            if values.shape == wanted.shape:
                max_abs = float((values - numbers).abs().max().nan_to_num(nan=math.inf, posinf=math.inf))
                if wanted.ndim > 1:
                    agreement = float((values.argmax(1) == numbers.argmax(1)).double().mean())
        bound = atol + rtol * float(numbers.abs().max())
        outputs.append(
            ExportedOutput(
                name=name, shape=tuple(wanted.shape[1:]), max_abs=max_abs, bound=bound, argmax_agreement=agreement
            )
        )
    return tuple(outputs)


def _line(output: ExportedOutput) -> str:
    line = f"{output.name!r}: the largest difference is {output.max_abs:.3g}, it may be {output.bound:.2g}"
    return line if output.argmax_agreement is None else f"{line}; the same answer: {output.argmax_agreement:.2%}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporters: what went wrong is raised, or seen in what was written."""
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(before)


def _words(error: BaseException) -> str:
    """Class and first line of what was wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
