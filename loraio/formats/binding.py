"""Bind a file of another tool to a base: one adapter, with every tensor and setting accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import AFFINE, HEAD_LAYERS, STATISTICS
from loraio.adapter.metadata import FLOAT_DTYPES, WHOLE_DTYPES, Target, WholeTensor
from loraio.bases.targets import TargetModule, normalisation_modules, refuse_shared, refuse_unusable, target_modules
from loraio.errors import AdapterError, BaseMismatchError, LoraioError, StateError
from loraio.files.tensors import dtype_code, tensor_bytes, tensor_sha256
from loraio.formats.exported import ORIGIN, kept_metadata
from loraio.formats.foreign import Dialect, Factors, Foreign, ForeignLayer, Options
from loraio.formats.native import NativeMetadata
from loraio.formats.report import Line, Report, settings, tensors
from loraio.formats.sources import Source
from loraio.registry import known, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


def bind(dialect: Dialect, source: Source, base: nn.Module, options: Options) -> tuple[Adapter, Report]:
    """The adapter in a file of another tool, on a base.

    Args:
        dialect: of the file.
        source: the file.
        base: the network with the base's weights, without an adapter; only read.
        options: what the file does not say.

    Returns:
        the adapter, with the digests of the base, or of the one that an export of ours says it was made for; and what
        became of every tensor and setting.

    Raises:
        AdapterError: the file cannot be used, or alpha is missing, or something would be lost without ``lossy``.
        BaseMismatchError: layers are not in the base, or do not fit; all are listed. Or an export of ours was made for
            another base, without ``allow_base_mismatch``.
        StateError: the base carries an adapter, or a weight is shared or computed from another parametrization.
    """
    foreign, where = dialect.read(source), f"{str(source.path)!r}"
    if foreign.refusals:
        raise AdapterError(f"this {dialect.name} adapter cannot be used", problems=foreign.refusals, where=where)
    products = [f"{layer.name!r}: {layer.product}" for layer in foreign.layers if layer.product]
    if products and not options.approximate:
        raise AdapterError(
            "these layers are no plain pairs of factors",
            problems=products,
            where=where,
            hint="`loraio convert --approximate` makes pairs of the file's rank and says the error; --rank R: of R",
        )
    values, state = source.read(), _state_of(base)
    placed = _placed(dialect, foreign, base, where)
    silent = [layer for layer in foreign.layers if layer.alpha is None]
    unknown = [layer.name for layer in silent if layer.implied_alpha is None]
    if unknown and options.alpha is None:
        usual = f"; {foreign.own_alpha}" if foreign.own_alpha else ""
        raise AdapterError(
            f"the file does not say alpha, for {known(unknown, limit=3)}{usual}",
            where=where,
            hint="--alpha NUMBER (alpha=)",
        )
    binding = _Binding(state=state, base=base)
    if silent and options.alpha is not None:
        binding.lines += settings(["alpha"], "changed", f"{options.alpha!r} as given, the file does not say it")
    elif silent:
        names = known([layer.name for layer in silent], limit=3)
        binding.lines += settings(["alpha"], "changed", f"r, as is meant where a file has none: {names}")
    for layer in foreign.layers:
        place = placed[layer.name]
        if layer.alpha is None:
            layer = replace(layer, alpha=layer.implied_alpha if options.alpha is None else options.alpha)
        own = {slot: values[key] for slot, key in layer.slots.items()}
        try:
            binding.add_layer(layer, place, dialect.factors(layer, own, place, options))
        except AdapterError as error:
            binding.problems.append(f"{layer.name!r}: {error.message}")
            binding.lines += tensors(layer.slots.values(), "lost")
    for name, key in foreign.whole.items():
        binding.add_whole(name, key, values[key], module_saved=name not in foreign.biases)
    binding.add_named(foreign, values)
    binding.add_deltas()
    binding.lines += [
        Line(what="tensor", name=key, fate="carried", how=f"not used: {why}") for key, why in foreign.not_used.items()
    ]
    binding.lines += [Line(what="tensor", name=key, fate="lost", how=why) for key, why in foreign.lost.items()]
    named = {line.name for line in binding.lines if line.what == "tensor"}
    binding.problems += [f"{key!r} belongs to nothing" for key in source.tensors if key not in named]
    if binding.problems:
        raise BaseMismatchError("the adapter does not fit the base", problems=binding.problems, where=where)
    try:
        adapter = _finished(dialect, foreign, source, binding, base)
    except LoraioError as error:
        raise error.at(where) from error
    _check_base(adapter, binding.state, where, options)
    report = Report.of([*binding.lines, *foreign.lines])
    if report.lost and not options.lossy:
        raise AdapterError(
            "not everything in the file has a place in an adapter of loraio",
            problems=[str(line) for line in report.lost],
            where=where,
            hint="`loraio convert --lossy` leaves it out",
        )
    return adapter, report


class _Binding:
    """An adapter in the making, and what became of the tensors so far."""

    def __init__(self, *, state: Mapping[str, Tensor], base: nn.Module) -> None:
        self.state = state
        self.targets: dict[str, Target] = {}
        self.factors: dict[str, Tensor] = {}
        self.whole: dict[str, WholeTensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.lines: list[Line] = []
        self.problems: list[str] = []
        self._modules = dict(base.named_modules())
        self._norms = normalisation_modules(base)
        self._deltas: list[tuple[str, str, Tensor]] = []

    def add_layer(self, layer: ForeignLayer, place: TargetModule, made: Factors) -> None:
        from loraio.bases.identity import sketch

        weight = self.state[place.name]
        alpha = made.alpha if made.alpha is not None else layer.alpha
        assert alpha is not None  # it was given, or the file would have been refused
        code = dtype_code(weight.dtype)
        if code not in FLOAT_DTYPES:
            self.problems.append(f"{place.name!r} of the base is {code}, not one of {', '.join(FLOAT_DTYPES)}")
            return
        target = Target(
            kind=layer.kind,
            rank=made.rank or layer.rank,
            alpha=alpha,
            scale_rule=layer.scale_rule,
            shape=tuple(weight.shape),
            dtype=code,
            layer=place.layer.name,
            groups=place.groups,
            base_sha256=tensor_sha256(weight),
            sketch=sketch(weight),
        )
        for short, shape in target.factor_shapes.items():
            found = tuple(made.values[short].shape)
            if found != shape:
                self.problems.append(f"{layer.name!r}: {short} is {found}, {place.name!r} of the base needs {shape}")
        self.targets[place.name] = target
        self.factors |= {f"{place.name}.{short}": value.contiguous() for short, value in made.values.items()}
        fate = "changed" if made.note else "carried"
        self.lines += tensors((key for slot, key in layer.slots.items() if slot != "bias"), fate, made.note)
        if made.bias is not None:
            name = f"{place.path}.bias" if place.path else "bias"
            self._deltas.append((name, layer.slots["bias"], made.bias))

    def add_whole(self, name: str, key: str, value: Tensor, *, module_saved: bool) -> None:
        """One tensor in the place of the base's; of those that are the base's own nothing needs to be kept."""
        base = self.state.get(name)
        if base is None:
            self.problems.append(f"{key!r}: the base has no {name!r}{nearest(name, self.state)}")
            return
        how = ""
        if value.dtype != base.dtype and value.is_floating_point() and base.is_floating_point():
            how = f"from {value.dtype} to the base's {base.dtype}"
            value = value.to(base.dtype)
        if value.dtype != base.dtype or dtype_code(base.dtype) not in WHOLE_DTYPES:
            self.problems.append(f"{key!r} is {value.dtype}, {name!r} of the base {base.dtype}")
            return
        if _same(value, base):
            self.lines += tensors([key], "carried", "as in the base")
            return
        if name in self.targets:
            self.problems.append(f"{key!r} is not the base's {name!r}: the adapter belongs to another base")
            return
        try:
            self._replace(name, value, self._role(name, module_saved))
        except AdapterError as error:
            self.problems.append(f"{key!r}: {error.message}")
            return
        self.lines += tensors([key], "changed" if how else "carried", how)

    def add_named(self, foreign: Foreign, values: Mapping[str, Tensor]) -> None:
        """Tensors that are added to the base's own, whose modules are matched forward from the base's names."""
        spelled: dict[str, list[str]] = {}
        for path in self._modules if foreign.spelled is not None else ():
            for name in dict.fromkeys(foreign.spelled(path)) if foreign.spelled is not None else ():
                spelled.setdefault(name, []).append(path)
        for one in foreign.added:
            found = spelled.get(one.module, [])
            if len(found) != 1:
                several = f"may be {known(found)}" if found else f"is no module of it{nearest(one.module, spelled)}"
                self.problems.append(f"{one.key!r}: {one.module!r} {several}")
                continue
            name = f"{found[0]}.{one.parameter}" if found[0] else one.parameter
            self._deltas.append((name, one.key, values[one.key].double()))

    def add_deltas(self) -> None:
        """What is added to a tensor of the base becomes part of it, and replaces it: strength has no hold on it."""
        from loraio.adapter.rounding import round_once

        for name, key, delta in self._deltas:
            base = self.tensors.get(name, self.state.get(name))
            path, _, last = name.rpartition(".")
            if base is None:
                self.lines += tensors([key], "lost", f"the layer {path!r} of the base has no {last} to add it to")
                continue
            if delta.shape != base.shape:
                self.problems.append(f"{key!r} is {tuple(delta.shape)}, {name!r} of the base {tuple(base.shape)}")
                continue
            self._replace(name, round_once(base.double() + delta, base.dtype), self._role(name, module_saved=False))
            self.lines += tensors([key], "changed", f"added to {name!r}, which is replaced whole, at any strength")

    def belong_to(self, kept: NativeMetadata) -> None:
        """Let what is known of the adapter's own base take the place of what was seen on this one."""
        for name, target in self.targets.items():
            own = kept.targets.get(name)
            if own is not None and own.shape == target.shape:
                self.targets[name] = replace(target, dtype=own.dtype, sketch=own.sketch, base_sha256=own.base_sha256)
        for name, whole in self.whole.items():
            told = kept.whole.get(name)
            if told is not None and told.base_shape == whole.base_shape:
                self.whole[name] = replace(whole, base_sha256=told.base_sha256)

    def _replace(self, name: str, value: Tensor, role: str) -> None:

        base = self.state[name]
        self.whole[name] = WholeTensor(
            role=role,
            shape=tuple(value.shape),
            dtype=dtype_code(base.dtype),
            base_sha256=tensor_sha256(base),
            base_shape=tuple(base.shape),
        )
        self.tensors[name] = value.contiguous()

    def _role(self, name: str, module_saved: bool) -> str:
        path, _, last = name.rpartition(".")
        module = self._modules.get(path)
        if path in self._norms and last in (*AFFINE, *STATISTICS):
            return "norm"
        headlike = any(cls.__name__ in HEAD_LAYERS for cls in type(module).__mro__)
        if module_saved and headlike and getattr(module, "groups", 1) == 1:
            return "head"
        return "bias" if last.endswith("bias") else "layer"


