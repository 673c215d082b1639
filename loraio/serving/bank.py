"""Many adapters by name for live models: read when first used, kept within a bound, one or several to a batch."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter, check_strength
from loraio.adapter.layers import TargetModule, target_modules
from loraio.bases.identity import BaseIdentity, identity_of
from loraio.bases.writes import WeakModelMark
from loraio.errors import ConfigError, FormatError, LoraioError, MissingFileError, ShapeError, StateError
from loraio.files.names import name_clashes, normal_form
from loraio.formats.loading import load_bytes
from loraio.formats.pack import SUFFIX, Pack, listed_files, read_index, read_member, read_range, stamp_of
from loraio.live.attachment import Attachment, attach, attachment_of
from loraio.live.base_state import base_state_dict, refuse_attached
from loraio.live.reserving import Reserve
from loraio.registry import lookup
from loraio.serving.layer_route import (
    Folded,
    Route,
    UnfitError,
    find_route,
    gathered,
    run_groups,
    run_layers,
    takes_layers,
)

MAX_BYTES = 2 << 30
"""What a bank keeps in memory unless told otherwise: 2 GiB."""


class Bank:
    """Adapters by name, from a folder, a pack or a mapping.

    Opening lists the names and reads no adapter. An adapter is read and checked, bytes and contents, when it is first
    used, and again only after its file was changed or it was evicted; that it belongs to a model is checked against
    the model's own digests, which are computed once, see `loraio.bases.identity.BaseIdentity`. No work on an adapter
    grows
    with the number of names. Methods may be called from several threads. While one thread swaps a model's adapter,
    others may run the model; otherwise each model belongs to one thread at a time.

    A folder's adapters are its ``*.safetensors``, named without that ending, in Unicode normal form C; either form is
    found. Links, hidden files and deeper folders are not looked at, and a name is only looked up in the list, never
    made into a path. Names that differ in nothing but case, normal form or invisible characters are not adapters of the
    bank: asking for one says which they are.
    Each use of a name looks at its file's device, inode, size and time of writing: a changed file is read and checked
    again, one that is gone is an error. New names are seen by `refresh`, and so is a pack that was written anew.

    Attributes:
        max_bytes: the bound on what is kept: factors, and folded weights of mixed batches. The least recently used goes
            first. What is larger by itself is used and not kept; what is in use elsewhere lives on there.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Adapter | str | os.PathLike[str]],
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """List the adapters.

        Args:
            source: a folder, a pack, or adapters and paths of adapter files by name.
            max_bytes: bound on memory, in bytes, 0 or more.

        Raises:
            MissingFileError: no such folder or file.
            FormatError: the file is no pack.
            ConfigError: a bound below 0.
        """
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes!r}, it must be a whole number of at least 0")
        self.max_bytes = max_bytes
        self._source = dict(source) if isinstance(source, Mapping) else Path(source)
        self._resident = _Resident(max_bytes)
        self._lives: weakref.WeakKeyDictionary[nn.Module, _Live] = weakref.WeakKeyDictionary()
        self._lives_lock = threading.Lock()
        self._listed = _list(self._source)

    def __repr__(self) -> str:
        return f"<Bank of {len(self)} adapters, {self.resident_bytes} of {self.max_bytes} bytes resident>"

    def __len__(self) -> int:
        return len(self._listed.entries)

    def __contains__(self, name: object) -> bool:
        return _normal(name) in self._listed.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of that name, read where it is not resident or its file was changed.

        Raises:
            UnknownNameError: no such name; the error says the nearest.
            ConfigError: its name differs from another one in nothing but case or normal form.
            MissingFileError: its file is gone.
            FormatError, AdapterError: as `loraio.load`.
        """
        return self._load(name)[1]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._listed.entries))

    @property
    def resident_bytes(self) -> int:
        """Bytes of factors and folded weights that are kept now; at most ``max_bytes``."""
        return self._resident.total

    def refresh(self) -> None:
        """List the source again: new names appear and removed ones go; a pack's index is read again.

        Raises:
            MissingFileError, FormatError: as when the bank was made; the old list stays.
        """
        self._listed = _list(self._source)

    def attach(
        self, model: nn.Module, name: str, strength: float = 1.0, *, reserve: Reserve | Literal[True] = None
    ) -> Attachment:
        """As `loraio.attach`, by name.

        Args:
            model: the base.
            name: of the adapter.
            strength: multiplies its scale.
            reserve: as `loraio.attach`; True reserves what any adapter of the bank changes, which reads them all.

        Raises:
            UnknownNameError, FormatError and others: as ``bank[name]``; nothing was changed.
            BaseMismatchError, StateError, ConfigError: as `loraio.attach`.
        """
        wanted = (self[each] for each in self) if reserve is True else reserve
        return attach(model, self[name], strength, reserve=wanted)

    def swap(self, model: nn.Module, name: str) -> Attachment:
        """Put an adapter in the place of the one that the model carries, or on the model if it carries none.

        When an error comes, the model computes what it did before.

        Returns:
            the model's handle; strength and on/off are as they were.

        Raises:
            UnknownNameError, FormatError and others: as ``bank[name]``.
            BaseMismatchError, StateError: as `Attachment.swap`.
        """
        adapter = self[name]
        try:
            live = attachment_of(model)
        except StateError:
            return attach(model, adapter)
        live.swap(adapter)
        return live

    def forward(
        self, model: nn.Module, x: Tensor, names: Sequence[str | None], *, strength: float | Sequence[float] = 1.0
    ) -> Any:
        """The outputs of a batch in which each sample has its own adapter.

        As if each adapter were attached for its own samples. Where the batch goes by groups this is what happens, to
        the bit; where it goes by layers, float32 sums come in another order. `loraio.serving.layer_route` says
        when. Without
        gradients. Everything is looked up, read and checked before the model runs.

        Args:
            model: the base in eval mode, with no adapter on it.
            x: (n, ...), the samples.
            names: n of them; None is the base.
            strength: one for all samples, or n of them.

        Returns:
            what the model gives: a tensor with n rows, or tuples, lists or dicts of such tensors.

        Raises:
            UnknownNameError, FormatError and others: as ``bank[name]``.
            ShapeError: not as many names or strengths as samples.
            ConfigError: a strength is not a finite number, or an adapter brings whole tensors of its own.
            BaseMismatchError: an adapter does not belong to the model.
            StateError: the model is in training mode or carries an adapter, or gives no rows.
        """
        choices = _choices(x, names, strength)
        distinct = list(dict.fromkeys(choices))
        picked = [_Picked(name, power, *self._load(name)) for name, power in distinct if name is not None]
        for pick in picked:
            if pick.adapter.whole:
                raise ConfigError(
                    f"adapter {pick.name!r} brings whole tensors of its own, which a mixed batch has no place for",
                    hint="bank.swap(model, name), and a batch of its own",
                )
        live = self._live(model)
        every = dict(model.named_modules(remove_duplicate=False))
        base = live.known(every)
        if base is None:
            refuse_attached(model)
        if any(module.training for module in every.values()):
            raise StateError("the model is in training mode", hint="model.eval()")
        if base is None:
            base = live.learn(model, every)
        for pick in picked:
            live.check(model, pick, base.digest)
        modules = {name: TargetModule(module=every[facts["path"]], **facts) for name, facts in base.targets.items()}
        with torch.no_grad():
            if len(distinct) < 2 and not picked:
                return model(x)
            by_choice = {(pick.name, pick.strength): pick for pick in picked}
            members: dict[tuple[str | None, float], list[int]] = {choice: [] for choice in distinct}
            for row, choice in enumerate(choices):
                members[choice].append(row)
            order = [row for group in members.values() for row in group]
            sizes = [len(group) for group in members.values()]
            rows = torch.tensor(order, device=x.device)
            groups = [None if name is None else by_choice[name, power] for name, power in distinct]
            outputs = self._run(live, model, modules, x.index_select(0, rows), sizes, groups, base.placed)
            return gathered(outputs, rows)

    def _load(self, name: str) -> tuple[_Version, Adapter]:
        """The adapter of that name and the version of its file, from memory where that is still current."""
        listed, name = self._listed, _normal(name)
        if isinstance(name, str) and name in listed.clashes:
            raise ConfigError(f"adapter {name!r} cannot be used: {listed.clashes[name]}", hint="rename one of them")
        entry = lookup(listed.entries, name, what="adapter")
        try:
            version = entry, entry.stamp()
            kept: tuple[_Version, Adapter] | None = self._resident.get(("adapter", name))
            if kept is not None and kept[0] == version:
                return kept
            stamp, adapter = entry.load()
        except LoraioError as error:
            message = f"adapter {name!r}: {error.message}"
            raise type(error)(message, problems=error.problems, where=error.where, hint=error.hint) from error
        found = (entry, stamp), adapter
        self._resident.put(("adapter", name), found, sum(tensor.nbytes for tensor in adapter.all_tensors.values()))
        return found

    def _live(self, model: nn.Module) -> _Live:
        with self._lives_lock:
            live = self._lives.get(model)
            if live is None:
                live = self._lives[model] = _Live()
                weakref.finalize(model, self._resident.drop, live).atexit = False
            return live

    def _run(
        self,
        live: _Live,
        model: nn.Module,
        modules: Mapping[str, TargetModule],
        x: Tensor,
        sizes: Sequence[int],
        groups: Sequence[_Picked | None],
        placed: _Placed,
    ) -> Any:
        """The outputs of a sorted batch, by the route that the network and the size of the batch ask for."""
        adapters = [pick.adapter for pick in groups if pick is not None]
        targets = dict.fromkeys(name for adapter in adapters for name in adapter.targets)
        bases = {name: modules[name].weight for name in targets}
        folded = (self._folded(live, bases, pick, placed) for pick in groups)
        plan = (frozenset(targets), x.shape[1:], x.dtype, x.device)
        bytes_of = {name: weight.nbytes for name, weight in bases.items()}
        needed = sum(bytes_of[name] for adapter in adapters for name in adapter.targets)
        if len(groups) < 2 or 2 * needed > self.max_bytes:  # it holds all of them at once, and packed
            return run_groups(model, modules, x, sizes, folded)
        if plan not in live.routes:
            live.routes[plan] = find_route(model, [modules[name] for name in targets], x)
        route = live.routes[plan]
        if route is None or not takes_layers(route, len(x), sum(bytes_of.values())):
            return run_groups(model, modules, x, sizes, folded)
        held = list(folded)
        base = self._folded(live, bases, None, placed)
        packed = [len(one.packed) for one in (*held, base)]
        try:
            outputs = run_layers(model, modules, x, sizes, held, base=base, packed=route.packed)
        except UnfitError:
            live.routes[plan] = None
            return run_groups(model, modules, x, sizes, held)
        for pick, one, before in zip((*groups, None), (*held, base), packed, strict=True):
            if len(one.packed) > before:
                self._keep(live, pick, placed, one)
        return outputs

    def _folded(self, live: _Live, bases: Mapping[str, Tensor], pick: _Picked | None, placed: _Placed) -> Folded:
        """The adapter's targets with the adapter in them: kept, or computed and kept. Without a pick, the base's."""
        kept: tuple[Any, Folded] | None = self._resident.get(_key(live, pick))
        if kept is not None and kept[0] == (pick and pick.version, placed):
            return kept[1]
        weights = {}
        if pick is not None:
            with torch.inference_mode(False), torch.no_grad():
                for name in pick.adapter.targets:
                    base = bases[name]
                    # torch.matmul sums in another order where the weight asks for gradients: as the base asks
                    weight = pick.adapter.fold(name, base, strength=pick.strength)
                    weights[name] = weight.requires_grad_(base.requires_grad)
        folded = Folded(weights)
        self._keep(live, pick, placed, folded)
        return folded

    def _keep(self, live: _Live, pick: _Picked | None, placed: _Placed, folded: Folded) -> None:
        """Keep what is folded, with the size that it has now."""
        self._resident.put(_key(live, pick), ((pick and pick.version, placed), folded), folded.nbytes)


def _key(live: _Live, pick: _Picked | None) -> tuple[Any, ...]:
    return (live, pick and pick.name, pick and pick.strength)


class _Entry(Protocol):
    """Where one adapter comes from; equal to another one exactly when that is the same place."""

    def stamp(self) -> tuple[int, ...]:
        """Of what is there now, without reading it."""
        ...

    def load(self) -> tuple[tuple[int, ...], Adapter]:
        """The adapter, checked, and the stamp of what was read."""
        ...


_Version = tuple[_Entry, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _File:
    """A plain file."""

    path: Path
    follow: bool = False

    def stamp(self) -> tuple[int, ...]:
        try:
            status = self.path.stat(follow_symlinks=self.follow)
        except FileNotFoundError:
            raise MissingFileError("its file is gone", where=f"{str(self.path)!r}", hint="bank.refresh()") from None
        except OSError as error:
            raise MissingFileError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a plain file any more", where=f"{str(self.path)!r}")
        return stamp_of(status)

    def load(self) -> tuple[tuple[int, ...], Adapter]:
        self.stamp()  # opening a pipe would wait for a writer
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (0 if self.follow else getattr(os, "O_NOFOLLOW", 0))
        try:
            descriptor = os.open(self.path, flags | getattr(os, "O_NONBLOCK", 0))
            try:
                before = os.fstat(descriptor)
                data = read_range(descriptor, 0, before.st_size)
                changed = stamp_of(os.fstat(descriptor)) != stamp_of(before)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MissingFileError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error
        if changed or len(data) != before.st_size:
            raise FormatError("the file changed while it was being read", where=f"{str(self.path)!r}")
        return stamp_of(before), load_bytes(data, self.path)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A member of a pack; the index is one object for all of them."""

    index: Pack
    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Packed) and self.index is other.index and self.name == other.name

    def __hash__(self) -> int:
        return hash((id(self.index), self.name))

    def stamp(self) -> tuple[int, ...]:
        return _File(self.index.path, follow=True).stamp()

    def load(self) -> tuple[tuple[int, ...], Adapter]:
        data = read_member(self.index, self.name)
        return self.index.stamp, load_bytes(data, f"{self.index.path}:{self.name}")


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """An adapter that the caller has in memory."""

    adapter: Adapter

    def stamp(self) -> tuple[int, ...]:
        return ()

    def load(self) -> tuple[tuple[int, ...], Adapter]:
        return (), self.adapter


