"""Files of strangers that must be refused, each with what has to be said about it.

    cd tests && python -m hostile.corpus FOLDER      writes all of them, and expected.json with their messages

The published attacks are those of the audit of safetensors by Trail of Bits (2023): names that
occur twice, offsets that overlap, leave holes or overflow, headers of any length, and files that are of two formats at
once; those on pickles are as old as pickle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hostile.containers import (
    Json,
    entry,
    headers,
    json_texts,
    layouts,
    lengths,
    names,
    other_formats,
    pickles,
    polyglots,
    raw,
    torch_saved,
    with_pad,
)
from safetensors.torch import save
from torch import Tensor

from loraio.adapter import Adapter, BaseReference, Target
from loraio.files import integrity, tensorfile
from loraio.files.tensors import dtype_code, tensor_bytes, tensor_sha256
from loraio.formats.native import to_document


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file, or one folder.

    Attributes:
        name: what is wrong with it.
        files: contents by name; the first is the one that a command is given, or the folder if ``folder`` is set.
        match: a regular expression that the refusal has to match.
        role: who must refuse it, with that message: every command ("bytes"); those that take an "adapter", a "base", a
            base whose "network" they build, a "pack", or a file of torch.save ("pickle"); those that look into a "peft"
            folder. The others may refuse it or not, without a traceback.
        folder: whether the commands are given the folder.
    """

    name: str
    files: dict[str, bytes] = field(repr=False)
    match: str
    role: str = "bytes"
    folder: bool = False

    def write(self, folder: Path) -> Path:
        """Make it in a folder that is there; what the commands are given."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder if self.folder else folder / next(iter(self.files))


def adapter_parts() -> tuple[Json, dict[str, Tensor]]:
    """The document and the tensors of an adapter that is right."""
    target = Target(rank=1, alpha=2, shape=(2, 1, 2, 2), dtype="F32", layer="Conv2d", base_sha256="01" * 32)
    factors = {f"w.{short}": torch.ones(shape) for short, shape in target.factor_shapes.items()}
    base = BaseReference(sha256="23" * 32, network="digit-cnn")
    adapter = Adapter(targets={"w": target}, factors=factors, base=base, training={"seed": 1})
    document: Json = json.loads(json.dumps(to_document(adapter)))
    return document, factors


def native(document: Any, tensors: dict[str, Tensor]) -> bytes:
    """A file that holds them, whose digests are right where its version has some."""
    if isinstance(document, str) or document.get("format_version") != integrity.SEALED:
        text = document if isinstance(document, str) else json.dumps(document)
        return save({name: tensor.clone() for name, tensor in tensors.items()}, metadata={"loraio": text})
    facts = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = tensorfile.metadata_of(document, facts, lambda name: tensor_sha256(tensors[name]), where="it")
    start, placed = tensorfile.layout(facts, metadata, where="it")
    return start + b"".join(tensor_bytes(tensors[name]).numpy().tobytes() for name in placed)


def changed(tree: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place; ``...`` takes the place out."""
    if not way:
        return value
    copy = dict(tree)
    if len(way) == 1 and value is ...:
        del copy[way[0]]
    else:
        copy[way[0]] = changed(tree.get(way[0], {}), way[1:], value)
    return copy