def _placed(dialect: Dialect, foreign: Foreign, base: nn.Module, where: str) -> dict[str, TargetModule]:
    """The weight of each layer, matched forward from the base's own names: many dialects' names cannot be inverted."""
    spelled: dict[str, list[TargetModule]] = {}
    for place in target_modules(base).values():
        for name in dialect.spell(place):
            spelled.setdefault(name, []).append(place)
    problems, placed = [], {}
    for layer in foreign.layers:
        found = spelled.get(layer.name, [])
        if len(found) != 1:
            several = f"may be {known(place.name for place in found)}"
            problems.append(
                f"{layer.name!r} {several if found else f'is no layer of it{nearest(layer.name, spelled)}'}"
            )
            continue
        place = placed[layer.name] = found[0]
        reason = dialect.refusal(place.layer.name, layer.kind, grouped=place.groups > 1)
        if reason is not None:
            problems.append(f"{layer.name!r}: {reason}")
        refuse_unusable(place)
    twice = [name for name, count in Counter(place.name for place in placed.values()).items() if count > 1]
    problems += [f"{name!r} is adapted twice" for name in twice]
    if problems:
        raise BaseMismatchError(f"the {dialect.name} adapter does not fit the base", problems=problems, where=where)
    refuse_shared(base, [place.name for place in placed.values()])
    return placed