@dataclass(frozen=True, slots=True)
class _Listed:
    """The names of a source, and those that cannot be told apart everywhere, with what is wrong with each."""

    entries: Mapping[str, _Entry]
    clashes: Mapping[str, str]


def _list(source: Path | Mapping[str, Adapter | str | os.PathLike[str]]) -> _Listed:
    if isinstance(source, Mapping):
        given = source.items()
        pairs = [
            (_normal(name), _Given(a) if isinstance(a, Adapter) else _File(Path(a), follow=True)) for name, a in given
        ]
    elif source.is_dir():
        stems = {entry.name: entry.name.removesuffix(SUFFIX) for entry in listed_files(source)}
        pairs = [(normal_form(stem), _File(source / file)) for file, stem in stems.items()]
    else:
        index = read_index(source)
        return _Listed({name: _Packed(index, name) for name in index.members}, {})
    clashes = name_clashes(name for name, _ in pairs)
    return _Listed({name: entry for name, entry in pairs if name not in clashes}, clashes)


@dataclass(frozen=True, slots=True)
class _Picked:
    """An adapter of a mixed batch."""

    name: str
    strength: float
    version: _Version
    adapter: Adapter


_Placed = tuple[str, tuple[torch.device, ...]]
"""What folded weights hold for: the digest of the base, and the device of each target."""