def documents() -> Iterator[tuple[str, bytes, str]]:
    """Adapters of ours whose document is wrong."""
    good, factors = adapter_parts()
    target = ("targets", "w")
    for name, way, value, match in (
        ("version 99", ("format_version",), 99, r"format version 99[\s\S]*a newer loraio"),
        ("version as a text", ("format_version",), "1", "format version '1'"),
        ("version true", ("format_version",), True, "format_version|format version"),
        ("no version", ("format_version",), ..., "format version None"),
        ("targets a list", ("targets",), [], "'targets'|targets"),
        ("no targets", ("targets",), {}, "target"),
        ("a target that is a number", target, 1, "target 'w' is not a JSON object"),
        ("no rank", (*target, "rank"), ..., "target 'w' has no 'rank'"),
        ("rank 0", (*target, "rank"), 0, "rank"),
        ("rank -1", (*target, "rank"), -1, "rank"),
        ("rank 2**62", (*target, "rank"), 2**62, "rank|lora_A|63"),
        ("rank 10**30", (*target, "rank"), 10**30, "rank|lora_A|63"),
        ("rank as a float", (*target, "rank"), 1.0, "'rank'"),
        ("rank true", (*target, "rank"), True, "'rank'"),
        ("alpha as a text", (*target, "alpha"), "2", "'alpha'"),
        ("alpha of 400 digits", (*target, "alpha"), 10**400, "alpha"),
        ("kind lorra", (*target, "kind"), "lorra", "lorra"),
        ("kind of control characters", (*target, "kind"), "\x1b[2J", r"\\x1b\[2J"),
        ("layer os.system", (*target, "layer"), "os.system", r"os\.system"),
        ("scale rule", (*target, "scale_rule"), "alpha*r", r"alpha\*r"),
        ("shape of another rank", (*target, "shape"), [2, 4], "shape|dimensions"),
        ("shape with 0", (*target, "shape"), [0, 1, 2, 2], "shape|size"),
        ("shape of texts", (*target, "shape"), ["2", 1, 2, 2], "shape|size"),
        ("groups 0", (*target, "groups"), 0, "groups"),
        ("groups 3", (*target, "groups"), 3, "groups"),
        ("digest too short", (*target, "base_sha256"), "01", "base_sha256|digest|hexadecimal"),
        ("digest in capitals", (*target, "base_sha256"), "AB" * 32, "base_sha256|digest|hexadecimal"),
        ("dtype F8", (*target, "dtype"), "F8_E4M3", "F8_E4M3"),
        ("base a list", ("base",), [], "'base'"),
        ("no base", ("base",), ..., "'base'"),
        ("training a text", ("training",), "x", "'training'"),
        ("a target of another name", ("targets", "../../etc/passwd"), good["targets"]["w"], "etc/passwd"),
        ("whole that is not there", ("whole",), {"fc.weight": {"role": "head"}}, "whole tensor|'shape'"),
        ("sketch of texts", (*target, "sketch"), ["x"], "sketch"),
    ):
        yield name, native(changed(good, way, value), factors), match
    text = json.dumps(good)
    yield "a document that is no JSON", native("{", factors), "not JSON"
    yield "a document with a key twice", native(text[:-1] + ', "base": {}}', factors), "'base' occurs twice"
    yield "a deep document", native('{"targets":' * 1000 + "{}" + "}" * 1000, factors), "nested more than 64 deep"
    yield "a document with NaN", native(text[:-1] + ', "x": NaN}', factors), "NaN is not a JSON number"
    yield "a document with half a character", native(text[:-1] + ', "x": "\\ud800"}', factors), "half a surrogate"
    wide = native(text[:-1] + ', "x": [' + "1," * 400_000 + "1]}", factors)
    yield "a document of 400,000 numbers", wide, "more than 300,000 entries"
    for what, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        for name in factors:
            wrong = factors | {name: torch.full_like(factors[name], value)}
            yield f"{what} in {name}", native(good, wrong), "NaN or infinity|NaN|infinit"
    yield "a factor too many", native(good, factors | {"v.lora_A": torch.ones(1)}), "v.lora_A"
    yield "a factor too few", native(good, {"w.lora_A": factors["w.lora_A"]}), "w.lora_B"
    yield "a factor of another shape", native(good, factors | {"w.lora_B": torch.ones(3, 1)}), r"\(3, 1\)"
    yield "a factor of integers", native(good, factors | {"w.lora_B": torch.ones(2, 1, dtype=torch.int64)}), "I64"


