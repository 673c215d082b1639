"""Read and write files of kohya's sd-scripts: LoRA and LoCon in one safetensors file, names with underscores.

A key is the mangled name of a module, a dot, and a slot: ``lora_unet_down_conv1.lora_down.weight``. Mangling cannot be
undone, so names are matched forward from the base's own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import FLOAT_DTYPES, Target
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.files import tensorfile
from loraio.files.tensorfile import METADATA_KEY
from loraio.files.tensors import dtype_code, tensor_bytes
from loraio.formats.exported import ORIGIN, origin_of
from loraio.formats.foreign import Context, Encoded, Factors, Foreign, ForeignLayer, Options, Values
from loraio.formats.pitfalls import is_pipeline, misuse, passed_over
from loraio.formats.products import alpha_at, relative_error, with_core
from loraio.formats.reading import Reading
from loraio.formats.report import settings, tensors
from loraio.formats.sources import Source
from loraio.formats.writing import Writing
from loraio.registry import known, lookup

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lycoris")
"""Prefixes of a module's mangled name."""

COMPONENTS = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet",),
    "text_encoder": ("lora_te1", "lora_te"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
"""Modules of a base that is a whole pipeline, with their prefixes; the first prefix is written."""

DOWN, UP, MID, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"

_LEGACY = (0x100000, 0x110000)  # the range of bytes of the short, older hash


class Kohya:
    """sd-scripts, and tools with its layout."""

    name = "kohya"
    container = "safetensors"
    takes: tuple[str, ...] = ("prefix",)
    tool = "sd-scripts"
    prefix = "lora_unet"
    network_module = "networks.lora"
    layers: tuple[str, ...] = ("Linear", "Conv2d")
    ignores_dilation = True

    def recognise(self, source: Source) -> str | None:
        for key in source.tensors:
            if key.partition(".")[2] in (DOWN, UP):
                return f"the key {key!r}"
        return None

    def read(self, source: Source) -> Foreign:
        names: dict[str, dict[str, str]] = {}
        for key in source.tensors:
            name, _, slot = key.partition(".")
            names.setdefault(name, {})[slot] = key
        reading = Reading(source=source)
        for name, slots in names.items():
            self.read_module(name, slots, reading)
        reading.refusals += [
            f"{key!r} is {source.tensors[key].dtype}, not one of {', '.join(FLOAT_DTYPES)}"
            for layer in reading.layers
            for slot, key in layer.slots.items()
            if slot != ALPHA and source.tensors[key].dtype not in FLOAT_DTYPES
        ]
        metadata = {key: value for key, value in source.metadata.items() if key not in (METADATA_KEY, "format")}
        reading.lines += settings(sorted(metadata), "carried", f"kept in the record, 'training.{ORIGIN}'")
        prefixes = sorted({name_prefix(name) for name in names} - {""})
        reading.settings = {"metadata": metadata, "prefixes": prefixes}
        return reading.foreign(spelled=spelled)

    def read_module(self, name: str, slots: Mapping[str, str], reading: Reading) -> None:
        """Read all keys of one mangled name."""
        if has_only(slots, (DOWN, UP, MID, ALPHA), "no slot of LoRA or LoCon", reading):
            self.read_pair(name, slots, reading)

    def read_pair(self, name: str, slots: Mapping[str, str], reading: Reading, kind: str = "lora") -> None:
        """Read a down and an up, and perhaps a core between them."""
        missing = [slot for slot in (DOWN, UP) if slot not in slots]
        if missing:
            reading.refusals.append(f"{name!r}: {missing[0]} is missing")
            return
        down, up = (reading.shape(slots[slot]) for slot in (DOWN, UP))
        mid = reading.shape(slots[MID]) if MID in slots else None
        rank = down[0] if down else 0
        fits = len(down) >= 2 and len(up) >= 2 and up[1] == rank >= 1 and math.prod(up[2:]) == 1
        if mid is not None:
            fits = fits and mid[:2] == (rank, rank) and math.prod(down[2:]) == 1
        if not fits:
            core = "" if mid is None else f", lora_mid {mid}"
            reading.refusals.append(f"{name!r}: lora_down {down}, lora_up {up}{core} do not go together")
            return
        self.add_layer(name, slots, rank, reading, kind=kind)

    def add_layer(self, name: str, slots: Mapping[str, str], rank: int, reading: Reading, **more: Any) -> None:
        """Add a layer of this rank, with the alpha of its file."""
        alpha = reading.source.number(slots[ALPHA]) if ALPHA in slots else None
        if alpha is not None and not math.isfinite(alpha):
            reading.refusals.append(f"{slots[ALPHA]!r} is {alpha}")
            return
        if alpha == 0:
            alpha = self.zero_alpha(slots[ALPHA], rank, reading)
        reading.layers.append(
            ForeignLayer(name=name, slots=dict(slots), rank=rank, alpha=alpha, implied_alpha=rank, **more)
        )

    def zero_alpha(self, key: str, rank: int, reading: Reading) -> int | None:
        """Return the meaning of alpha 0; None if the tool does not agree with itself."""
        reading.refusals.append(
            f"{key!r} is 0: attached, sd-scripts takes that as r, {rank}, and its merge scripts take it as 0"
        )
        return None

    def spell(self, place: TargetModule) -> Sequence[str]:
        return spelled(place.path) if place.parameter == "weight" else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        if layer not in self.layers:
            return f"{self.tool} has no LoRA for this layer type"
        if kind == "dora":
            return f"{self.tool} has no DoRA; lycoris does"
        if kind != "lora":
            return f"{self.tool} has no {kind}"
        if grouped:
            return f"{self.tool} makes dense factors for a grouped convolution, which fit no grouped kernel"
        return None

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        down, up = values[DOWN], values[UP]
        notes = []
        if MID in values:
            down, note = _without_core(values[MID], down)
            notes.append(note)
            check_kernel(values[MID].shape[2:], layer.slots[MID], place)
        else:
            check_kernel(down.shape[2:], layer.slots[DOWN], place)
        wrong = self.misuse(place.module)
        if wrong is not None:
            notes.append(f"as {self.tool} merges it; attached, it {wrong}")
        return Factors(values={"lora_A": down.flatten(1), "lora_B": up.flatten(1)}, note="; ".join(notes))

    def misuse(self, module: nn.Module) -> str | None:
        """Return the fault of the tool's own forward pass on a layer; None if there is none."""
        return misuse(module, dilation=self.ignores_dilation) or passed_over(module)

    def encode(self, adapter: Adapter, context: Context) -> Encoded:
        needs = f"{self.tool} goes by the names of all modules and the padding of convolutions"
        writing = NamedWriting(tool=self.tool, adapter=adapter, context=context, needs=needs)
        places = writing.places
        aimed = {places[name].path for name in adapter.targets if name in places}
        self._name(aimed | self.paths_of_whole(writing), writing)
        for name, target in adapter.targets.items():
            place = writing.place(name, target)
            if place is None:
                continue
            reason = self.refusal(target.layer, target.kind, grouped=target.groups > 1)
            wrong = self.misuse(place.module)
            if reason is None and wrong is not None:
                reason = f"{self.tool} {wrong}"
            if reason is None and self.name == "kohya" and type(place.module).__name__ not in self.layers:
                reason = f"{self.tool} goes by class names, and passes over {type(place.module).__name__!r}"
            if reason is not None:
                writing.problems.append(f"{name!r}: {reason}")
                continue
            self.write_layer(writing.names[place.path], name, target, place, writing)
        self.write_whole(writing)
        writing.check()
        return writing.in_safetensors(self.metadata(writing))

    def write_layer(self, mangled: str, name: str, target: Target, place: TargetModule, writing: NamedWriting) -> None:
        """Add the pair of one weight."""
        alpha = target.alpha
        if target.scale_rule != "alpha/r":
            alpha = alpha_at(target.scale, target.rank)
            exact = (
                "" if alpha / target.rank == target.scale else ", whose scale is off by a unit in float64's last place"
            )
            how = f"{alpha!r} for alpha / r{exact}"
            writing.lines += settings([f"{name}.alpha", f"{name}.scale_rule"], "changed", how)
        if alpha == 0:
            other = "; --as-full-delta writes it" if self.name == "lycoris" else ""
            writing.problems.append(f"{name!r}: alpha is 0, which {self.tool} takes as r, {target.rank}{other}")
        factors = writing.adapter.factors_of(name)
        ones = (1,) * (len(target.shape) - 2)
        writing.tensors |= {
            f"{mangled}.{DOWN}": factors["lora_A"].reshape(-1, *target.shape[1:]),
            f"{mangled}.{UP}": factors["lora_B"].reshape(-1, target.rank, *ones),
            f"{mangled}.{ALPHA}": _number(alpha),
        }
        writing.lines += tensors([f"{name}.lora_A", f"{name}.lora_B"], "carried")
        writing.lines += settings([f"{name}.rank", f"{name}.kind"], "carried", "by the tensors")
        if target.scale_rule == "alpha/r":
            writing.lines += settings([f"{name}.alpha"], "carried", f"in {mangled}.{ALPHA}")

    def write_whole(self, writing: NamedWriting) -> None:
        """Report the tensors that are replaced: they have no place."""
        names = set(writing.adapter.whole) - writing.held
        writing.lines += tensors(sorted(names), "lost", f"{self.tool} replaces no tensor of the base")

    def paths_of_whole(self, writing: NamedWriting) -> set[str]:
        """Return the modules with replaced tensors that have a place."""
        return set()

    def metadata(self, writing: NamedWriting) -> dict[str, str]:
        """Return the metadata that sd-scripts writes itself: its record, and hashes of the tensors."""
        before = self.record(writing)
        made = {**before, **hashes(writing.tensors, before)}
        return {**made, **self._modelspec(writing)}

    def record(self, writing: NamedWriting) -> dict[str, str]:
        """Return the ``ss_`` keys: those of the file that the adapter came from, brought up to date."""
        before = self._before(writing)
        targets = writing.adapter.targets.values()
        ranks, alphas = {target.rank for target in targets}, {target.alpha for target in targets}
        return {
            "ss_network_args": "{}",
            **{key: value for key, value in before.items() if key.startswith("ss_")},
            "ss_network_alpha": f"{alphas.pop()}" if len(alphas) == 1 else "Dynamic",
            "ss_network_dim": f"{ranks.pop()}" if len(ranks) == 1 else "Dynamic",
            "ss_network_module": self.network_module,
        }

    def _modelspec(self, writing: NamedWriting) -> dict[str, str]:
        before = self._before(writing)
        hashed = "modelspec.hash_sha256"
        writing.lines += settings({hashed} & before.keys(), "changed", "left out: it was of the other file")
        return {key: value for key, value in before.items() if key.startswith("modelspec.") and key != hashed}

    def _before(self, writing: NamedWriting) -> dict[str, str]:
        found = origin_of(writing.adapter, self.name).get("metadata")
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}

    def _name(self, aimed: set[str], writing: NamedWriting) -> None:
        """Choose the mangled name of each module; that of an adapted one must be its alone."""
        given = writing.context.options.prefix
        if given is not None:
            lookup(dict.fromkeys(PREFIXES), given, what="prefix")
        before = origin_of(writing.adapter, self.name).get("prefixes")
        before = [one for one in before if one in PREFIXES] if isinstance(before, list) else []
        prefix = given or (before[0] if len(before) == 1 else self.prefix)
        by_part = given is None and prefix != "lycoris" and is_pipeline(writing.net, COMPONENTS)
        for path, _ in writing.net.named_modules():
            component, dot, rest = path.partition(".")
            if by_part and dot and component in COMPONENTS:
                writing.names[path] = f"{COMPONENTS[component][0]}_{_mangled(rest)}"
            else:
                writing.names[path] = f"{prefix}_{_mangled(path)}"
        counts = Counter(writing.names.values())
        for name in sorted({writing.names[path] for path in aimed if counts[writing.names[path]] > 1}):
            several = known(sorted(path for path in writing.names if writing.names[path] == name))
            writing.problems.append(f"{several} have one name there, {name!r}")
        said = ", ".join(sorted({name_prefix(writing.names[path]) for path in aimed}))
        writing.lines += settings(["prefix"], "carried", f"{said}, in front of every name")