class _Base(NamedTuple):
    """What was learned of a model, and when it holds. Nothing here refers to the model: that would keep it alive.

    Attributes:
        mark: the facts hold while it does.
        identity: of the model.
        forgotten: how often that had been made to forget.
        digest: of the state dict.
        placed: what folded weights hold for.
        targets: what `TargetModule` says of each but its module.
    """

    mark: WeakModelMark
    identity: BaseIdentity
    forgotten: int
    digest: str
    placed: _Placed
    targets: Mapping[str, Mapping[str, Any]]


class _Live:
    """What a bank knows of one model."""

    def __init__(self) -> None:
        self.checked: dict[str, tuple[_Version, str]] = {}
        self.routes: dict[tuple[Any, ...], Route | None] = {}
        self._base: _Base | None = None

    def known(self, modules: Mapping[str, nn.Module]) -> _Base | None:
        """What was learned of the base; None where that may have changed."""
        base = self._base
        if base is None or base.identity.forgotten != base.forgotten or not base.mark.unchanged(modules):
            return None
        return base

    def learn(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> _Base:
        """Look at the base as it is now."""
        identity, state = identity_of(model), base_state_dict(model)
        forgotten, mark = identity.forgotten, WeakModelMark(modules, state)  # before its numbers are read
        found = target_modules(model)
        targets = {
            name: {"name": name, "path": at.path, "parameter": at.parameter, "layer": at.layer}
            for name, at in found.items()
        }
        digest = identity.state_sha256(state, identity.digests(state))
        placed = digest, tuple(at.weight.device for at in found.values())
        self._base = _Base(mark, identity, forgotten, digest, placed, targets)
        return self._base

    def check(self, model: nn.Module, pick: _Picked, digest: str) -> None:
        """Refuse an adapter that does not belong to the model; once for each version of the two."""
        if self.checked.get(pick.name) != (pick.version, digest):
            attach(model, pick.adapter).detach()
            self.checked[pick.name] = (pick.version, digest)


class _Resident:
    """Values within a bound on their sizes; the least recently used goes first. For several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value, which is now the most recently used; None where there is none."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep the value in the place of an older one, unless it is larger than the bound by itself."""
        with self._lock:
            self._remove(key)
            if size > self.limit:
                return
            while self.total + size > self.limit:
                self._remove(next(iter(self._kept)))
            self._kept[key] = (value, size)
            self.total += size

    def drop(self, live: _Live) -> None:
        """Forget what was folded for a model that is no more."""
        with self._lock:
            for key in [key for key in self._kept if key[0] is live]:
                self._remove(key)

    def _remove(self, key: Any) -> None:
        if key in self._kept:
            self.total -= self._kept.pop(key)[1]


def _choices(
    x: Tensor, names: Sequence[str | None], strength: float | Sequence[float]
) -> list[tuple[str | None, float]]:
    """Name and strength for each sample; the base has no strength."""
    if x.ndim == 0 or isinstance(names, str) or len(names) != len(x):
        count = "one name" if isinstance(names, str) else f"{len(names)} names"
        raise ShapeError(f"{count} for samples of shape {tuple(x.shape)}; it takes a name, or None, for each row")
    if isinstance(strength, int | float):
        power = check_strength(strength)
        own = {name: (_normal(name), 0.0 if name is None else power) for name in dict.fromkeys(names)}
        return [own[name] for name in names]
    strengths = list(strength)
    if len(strengths) != len(x):
        raise ShapeError(f"{len(strengths)} strengths for {len(x)} samples")
    checked = [check_strength(value) for value in strengths]
    return [(_normal(name), 0.0 if name is None else power) for name, power in zip(names, checked, strict=True)]


def _normal(name: Any) -> Any:
    """The name as it is listed; what is no name stays, and is not found."""
    return normal_form(name) if isinstance(name, str) else name
