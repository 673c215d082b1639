"""Feed any bytes to every reader of foreign files, for `scripts/fuzz` and, in short, for a test.

A target takes bytes; an exception that is not a `LoraioError` goes through, and is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

import loraio
from loraio.adapter import Adapter, BaseReference, Target
from loraio.bases import checkpoints
from loraio.errors import LoraioError
from loraio.files import pickles, sharded, strictjson, tensorfile
from loraio.files.tensorfile import METADATA_KEY, Header
from loraio.files.tensors import DTYPE_BITS
from loraio.formats import dialects
from loraio.formats.binding import bind
from loraio.formats.foreign import Options
from loraio.formats.native import read_metadata
from loraio.formats.pack import check_index, is_pack
from loraio.formats.patterns import Budget, Pattern
from loraio.formats.sources import Source, open_source, source_of

ANYWHERE = Path("some.safetensors")

PATTERN_SECONDS = 10
"""Processor time for one pattern: its budget is a second, and a fuzzer instruments every step."""

LARGEST = 1 << 20
"""Bytes of data that a target makes for a header."""

_TEMPORARY = tempfile.TemporaryDirectory(prefix="loraio-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
FOLDER = Path(_TEMPORARY.name)


def valid_file() -> bytes:
    """An adapter of ours."""
    target = Target(rank=1, alpha=2, shape=(2, 1, 2, 2), dtype="F32", layer="Conv2d", base_sha256="01" * 32)
    factors = {f"w.{short}": torch.ones(shape) for short, shape in target.factor_shapes.items()}
    base = BaseReference(sha256="23" * 32, network="digit-cnn")
    loraio.save(
        Adapter(targets={"w": target}, factors=factors, base=base, training={"seed": 1}), FOLDER / "valid.safetensors"
    )
    return (FOLDER / "valid.safetensors").read_bytes()


VALID = valid_file()
LENGTH = int.from_bytes(VALID[:8], "little")
ENTRIES: dict[str, Any] = json.loads(VALID[8 : 8 + LENGTH])
DATA = VALID[8 + LENGTH :]


def small_base() -> nn.Module:
    """A network with a layer of every kind that a dialect's factors may be for."""
    torch.manual_seed(0)
    layers = {
        "fc": nn.Linear(4, 4),
        "conv": nn.Conv2d(2, 4, (1, 2)),
        "norm": nn.LayerNorm(4),
        "emb": nn.Embedding(4, 2),
    }
    return nn.ModuleDict(
        {**layers, "attn": nn.MultiheadAttention(4, 2), "grouped": nn.Conv2d(4, 4, 1, groups=2)}
    ).eval()


BASE = small_base()


def examined(header: Header) -> None:
    """All that is read from a header, whatever it is of."""
    document = header.document() or {}
    if "targets" in document:
        read_metadata(header)
        dialects.NATIVE.read(header)
    elif is_pack(header):
        check_index(header, stamp=())
    else:
        checkpoints._stated(document, where="here")
        foreign(source_of(header))


def foreign(source: Source) -> None:
    """Read a file by the dialect that recognises it, and bind it to a base."""
    found = dialects.recognised(source)
    if found is None or found.dialect is None:
        return
    if not found.dialect.read(source).refusals:
        bind(found.dialect, source, BASE, Options(alpha=1, lossy=True, approximate=True, rank=1))


def whole_file(data: bytes) -> None:
    """A safetensors file."""
    with contextlib.suppress(LoraioError):
        examined(tensorfile.parse_file(data, ANYWHERE))


def header(data: bytes) -> None:
    """The JSON of a header, with as many bytes after it as it speaks of."""
    size = 0
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError, IndexError):
        size = max(entry["data_offsets"][1] for name, entry in json.loads(data).items() if name != "__metadata__")
    filled = bytes(size) if isinstance(size, int) and 0 <= size <= LARGEST else b""
    whole_file(len(data).to_bytes(8, "little") + data + filled)


def document(data: bytes) -> None:
    """The text of a document, in a file whose tensors are an adapter's."""
    entries = {**ENTRIES, "__metadata__": {METADATA_KEY: data.decode("utf-8", "replace")}}
    text = json.dumps(entries).encode()
    whole_file(len(text).to_bytes(8, "little") + text + DATA)


