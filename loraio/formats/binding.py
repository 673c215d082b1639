"""Bind the file of another tool to a base: make its adapter, and account for every tensor and setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from loraio.adapter.adapter import Adapter
from loraio.bases.targets import TargetModule, refuse_shared, refuse_unusable, target_modules
from loraio.errors import AdapterError, BaseMismatchError, LoraioError, StateError
from loraio.formats.assembly import Assembly
from loraio.formats.exported import ORIGIN, kept_metadata
from loraio.formats.foreign import Dialect, Foreign, ForeignLayer, Options
from loraio.formats.native import NativeMetadata
from loraio.formats.report import Line, Report, settings, tensors
from loraio.formats.sources import Source
from loraio.registry import known, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


def bind(dialect: Dialect, source: Source, base: nn.Module, options: Options) -> tuple[Adapter, Report]:
    """Make an adapter of another tool's file, for a base.

    Args:
        dialect: of the file.
        source: the file.
        base: the network with the base's weights, without an adapter; only read.
        options: settings that the file does not hold.

    Returns:
        the adapter, and the fate of every tensor and setting. The adapter has the digests of the base, or of the base
        that our own export names.

    Raises:
        AdapterError: the file cannot be used, or alpha is missing, or something would be lost without ``lossy``.
        BaseMismatchError: layers are not in the base, or do not fit; all are listed. Or our own export names another
            base, without ``allow_base_mismatch``.
        StateError: the base carries an adapter, or a weight is shared or computed from another parametrization.
    """
    from loraio.bases.identity import check_base

    foreign, where = dialect.read(source), f"{str(source.path)!r}"
    _refuse(dialect, foreign, options, where)
    values, state = source.read(), _state_of(base)
    places = _place(dialect, foreign, base, where)
    layers, lines = _fill_in_alphas(foreign, options, where)
    assembly = Assembly(base, state, lines)
    for layer in layers:
        own = {slot: values[key] for slot, key in layer.slots.items()}
        try:
            assembly.add_layer(layer, places[layer.name], dialect.factors(layer, own, places[layer.name], options))
        except AdapterError as error:
            assembly.problems.append(f"{layer.name!r}: {error.message}")
            assembly.lines += tensors(layer.slots.values(), "lost")
    _add_tensors(foreign, values, assembly)
    _account(foreign, source, assembly, where)
    try:
        adapter = _finish(dialect, foreign, source, assembly)
        check_base(adapter, state, allow_mismatch=options.allow_base_mismatch)
    except LoraioError as error:
        raise error.at(where) from error
    report = Report.of([*assembly.lines, *foreign.lines])
    if report.lost and not options.lossy:
        raise AdapterError(
            "not everything in the file has a place in an adapter of loraio",
            problems=[str(line) for line in report.lost],
            where=where,
            hint="`loraio convert --lossy` leaves it out",
        )
    return adapter, report


def _refuse(dialect: Dialect, foreign: Foreign, options: Options, where: str) -> None:
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


def _state_of(base: nn.Module) -> dict[str, Tensor]:
    from loraio.bases.attached import carries_adapter

    if carries_adapter(base):
        raise StateError("the base carries an adapter", hint="live.detach() first")
    return {name: tensor.detach() for name, tensor in base.state_dict().items()}


def _place(dialect: Dialect, foreign: Foreign, base: nn.Module, where: str) -> dict[str, TargetModule]:
    """Return the weight of each layer, by the layer's name.

    Names are matched forward, from the base's to the dialect's: those of many dialects cannot be inverted.
    """
    spelled = spellings(target_modules(base).values(), dialect.spell)
    problems, places = [], {}
    for layer in foreign.layers:
        found = spelled.get(layer.name, [])
        if len(found) != 1:
            several = f"may be {known(place.name for place in found)}"
            missing = f"is no layer of it{nearest(layer.name, spelled)}"
            problems.append(f"{layer.name!r} {several if found else missing}")
            continue
        place = places[layer.name] = found[0]
        reason = dialect.refusal(place.layer.name, layer.kind, grouped=place.groups > 1)
        if reason is not None:
            problems.append(f"{layer.name!r}: {reason}")
        refuse_unusable(place)
    counts = Counter(place.name for place in places.values())
    problems += [f"{name!r} is adapted twice" for name, count in counts.items() if count > 1]
    if problems:
        raise BaseMismatchError(f"the {dialect.name} adapter does not fit the base", problems=problems, where=where)
    refuse_shared(base, [place.name for place in places.values()])
    return places


def spellings(things: Iterable[T], spell: Callable[[T], Sequence[str]]) -> dict[str, list[T]]:
    """Return the things that each name may stand for."""
    found: dict[str, list[T]] = {}
    for thing in things:
        for name in dict.fromkeys(spell(thing)):
            found.setdefault(name, []).append(thing)
    return found


def _fill_in_alphas(foreign: Foreign, options: Options, where: str) -> tuple[list[ForeignLayer], list[Line]]:
    """Return the layers, all with an alpha, and a line if some had none."""
    layers = list(foreign.layers)
    silent = [layer for layer in layers if layer.alpha is None]
    unknown = [layer.name for layer in silent if layer.implied_alpha is None]
    if unknown and options.alpha is None:
        usual = f"; {foreign.own_alpha}" if foreign.own_alpha else ""
        raise AdapterError(
            f"the file does not say alpha, for {known(unknown, limit=3)}{usual}",
            where=where,
            hint="--alpha NUMBER (alpha=)",
        )
    if not silent:
        return layers, []
    if options.alpha is not None:
        how = f"{options.alpha!r} as given, the file does not say it"
    else:
        how = f"r, as is meant where a file has none: {known([layer.name for layer in silent], limit=3)}"
    for at, layer in enumerate(layers):
        if layer.alpha is None:
            layers[at] = replace(layer, alpha=layer.implied_alpha if options.alpha is None else options.alpha)
    return layers, settings(["alpha"], "changed", how)


def _add_tensors(foreign: Foreign, values: Mapping[str, Tensor], assembly: Assembly) -> None:
    """Add the tensors that replace those of the base, or are added to them."""
    for name, key in foreign.whole.items():
        assembly.add_whole(name, key, values[key], module_saved=name not in foreign.biases)
    spelled = spellings(assembly.modules, foreign.spelled) if foreign.spelled is not None else {}
    for one in foreign.added:
        found = spelled.get(one.module, [])
        if len(found) == 1:
            assembly.add_delta(found[0], one.parameter, one.key, values[one.key].double())
            continue
        several = f"may be {known(found)}" if found else f"is no module of it{nearest(one.module, spelled)}"
        assembly.problems.append(f"{one.key!r}: {one.module!r} {several}")
    assembly.apply_deltas()


def _account(foreign: Foreign, source: Source, assembly: Assembly, where: str) -> None:
    """Check that every tensor of the file has a line, and that nothing was wrong."""
    for key, why in foreign.not_used.items():
        assembly.lines += tensors([key], "carried", f"not used: {why}")
    for key, why in foreign.lost.items():
        assembly.lines += tensors([key], "lost", why)
    named = {line.name for line in assembly.lines if line.what == "tensor"}
    problems = [*assembly.problems, *(f"{key!r} belongs to nothing" for key in source.tensors if key not in named)]
    if problems:
        raise BaseMismatchError("the adapter does not fit the base", problems=problems, where=where)


def _finish(dialect: Dialect, foreign: Foreign, source: Source, assembly: Assembly) -> Adapter:
    """Return the adapter, with the metadata of our own export if they still describe it.

    If they do not, the adapter still belongs to the base that it was exported for.
    """
    kept = kept_metadata(source)
    if kept is not None:
        assembly.belong_to(kept)
        if _is_about(kept, assembly):
            return kept.with_values(assembly.factors, assembly.tensors)
    return Adapter(
        targets=dict(sorted(assembly.targets.items())),
        factors=assembly.factors,
        base=kept.base if kept is not None else assembly.base_reference(),
        whole=assembly.whole,
        tensors=assembly.tensors,
        training={ORIGIN: {"dialect": dialect.name, "settings": dict(foreign.settings)}},
    )


def _is_about(kept: NativeMetadata, assembly: Assembly) -> bool:
    """Return True if kept metadata agree with the file and the base."""
    same = assembly.targets == {name: replace(target, extra={}) for name, target in kept.targets.items()}
    return same and {(n, w.role, w.shape, w.dtype) for n, w in kept.whole.items()} == {
        (n, w.role, w.shape, w.dtype) for n, w in assembly.whole.items()
    }