def packs() -> Iterator[tuple[str, bytes, str]]:
    """Packs whose index is wrong."""
    member, digest = torch.zeros(4, dtype=torch.uint8), "0" * 64

    def pack(listed: Any, tensors: dict[str, Tensor], version: Any = 1) -> bytes:
        return native({"format_version": version, "pack": listed}, tensors)

    for name in ("../evil", "a/b", "a\\b", "/etc/passwd", "C:x", ".", "..", ".hidden", "con?", "end.", " x", "x" * 250):
        yield f"a member called {name[:20]!r}", pack({name: digest}, {name: member}), "contradicts itself"
    yield "a member that is not there", pack({"a": digest}, {"b": member}), "is listed and not there"
    yield "a member of floats", pack({"a": digest}, {"a": torch.ones(2)}), "not a list of bytes"
    yield "a digest that is none", pack({"a": "xyz"}, {"a": member}), "not 64 hexadecimal digits"
    yield "names that differ in case", pack({"a": digest, "A": digest}, {"a": member, "A": member}), "one name"
    yield "a pack that is a list", pack([], {}), "'pack' is not a JSON object"
    yield "a pack of version 99", pack({"a": digest}, {"a": member}, 99), "pack version 99"
    yield "a pack of version true", pack({"a": digest}, {"a": member}, True), "pack version True"


# Files of other tools

PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], "bias": "none"}


def peft(config: Any, tensors: dict[str, Tensor] | None = None) -> dict[str, bytes]:
    pair = {
        "base_model.model.fc.lora_A.weight": torch.ones(2, 2048),
        "base_model.model.fc.lora_B.weight": torch.ones(10, 2),
    }
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {"adapter_model.safetensors": save(tensors or pair), "adapter_config.json": text}


def peft_folders() -> Iterator[tuple[str, dict[str, bytes], str, str]]:
    """Folders of PEFT: name, files, message, and who must give it."""
    yield "PEFT: an empty configuration", peft(b""), "the file is empty", "bytes"
    yield "PEFT: a configuration that is HTML", peft(b"<html></html>"), "not JSON but an HTML page", "bytes"
    yield "PEFT: a configuration that is a list", peft([]), "not a JSON object", "bytes"
    yield "PEFT: a deep configuration", peft(b'{"r":' * 1000), "nested more than 64 deep", "bytes"
    yield "PEFT: a key twice", peft(b'{"r": 1, "r": 2}'), "'r' occurs twice", "bytes"
    yield "PEFT: NaN in the configuration", peft(b'{"r": NaN}'), "NaN is not a JSON number", "bytes"
    yield "PEFT: a configuration of 6 MB", peft(b'{"r": "' + b"x" * 6_000_000 + b'"}'), "longer than 5,000,000", "bytes"
    yield "PEFT: a broken pattern", peft(PEFT | {"target_modules": "(fc"}), "is no regular expression", "adapter"
    yield (
        "PEFT: a pattern 2,000 groups deep",
        peft(PEFT | {"target_modules": "(" * 2000 + ")" * 2000}),
        "regular",
        "adapter",
    )
    many = {f"x{number}(a+)+": 1 for number in range(3_000)}
    yield "PEFT: three thousand patterns", peft(PEFT | {"rank_pattern": many}), "take too long to match", "adapter"
    yield "PEFT: a pattern of 30,000 bytes", peft(PEFT | {"target_modules": "a" * 30_000}), "at most 20,000", "adapter"
    endless = PEFT | {"target_modules": r"((f|c)+)+\1$"}
    yield "PEFT: a pattern with a reference", peft(endless), "may take very long|is not in target_modules", "adapter"
    yield "PEFT: rank_pattern a list", peft(PEFT | {"rank_pattern": ["x"]}), "rank_pattern is", "adapter"
    yield "PEFT: a rank that is not the tensors'", peft(PEFT | {"r": 8}), "says rank 8, the tensors have 2", "adapter"
    yield "PEFT: an unknown setting", peft(PEFT | {"use_magic": True}), "unknown setting 'use_magic'", "adapter"
    yield "PEFT: another method", peft(PEFT | {"peft_type": "VERA"}), "peft_type is 'VERA'", "adapter"
    yield "PEFT: alpha a list", peft(PEFT | {"lora_alpha": [1]}), r"alpha is \[1\], not a number", "adapter"
    alone = {"base_model.model.fc.lora_A.weight": torch.ones(2, 2048)}
    yield "PEFT: half a pair", peft(PEFT, alone), "lora_B is missing", "adapter"
    two = {f"base_model.model.fc.lora_{s}.{n}.weight": torch.ones(2, 2) for s in "AB" for n in ("one", "two")}
    yield "PEFT: two adapters", peft(PEFT, two), "it holds 2 adapters", "adapter"
    infinite = {"base_model.model.fc.lora_A.weight": torch.full((2, 2048), float("inf"))}
    infinite["base_model.model.fc.lora_B.weight"] = torch.ones(10, 2)
    yield "PEFT: infinity in a factor", peft(PEFT, infinite), "NaN or infinity|infinit", "adapter"