def dialect(data: bytes) -> None:
    """Keys, shapes, metadata and a configuration of another tool's file.

    Lines ``dtype shape key`` until an empty one, then JSON of the metadata, then JSON of the configuration.
    """
    keys, _, rest = data.partition(b"\n\n")
    metadata, _, config = rest.partition(b"\n\n")
    entries: dict[str, Any] = {}
    position = 0
    for line in keys.split(b"\n")[:64]:
        dtype, _, more = line.decode("utf-8", "replace").partition(" ")
        sizes, _, key = more.partition(" ")
        shape = [int(size) for size in sizes.split("x") if size.isascii() and size.isdigit() and len(size) < 4]
        size = math.prod(shape) * DTYPE_BITS.get(dtype, 32) // 8
        if position + size <= LARGEST:
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
    with contextlib.suppress(LoraioError):
        strings = strictjson.parse_json(metadata.decode("utf-8", "replace"), where="metadata") if metadata else {}
        settings = strictjson.parse_json(config.decode("utf-8", "replace"), where="config") if config else None
        text = json.dumps({"__metadata__": strings, **entries}).encode("utf-8", "surrogatepass")
        values = (b"\x00\x00\x80\x3f" * (position // 4 + 1))[:position]  # ones, as float32
        header = tensorfile.parse_file(len(text).to_bytes(8, "little") + text + values, ANYWHERE)
        if settings is None or isinstance(settings, dict):
            foreign(source_of(header, config=settings))


def index(data: bytes) -> None:
    """The index of a parted checkpoint, beside one part."""
    path = FOLDER / f"a{sharded.INDEX_SUFFIX}"
    path.write_bytes(data)
    with contextlib.suppress(LoraioError):
        checkpoints.scan_base(path)


def pickled(data: bytes) -> None:
    """A file that is named as one of ``torch.save``."""
    path = FOLDER / "some.pt"
    path.write_bytes(data)
    with contextlib.suppress(LoraioError):
        foreign(open_source(path))
        pickles.read_pickle(path)


def pattern(data: bytes) -> None:
    """Match a regular expression, given on the first line, with the name after it: an answer or a refusal, soon."""
    text, _, name = data.decode("utf-8", "replace").partition("\n")
    started = time.process_time()
    with contextlib.suppress(LoraioError):
        Pattern(text, Budget()).matches(name[:512])
    assert time.process_time() - started < PATTERN_SECONDS, (text, name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "file": whole_file,
    "header": header,
    "document": document,
    "dialect": dialect,
    "index": index,
    "pickle": pickled,
    "pattern": pattern,
}


def _lines(*keys: str, metadata: Any = "", config: Any = "") -> bytes:
    pieces = ["\n".join(keys), *(json.dumps(part) if part != "" else "" for part in (metadata, config))]
    return "\n\n".join(pieces).rstrip("\n").encode()


_PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], "rank_pattern": {}, "bias": "none"}


def dialect_seeds() -> Iterator[bytes]:
    """A file of each dialect."""
    pair = ("F32 2x4 base_model.model.fc.lora_A.weight", "F32 4x2 base_model.model.fc.lora_B.weight")
    yield _lines(*pair, metadata={"format": "pt"}, config=_PEFT)
    yield _lines(*pair, config=_PEFT | {"target_modules": "(.*)+fc", "rank_pattern": {"f.": 2}})
    kohya = ("lora_unet_fc.lora_down.weight", "lora_unet_fc.lora_up.weight", "lora_unet_fc.alpha")
    yield _lines(f"F32 2x4 {kohya[0]}", f"F32 4x2 {kohya[1]}", f"F32  {kohya[2]}", metadata={"ss_network_dim": "2"})
    yield _lines("F32 2x2x1x2 lora_unet_conv.lora_down.weight", "F32 4x2x1x1 lora_unet_conv.lora_up.weight")
    hada = [f"F32 {shape} lycoris_fc.hada_{slot}" for shape, slot in (("4x2", "w1_a"), ("2x4", "w1_b"))]
    yield _lines(*hada, *(line.replace("w1", "w2") for line in hada), "F32  lycoris_fc.alpha")
    yield _lines("F32 2x2 lycoris_fc.lokr_w1", "F32 2x2 lycoris_fc.lokr_w2", "F32  lycoris_fc.alpha")
    yield _lines("F32 4x4 lycoris_fc.diff", "F32 4 lycoris_fc.diff_b", "F32 4 lycoris_norm.w_norm")
    yield _lines("F32 2x4 unet.fc.lora_A.weight", "F32 4x2 unet.fc.lora_B.weight", "F32 4 unet.fc.lora_B.bias")
    yield _lines("F32 2x4 unet.fc.lora.down.weight", "F32 4x2 unet.fc.lora.up.weight", "F32  unet.fc.alpha")
    yield _lines("F32 2x4 fc.lora_A", "F32 4x2 fc.lora_B", "F32 4 fc.bias")
    yield _lines("F32 2x4 fc.lora_a.weight", "F32 4x2 fc.lora_b.weight", config={"lora_alpha": 2, "r": 2})
    minlora = "parametrizations.weight.0.lora_"
    yield _lines(f"F32 2x4 fc.{minlora}A", f"F32 4x2 fc.{minlora}B", f"F32 2x4 fc.{minlora.replace('0', '1')}A")