@dataclass(kw_only=True)
class NamedWriting(Writing):
    """A file with mangled names, in the making.

    Attributes:
        names: the mangled name of each module, by path.
        held: names of replaced tensors that have a place after all.
    """

    names: dict[str, str] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)


def has_only(slots: Mapping[str, str], wanted: Sequence[str], what: str, reading: Reading) -> bool:
    """Return True if all slots are wanted ones; refuse the keys of others."""
    others = [key for slot, key in slots.items() if slot not in wanted]
    reading.refusals += [f"{key!r} is {what}" for key in others]
    return not others


def spelled(path: str) -> tuple[str, ...]:
    """Return every name that a module may have.

    >>> spelled("unet.conv_in")[0], spelled("unet.conv_in")[-1]
    ('lora_unet_unet_conv_in', 'lora_unet_conv_in')
    """
    names = [f"{prefix}_{_mangled(path)}" for prefix in PREFIXES]
    component, dot, rest = path.partition(".")
    names += [f"{prefix}_{_mangled(rest)}" for prefix in COMPONENTS.get(component, ()) if dot]
    return tuple(dict.fromkeys(names))


def name_prefix(name: str) -> str:
    """Return the one of `PREFIXES` with which a mangled name starts; empty if there is none."""
    return next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), "")


def hashes(values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return ``sshs_model_hash`` and ``sshs_legacy_hash`` of a file with these tensors and this metadata alone.

    The first is the SHA-256 of everything after the header. The second has the first 8 digits of the SHA-256 of 64 KiB
    at 1 MiB.
    """
    facts = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in values.items()}
    start, placed = tensorfile.layout(facts, metadata, where="the export")
    model, legacy = hashlib.sha256(), hashlib.sha256()
    legacy.update(start[slice(*_LEGACY)])
    position = len(start)
    for name in placed:
        data = tensor_bytes(values[name]).numpy().data
        model.update(data)
        legacy.update(data[max(_LEGACY[0] - position, 0) : max(_LEGACY[1] - position, 0)])
        position += data.nbytes
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def check_kernel(kernel: Sequence[int], key: str, place: TargetModule) -> None:
    """Refuse a kernel of another shape than the weight's, even one with as many numbers.

    Raises:
        AdapterError: naming the key.
    """
    own = tuple(place.weight.shape[2:])
    if math.prod(kernel) > 1 and own and tuple(kernel) != own:
        raise AdapterError(f"{key!r} has the kernel {tuple(kernel)}, {place.name!r} of the base {own}")


def _without_core(core: Tensor, down: Tensor) -> tuple[Tensor, str]:
    """Return the down of a plain pair of the same rank, at least float32, and a note on its error."""
    import torch

    from loraio.adapter.rounding import round_once

    exact = with_core(core, down.flatten(1))
    dtype = torch.promote_types(torch.promote_types(core.dtype, down.dtype), torch.float32)
    made = round_once(exact, dtype)
    error = relative_error(exact, made.double())
    off = f"rounded once to {dtype_code(dtype)}, relative error {error:.2g}" if error else "without rounding"
    return made, f"lora_mid multiplied into lora_down in float64, {off}"


def _number(value: int | float) -> Tensor:
    """Return a float32 tensor, as the tools read it, if that holds the value; else float64."""
    import torch

    small = torch.tensor(value, dtype=torch.float32)
    return small if small.item() == value else torch.tensor(value, dtype=torch.float64)


def _mangled(path: str) -> str:
    return path.replace(".", "_")
