"""Convert adapter files from one dialect to another, with a line on every tensor and every setting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter
from loraio.bases.checkpoints import BaseCheckpoint
from loraio.bases.identity import check_base
from loraio.bases.models import load_base, model_from
from loraio.bases.networks import build_network, resize_heads
from loraio.bases.own_code import is_own_code
from loraio.errors import AdapterError, ConfigError, LoraioError, OutputError
from loraio.files.atomic import check_output
from loraio.files.pickles import PICKLE_SUFFIXES
from loraio.files.sharded import checkpoint_files
from loraio.formats import dialects, loading
from loraio.formats.dialects import DIALECTS
from loraio.formats.foreign import Context, Options
from loraio.formats.report import Report
from loraio.formats.sources import adapter_files
from loraio.registry import lookup

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The result of `convert`, or of its dry run.

    Attributes:
        source: dialect of the input.
        reason: the evidence for that dialect.
        dialect: of the output.
        read: the fate of the input's tensors and settings; empty for a file of ours, which is kept whole.
        written: the fate of the adapter's tensors and settings; empty if the output is a file of ours.
        mismatch: differences of the given base from the adapter's own, if they were allowed.
        done: True if the output was written.
    """

    source: str
    reason: str
    dialect: str
    read: Report
    written: Report
    done: bool
    mismatch: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        """True if anything has no place in the output."""
        return bool(self.read.lost or self.written.lost)


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    base: str | os.PathLike[str] | None = None,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    alpha: int | float | None = None,
    enable_lora: Sequence[bool] | None = None,
    lossy: bool = False,
    approximate: bool = False,
    rank: int | None = None,
    as_full_delta: bool = False,
    prefix: str | None = None,
    allow_base_mismatch: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write an adapter in another dialect.

    If something would be lost, nothing is written without ``lossy``.

    Args:
        path: an adapter of any dialect, a file or a folder.
        output: the file to make; for PEFT a folder.
        to: "native", or a name in `loraio.formats.DIALECTS`.
        base: the base checkpoint, which files of other tools need.
        model: the base's network, if its file does not name it, or if there is no base.
        model_args: keyword options of the network.
        alpha: of every layer without an alpha in the file.
        enable_lora: the flags of a MergedLinear of loralib, which its files do not hold.
        lossy: leave out everything without a place in the output.
        approximate: make pairs of factors of layers that are none (LoHa, LoKr), and report the error.
        rank: of those pairs; None for the file's own.
        as_full_delta: write the whole change of each weight; only "lycoris" has a form for it.
        prefix: in front of the names of modules, for "kohya" and "lycoris" ("lora_te") and "diffusers" ("transformer").
        allow_base_mismatch: accept a base with other values or dtypes than the adapter was trained on. Only our own
            files, and those that loraio wrote for other tools, know them. The output belongs to the adapter's own base.
        dry_run: write nothing.
        overwrite: replace an existing output.

    Raises:
        UnknownNameError: no such dialect, or no such prefix.
        ConfigError: an option that the dialect does not take, or a rank without ``approximate``.
        OutputError: the name is none under which a file of torch.save would be read.
        BaseMismatchError: the adapter was made for another base than the given one.
        LoraioError: as `loraio.load`, `loraio.load_base` and `loraio.save`.
    """
    dialect = None if to == "native" else lookup({"native": None, **DIALECTS}, to, what="dialect")
    options = Options(
        alpha=alpha,
        lossy=True,
        enable_lora=enable_lora,
        approximate=approximate,
        rank=rank,
        as_full_delta=as_full_delta,
        prefix=prefix,
        allow_base_mismatch=allow_base_mismatch,
    )
    _check(options, to)
    if dialect is not None and dialect.container == "pickle" and Path(output).suffix.lower() not in PICKLE_SUFFIXES:
        raise OutputError(
            f"{str(output)!r} would be a file of torch.save", hint=f"a name that ends in {PICKLE_SUFFIXES[0]}"
        )
    found = dialects.identify(path)
    network = load_base(base, model=model, model_args=model_args) if base is not None else None
    state = None if network is None else network.state_dict()
    adapter, read = loading.load_reported(path, base=network, options=options)
    mismatch = check_base(adapter, state, allow_mismatch=allow_base_mismatch) if state is not None else ()
    encoded = None
    if dialect is not None:
        shown = network if network is not None else network_for_adapter(adapter, model=model, model_args=model_args)
        encoded = dialect.encode(adapter, Context(network=shown, state=state, options=options))
    made = Conversion(
        source=found.dialect.name if found.dialect is not None else "native",
        reason=found.reason,
        dialect=to,
        read=read or Report(),
        written=encoded.report if encoded is not None else Report(),
        done=False,
        mismatch=mismatch,
    )
    if dry_run or (made.lost and not lossy):
        return made
    inputs = [*adapter_files(path), *(checkpoint_files(base) if base is not None else ())]
    if dialect is None or encoded is None:
        check_output(output, overwrite=overwrite, inputs=inputs)
        loading.save(adapter, output, overwrite=overwrite)
    else:
        loading.write(dialect, encoded, output, overwrite=overwrite, inputs=inputs)
    return replace(made, done=True)


def _check(options: Options, to: str) -> None:
    if options.rank is not None and not options.approximate:
        raise ConfigError("a rank is for layers that are approximated", hint="--approximate (approximate=True)")
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"rank is {options.rank}, it must be at least 1")
    lacks = {"as_full_delta": "form for the whole change of a weight", "prefix": "prefix to choose"}
    for option, what in lacks.items():
        takers = sorted(name for name, dialect in DIALECTS.items() if option in dialect.takes)
        if getattr(options, option) not in (None, False) and to not in takers:
            raise ConfigError(f"{to} has no {what}", hint=f"--to {' or '.join(takers)}")


def network_for_adapter(
    adapter: Adapter, *, model: str | None = None, model_args: Mapping[str, Any] | None = None
) -> nn.Module | None:
    """Build the network of an adapter, by the given name or its own, with weights that mean nothing.

    Returns:
        None if there is no name, or one of code that no file may run.

    Raises:
        LoraioError: there is no such network, or it cannot be built.
    """
    name, reference = model or adapter.base.network, adapter.base
    if name is None or (model is None and is_own_code(name)):
        return None
    own = name == reference.network
    args = reference.network_args if model_args is None and own else model_args
    network = build_network(name, args=args, seed=0)
    if own and reference.heads:
        resize_heads(network, reference.heads)
    return network


def load_for(
    path: str | os.PathLike[str],
    base: BaseCheckpoint,
    *,
    alpha: int | float | None = None,
    allow_base_mismatch: bool = False,
) -> Adapter:
    """Load an adapter for a base checkpoint; the base's network is built only if the adapter's dialect needs it.

    Raises:
        LoraioError: as `loraio.load` and `loraio.load_base`.
    """
    if dialects.identify(path).dialect is None:
        return loading.load(path)
    try:
        network = model_from(base)
    except LoraioError as error:
        raise AdapterError(
            f"an adapter of another tool needs the base's network: {error.message}", where=error.where, hint=error.hint
        ) from error
    return loading.load(path, base=network, alpha=alpha, allow_base_mismatch=allow_base_mismatch)