def pickle_seeds() -> Iterator[bytes]:
    """Files of ``torch.save``, new and old."""
    for new in (True, False):
        buffer = io.BytesIO()
        state = {"fc.lora_A": torch.ones(2, 4), "fc.lora_B": torch.ones(4, 2)}
        torch.save(state, buffer, _use_new_zipfile_serialization=new)
        yield buffer.getvalue()


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "file": lambda: iter([VALID, save({"base_model.model.fc.lora_A.weight": torch.ones(2, 4)})]),
    "header": lambda: iter([VALID[8 : 8 + LENGTH]]),
    "document": lambda: iter([ENTRIES["__metadata__"][METADATA_KEY].encode(), b'{"format_version":1,"pack":{}}']),
    "dialect": dialect_seeds,
    "index": lambda: iter([b'{"metadata":{"total_size":1},"weight_map":{"fc.weight":"valid.safetensors"}}']),
    "pickle": pickle_seeds,
    "pattern": lambda: iter([b"(a+)+$\naaab", b".*\\.(q|k)_proj\nx.q_proj", b"^(?!.*lm)\\b[^\\d]{2,3}?$\nab"]),
}

WORDS = sorted(
    {
        *("F32", "F16", "BF16", "F64", "I64", "U8", "data_offsets", "shape", "dtype", "__metadata__", "loraio", "pack"),
        *(
            "targets",
            "whole",
            "base",
            "training",
            "format_version",
            "kind",
            "rank",
            "alpha",
            "scale_rule",
            "layer",
            "role",
        ),
        *("alpha/r", "alpha/sqrt(r)", "Conv2d", "Linear", "lora", "dora", "groups", "base_sha256", "sketch", "head"),
        *(
            "lora_A",
            "lora_B",
            "lora_A.weight",
            "lora_B.weight",
            "lora_magnitude_vector",
            "lora_embedding_A",
            "lora_a.weight",
        ),
        *("lora_down.weight", "lora_up.weight", "lora_mid.weight", ".alpha", "dora_scale", "lora_unet_", "lycoris_"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a"),
        *("lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff", "diff_b", "w_norm", "b_norm", "rank_pattern"),
        *(
            "processor.to_q_lora.down.weight",
            ".lora.up.weight",
            "unet.",
            "text_encoder.",
            "base_model.model.",
            "magnitude",
        ),
        *(
            "modules_to_save",
            "target_modules",
            "exclude_modules",
            "alpha_pattern",
            "use_dora",
            "use_rslora",
            "peft_type",
        ),
        *(
            "parametrizations.weight.0.lora_A",
            "in_proj_weight",
            "weight_map",
            "metadata",
            ".safetensors",
            "\\ud800",
            "(?!",
        ),
        *(
            "fc",
            "conv",
            "norm",
            "emb",
            "attn",
            "grouped",
            "null",
            "true",
            "NaN",
            "1e999",
            "[[",
            "{}",
            "9223372036854775808",
        ),
    }
)
"""For the fuzzer's dictionary."""