def foreign() -> Iterator[tuple[str, str, bytes, str]]:
    """Single files of other tools: name, file name, content, message."""
    one, nan = torch.tensor(1.0), float("nan")

    def tensors(**shapes: Any) -> dict[str, Tensor]:
        return {key.replace("__", "."): torch.ones(shape) for key, shape in shapes.items()}

    fc = {"lora_unet_fc.lora_down.weight": torch.ones(2, 2048), "lora_unet_fc.lora_up.weight": torch.ones(10, 2)}
    for name, content, match in (
        ("kohya: no up", tensors(lora_unet_fc__lora_down__weight=(2, 2048)), "lora_up|missing"),
        ("kohya: alpha of three numbers", fc | {"lora_unet_fc.alpha": torch.ones(3)}, "should be one number"),
        ("kohya: alpha a truth value", fc | {"lora_unet_fc.alpha": torch.tensor(True)}, "should be a number"),
        ("kohya: alpha NaN", fc | {"lora_unet_fc.alpha": torch.tensor(nan)}, "alpha|nan"),
        ("kohya: alpha infinite", fc | {"lora_unet_fc.alpha": torch.tensor(float("inf"))}, "alpha|inf"),
        ("kohya: NaN in a factor", fc | {"lora_unet_fc.lora_up.weight": torch.full((10, 2), nan)}, "NaN"),
        ("kohya: factors of integers", {key: value.long() for key, value in fc.items()}, "I64"),
        ("kohya: factors of no dimension", dict.fromkeys(fc, one), "lora_down|shape|no pair"),
        ("kohya: a slot that nobody knows", fc | {"lora_unet_fc.evil": one}, "evil"),
        ("kohya: a layer that the base lacks", {k.replace("_fc", "_no"): v for k, v in fc.items()}, "no"),
        ("lycoris: half a Hadamard product", tensors(lycoris_fc__hada_w1_a=(10, 2)), "hada|missing"),
        (
            "lycoris: a Kronecker product of no numbers",
            tensors(lycoris_fc__lokr_w1=(0, 0), lycoris_fc__lokr_w2=(1, 1)),
            "lokr",
        ),
        ("lycoris: a change of another shape", tensors(lycoris_fc__diff=(3, 3)), r"\(3, 3\)|diff"),
        ("diffusers: no pair", tensors(unet__fc__lora_A__weight=(2, 2048)), "lora_B is missing"),
        (
            "diffusers: ranks that differ",
            tensors(unet__fc__lora__down__weight=(2, 2048), unet__fc__lora__up__weight=(10, 3)),
            "rank",
        ),
        ("loralib: no pair", tensors(fc__lora_A=(2, 2048)), "lora_B is missing"),
        ("loralib: shapes that make no pair", tensors(fc__lora_A=(2, 2048), fc__lora_B=(10, 3)), "no pair"),
        ("torchtune: experts", tensors(fc__lora_gate_a=(2, 2)), "experts"),
        ("torchtune: no pair", tensors(fc__lora_a__weight=(2, 2048)), "lora_b|missing"),
        ("minlora: no pair", tensors(fc__parametrizations__weight__0__lora_A=(2, 2048)), "lora_B of parametrization 0"),
        (
            "minlora: a place of 30 digits",
            {f"fc.parametrizations.weight.{'9' * 30}.lora_A": torch.ones(2, 2)},
            "missing",
        ),
    ):
        yield name, "adapter.safetensors", save({key: value.clone() for key, value in content.items()}), match
    metadata = {"lora_adapter_metadata": '{"unet.r":' * 100}
    pair = tensors(unet__fc__lora_A__weight=(2, 2048), unet__fc__lora_B__weight=(10, 2))
    yield "diffusers: deep metadata", "adapter.safetensors", save(pair, metadata=metadata), "nested more than 64"
    for name, key, match in (
        ("loralib .pt", "fc.lora_A", "lora_B is missing"),
        ("torchtune .pt", "fc.lora_a.weight", "missing|lora_b"),
    ):
        yield f"{name}: no pair", "adapter.pt", torch_saved({key: torch.ones(2, 2048)}), match
    yield (
        "minlora .pt: no pair",
        "adapter.pt",
        torch_saved({"fc.parametrizations.weight.0.lora_A": torch.ones(2, 2048)}),
        "lora_B",
    )