def _finished(dialect: Dialect, foreign: Foreign, source: Source, binding: _Binding, base: nn.Module) -> Adapter:
    """The adapter; what an export of ours kept in the header comes back where it is still about the same adapter.

    Whatever became of the rest since the export, the adapter stays with the base that it was exported for.
    """
    from loraio.bases.identity import base_reference
    from loraio.bases.networks import heads_of, network_args_of, network_of

    kept = kept_metadata(source)
    if kept is not None:
        binding.belong_to(kept)
    if kept is not None and _is_about(kept, binding):
        return Adapter(
            targets=kept.targets,
            factors=binding.factors,
            base=kept.base,
            whole=kept.whole,
            tensors=binding.tensors,
            training=kept.training,
            extra=kept.extra,
        )
    reference = (
        kept.base
        if kept is not None
        else base_reference(
            binding.state, network=network_of(base), network_args=network_args_of(base), heads=heads_of(base)
        )
    )
    return Adapter(
        targets=dict(sorted(binding.targets.items())),
        factors=binding.factors,
        base=reference,
        whole=binding.whole,
        tensors=binding.tensors,
        training={ORIGIN: {"dialect": dialect.name, "settings": dict(foreign.settings)}},
    )


def _is_about(kept: NativeMetadata, binding: _Binding) -> bool:
    """Whether the kept metadata say of the adapter what the file and the base do, once it belongs to its own base."""
    same = binding.targets == {name: replace(target, extra={}) for name, target in kept.targets.items()}
    return same and {(n, w.role, w.shape, w.dtype) for n, w in kept.whole.items()} == {
        (n, w.role, w.shape, w.dtype) for n, w in binding.whole.items()
    }


def _check_base(adapter: Adapter, state: Mapping[str, Tensor], where: str, options: Options) -> None:
    from loraio.bases.identity import check_base

    try:
        check_base(adapter, state, allow_mismatch=options.allow_base_mismatch)
    except BaseMismatchError as error:
        raise BaseMismatchError(error.message, problems=error.problems, where=where, hint=error.hint) from error


def _state_of(base: nn.Module) -> dict[str, Tensor]:
    from loraio.bases.attached import carries_adapter

    if carries_adapter(base):
        raise StateError("the base carries an adapter", hint="live.detach() first")
    return {name: tensor.detach() for name, tensor in base.state_dict().items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and tensor_bytes(a).equal(tensor_bytes(b))
