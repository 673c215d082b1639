"""Many adapters by name for live models: read when first used, cached up to a bound, one or several to a batch."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.errors import ConfigError, LoraioError, StateError
from loraio.live.attachment import Attachment, attach, attachment_of
from loraio.live.fitting import Reserve
from loraio.registry import lookup
from loraio.serving.mixed_batches import BaseNow, ModelFacts, SortedBatch, choices_of, run_sorted
from loraio.serving.residents import Pick, Residents, Version
from loraio.serving.sources import Source, list_source, normal_name

MAX_BYTES = 2 << 30
"""Bytes that a bank holds in memory unless told otherwise: 2 GiB."""


class Bank:
    """Adapters by name, from a folder, a pack or a mapping.

    Opening a bank lists the names and reads no adapter. An adapter is read and checked when it is first used, and again
    only if its file was changed or it was evicted. It is checked against the model's own digests, which are computed
    once, see `loraio.bases.identity.BaseIdentity`. The work on one adapter does not grow with the number of names.

    The methods are thread-safe. One thread may swap a model's adapter while others run the model; otherwise use each
    model in one thread at a time.

    A folder's adapters are its ``*.safetensors``, named without that ending, in Unicode normal form C; either form is
    found. Links, hidden files and deeper folders are left out. A name is only looked up in the list, never made into a
    path. Names that differ only in case, normal form or invisible characters are refused: the error lists them.

    Each use of a name compares its file's device, inode, size and time of writing. A changed file is read and checked
    again; a file that is gone is an error. `refresh` finds new names, and a pack that was written anew.

    Attributes:
        max_bytes: the bound on factors and folded weights in memory. The least recently used goes first. A larger
            value is used and not cached.
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
        self._source: Source = dict(source) if isinstance(source, Mapping) else Path(source)
        self._residents = Residents(max_bytes)
        self._models: weakref.WeakKeyDictionary[nn.Module, ModelFacts] = weakref.WeakKeyDictionary()
        self._models_lock = threading.Lock()
        self._listing = list_source(self._source)

    def __repr__(self) -> str:
        return f"<Bank of {len(self)} adapters, {self.resident_bytes} of {self.max_bytes} bytes resident>"

    def __len__(self) -> int:
        return len(self._listing.entries)

    def __contains__(self, name: object) -> bool:
        return normal_name(name) in self._listing.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Adapter:
        """Return an adapter; read it if it is not resident or its file was changed.

        Raises:
            UnknownNameError: no such name; the error says the nearest.
            ConfigError: its name differs from another one only in case or normal form.
            MissingFileError: its file is gone.
            FormatError, AdapterError: as `loraio.load`.
        """
        return self._load(normal_name(name))[1]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._listing.entries))

    @property
    def resident_bytes(self) -> int:
        """Bytes of factors and folded weights in memory now; at most ``max_bytes``."""
        return self._residents.cache.total

    def refresh(self) -> None:
        """List the source again: new names appear and removed ones go; a pack's index is read again.

        Raises:
            MissingFileError, FormatError: as when the bank was made; the old list stays.
        """
        self._listing = list_source(self._source)

    def attach(
        self, model: nn.Module, name: str, strength: float = 1.0, *, reserve: Reserve | Literal[True] = None
    ) -> Attachment:
        """Attach an adapter by name, as `loraio.attach`.

        Args:
            model: the base.
            name: of the adapter.
            strength: multiplies its scale.
            reserve: as `loraio.attach`; True reserves every weight that an adapter of the bank changes, which reads
                all adapters.

        Raises:
            UnknownNameError, FormatError and others: as ``bank[name]``; nothing was changed.
            BaseMismatchError, StateError, ConfigError: as `loraio.attach`.
        """
        wanted = (self[each] for each in self) if reserve is True else reserve
        return attach(model, self[name], strength, reserve=wanted)

    def swap(self, model: nn.Module, name: str) -> Attachment:
        """Replace the adapter that the model carries, or attach the first one.

        After an error the model computes the same as before.

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
        """Run a batch in which each sample has its own adapter, without gradients.

        The outputs are those of each adapter attached for its own samples. On the groups route they are so to the bit;
        on the layer route float32 sums come in another order. `loraio.serving.mixed_batches` describes the two.
        Everything is looked up, read and checked before the model runs.

        Args:
            model: the base in eval mode, with no adapter on it.
            x: (n, ...), the samples.
            names: n of them; None is the base.
            strength: one for all samples, or n of them.

        Returns:
            the output of the model: a tensor with n rows, or tuples, lists or dicts of such tensors.

        Raises:
            UnknownNameError, FormatError and others: as ``bank[name]``.
            ShapeError: not as many names or strengths as samples.
            ConfigError: a strength is not a finite number, or an adapter brings whole tensors of its own.
            BaseMismatchError: an adapter does not belong to the model.
            StateError: the model is in training mode or carries an adapter, or gives no rows.
        """
        choices = choices_of(x, names, strength)
        picks = {choice: self._pick(*choice) for choice in dict.fromkeys(choices)}
        facts, base = self._facts_of(model), BaseNow.of(model)
        for pick in filter(None, picks.values()):
            facts.check_fit(model, pick, base.digest)
        with torch.no_grad():
            if not any(picks.values()):
                return model(x)
            batch = SortedBatch.of(x, choices, picks)
            return batch.gathered(run_sorted(model, batch, facts=facts, base=base, residents=self._residents))

    def _pick(self, name: str | None, strength: float) -> Pick | None:
        """Load the adapter of some samples; None for the base."""
        if name is None:
            return None
        version, adapter = self._load(name)
        if adapter.whole:
            raise ConfigError(
                f"adapter {name!r} brings whole tensors of its own, which a mixed batch has no place for",
                hint="bank.swap(model, name), and a batch of its own",
            )
        return Pick(name, strength, version, adapter)

    def _load(self, name: str) -> tuple[Version, Adapter]:
        """Return an adapter, given its name in normal form, and its version."""
        listing = self._listing
        if isinstance(name, str) and name in listing.clashes:
            raise ConfigError(f"adapter {name!r} cannot be used: {listing.clashes[name]}", hint="rename one of them")
        entry = lookup(listing.entries, name, what="adapter")
        try:
            return self._residents.adapter(name, entry)
        except LoraioError as error:
            message = f"adapter {name!r}: {error.message}"
            raise type(error)(message, problems=error.problems, where=error.where, hint=error.hint) from error

    def _facts_of(self, model: nn.Module) -> ModelFacts:
        with self._models_lock:
            facts = self._models.get(model)
            if facts is None:
                facts = self._models[model] = ModelFacts()
                weakref.finalize(model, self._residents.drop, facts).atexit = False
            return facts