def bases() -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Checkpoints that no base can be, and parted ones whose index lies; names of files with their contents."""
    part = save({"a.weight": torch.ones(2)})

    def index(places: Any, **more: Any) -> dict[str, bytes]:
        text = json.dumps({"metadata": {}, "weight_map": places, **more}).encode()
        return {"a.safetensors.index.json": text, "a-1.safetensors": part}

    for name in ("../a-1.safetensors", "/etc/passwd", "/tmp/x.safetensors", "..\\a-1.safetensors", "sub/a.safetensors"):
        yield f"a part at {name!r}", index({"a.weight": name}), "plain names of files in the index's own folder"
    for part_name in (
        "C:a.safetensors",
        "a-1.safetensors\0",
        "file:///a.safetensors",
        "a-1.bin",
        "",
        1,
        None,
        ["a"],
        "~/.x",
    ):
        yield f"a part called {part_name!r}", index({"a.weight": part_name}), "plain names of files"
    yield "a part that is not there", index({"a.weight": "b.safetensors"}), "do not belong together[^$]*does not exist"
    yield "a tensor that no part has", index({"b.weight": "a-1.safetensors"}), "'b.weight' is not in"
    yield "a part that is the index", index({"a.weight": "a.safetensors.index.json"}), "plain names of files"
    yield "an index that is a list", {"a.safetensors.index.json": b"[]"}, "no 'weight_map'"
    yield "an empty index", {"a.safetensors.index.json": b""}, "the file is empty"
    yield "an index that is HTML", {"a.safetensors.index.json": b"<html></html>"}, "not JSON but an HTML page"
    yield "an index with a tensor twice", {"a.safetensors.index.json": b'{"weight_map": {"a": "b", "a": "b"}}'}, "twice"
    yield "a deep index", {"a.safetensors.index.json": b'{"weight_map":' * 1000}, "nested more than 64 deep"
    wide = b'{"weight_map": [' + b"1," * 400_000 + b"1]}"
    yield "an index of 400,000 numbers", {"a.safetensors.index.json": wide}, "more than 300,000 entries"
    damaged = index({"a.weight": "a-1.safetensors"}) | {"a-1.safetensors": part[:-1]}
    yield "a part that is truncated", damaged, "truncated: "
    yield "a part that is a pointer", damaged | {"a-1.safetensors": b"version https://git-lfs\n"}, "Git LFS pointer"


def single_bases() -> Iterator[tuple[str, bytes, str]]:
    """Checkpoints in one file."""
    w = {"w": torch.ones(2)}
    yield "a base of no tensors", save({}), "holds no tensors"
    yield "a base that is an adapter", native(*adapter_parts()), "is an adapter, not a base model"
    yield "a base of version 99", native({"format_version": 99, "network": "digit-cnn"}, w), "99"
    listed = {"format_version": 1, "network": "digit-cnn", "network_args": []}
    yield "network_args a list", native(listed, w), "options are"
    yield "a network that is a number", native({"format_version": 1, "network": 1}, w), "network is 1, not a name"
    yield "a dtype that torch lacks", raw({"w": entry("F4", (4,), (0, 2))}, bytes(2)), "F4"


def networks() -> Iterator[tuple[str, bytes, str]]:
    """Checkpoints that say of what network they are."""
    w = {"w": torch.ones(2)}
    yield "code", native({"format_version": 1, "network": "os:system"}, w), "does not get to run"
    yield "one that nobody knows", native({"format_version": 1, "network": "evil-cnn"}, w), "no network 'evil-cnn'"
    args = {"format_version": 1, "network": "torchvision:resnet18", "network_args": {"weights": "DEFAULT"}}
    yield "one that asks for a download", native(args, w), "asks for them"


def cases() -> list[Case]:
    """All of them."""
    found: list[Case] = []

    def one(name: str, content: bytes, match: str, role: str = "bytes", file: str = "some.safetensors") -> None:
        found.append(Case(name=name, files={file: content}, match=match, role=role))

    for name, content, match in (*other_formats(), *polyglots(), *lengths()):
        one(name, content, match)
    for name, text, match in json_texts():
        one(f"JSON: {name}", raw(text, bytes(8)), match)
    for name, header, match in headers():
        one(f"header: {name}", raw(header, bytes(8)), match)
    for name, offsets, match in layouts():
        header = {
            f"t{n}": entry(shape=((end - begin) // 4,), offsets=(begin, end)) for n, (begin, end) in enumerate(offsets)
        }
        one(f"layout: {name}", raw(header, bytes(24)), match)
    for name, called, match in names():
        one(f"name: {name}", raw({called: entry()}, bytes(8)), match)
    tensors = {f"t{number}": entry(shape=(0,), offsets=(0, 0)) for number in range(30_001)}
    one("30,001 tensors", raw(json.dumps(tensors, separators=(",", ":"))), "30,001 tensors, at most 30,000")
    one(
        "a header of 6 MB",
        raw(with_pad(b"{}", 6_000_000)),
        r"6,000,000 bytes, at most 5,000,000[\s\S]*LORAIO_LIMITS=header_bytes",
    )
    for name, content, match in documents():
        one(f"document: {name}", content, match, "adapter")
    for name, content, match in packs():
        one(f"pack: {name}", content, match, "pack", "some.pack")
    for name, content, match in pickles():
        one(f"pickle: {name}", content, match, "pickle", "some.pt")
    for name, content, match in single_bases():
        one(f"base: {name}", content, match, "base")
    for name, content, match in networks():
        one(f"network: {name}", content, match, "network")
    for name, files, match in bases():
        found.append(Case(name=f"parted: {name}", files=files, match=match, role="base"))
    for name, files, match, role in peft_folders():
        found.append(
            Case(name=name, files=files, match=match, role="adapter" if role == "adapter" else "peft", folder=True)
        )
    for name, file, content, match in foreign():
        one(name, content, match, "adapter", file)
    assert len({case.name for case in found}) == len(found)
    return found


def write_all(folder: Path) -> dict[str, str]:
    """Each case in a folder of its own, numbered; the messages by the path of what a command is given."""
    expected = {}
    for number, case in enumerate(cases()):
        place = folder / f"{number:03}"
        place.mkdir(parents=True)
        expected[str(case.write(place).relative_to(folder))] = f"{case.name}: {case.match}"
    return expected


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "expected.json").write_text(json.dumps(write_all(target), indent=1))
