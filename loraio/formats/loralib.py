"""State dicts of Microsoft's loralib: ``<module>.lora_A`` and ``.lora_B``, and biases; neither alpha nor kernels.

Its convolutions lay a pair out in a way of their own: ``(B @ A).view(weight.shape)`` with A (r * k, in * k) and B
(out / groups * k, r * k). Both ways that is an exact change of layout, since the rows of the weight are cut into pieces
that are placed anew; only the rank grows on reading, unless the pair was written from one of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraio.adapter import Adapter, Target
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Encoded, Factors, Foreign, ForeignLayer, Options
from loraio.formats.sources import Source
from loraio.formats.statedicts import Export, at_other_rank, joined, lone_biases, module_and_parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

_FACTOR = re.compile(r"(?:(?P<path>.+)(?<!weight)\.)?lora_(?P<slot>[AB])")
"""Named by a module; what is named by its weight is a factor of ours that has lost its metadata."""

_INNER = re.compile(r"(?P<path>(?:.+\.)?)conv\.(?P<parameter>weight|bias)")
"""Parameters of the convolution inside a ConvLoRA, which some releases also have without the "conv"."""

_LAYERS = ("Conv2d", "Linear", "Embedding")


class Loralib:
    """Microsoft's loralib: Linear, MergedLinear, Embedding and Conv2d."""

    name = "loralib"
    container = "pickle"

    def recognise(self, source: Source) -> str | None:
        """By a key that ends in ``lora_A`` or ``lora_B``."""
        return next((f"the key {key!r}" for key in source.tensors if _FACTOR.fullmatch(key)), None)

    def read(self, source: Source) -> Foreign:
        """Layers by their pairs; every other key is a tensor of the base's own, replaced."""
        slots: dict[str, dict[str, str]] = {}
        rest = []
        for key in source.tensors:
            match = _FACTOR.fullmatch(key)
            if match:
                slots.setdefault(match["path"] or "", {})[match["slot"]] = key
            else:
                rest.append(key)
        whole: dict[str, str] = {}
        not_used: dict[str, str] = {}
        for key in rest:
            inner = _INNER.fullmatch(key)
            path = inner["path"].removesuffix(".") if inner else ""
            name = joined(path, inner["parameter"]) if inner and path in slots else key
            if name != key and name in source.tensors:
                not_used[key] = f"{name!r} is the same parameter"
            else:
                whole[name] = key
        layers, refusals = [], []
        for path, found in slots.items():
            problem = _problem(path, found, source)
            if problem:
                refusals.append(problem)
            else:
                rank = source.tensors[found["B"]].shape[1]
                layers.append(ForeignLayer(name=path, slots=found, rank=rank, alpha=None))
        return Foreign(
            layers=tuple(layers),
            whole=whole,
            biases=lone_biases(whole),
            not_used=not_used,
            refusals=tuple(refusals),
            own_alpha="loralib's lora_alpha is 1 unless its layers were made with another",
        )

    def spell(self, place: TargetModule) -> Sequence[str]:
        """Module names as they are."""
        return (place.path,) if place.parameter == "weight" else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """What loralib's layers hold."""
        if layer in ("Conv1d", "Conv3d"):
            return "loralib's Conv1d and Conv3d fail for kernels of more than one point"
        if layer not in _LAYERS:
            return "loralib has no LoRA for this layer type"
        return None if kind == "lora" else f"loralib has no {kind}"

    def factors(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        """As they are; of a convolution or a MergedLinear an equal pair of another rank."""
        A, B = values["A"], values["B"]
        assert layer.alpha is not None
        if place.layer.name == "Conv2d":
            return _from_convolution(A, B, place, layer.alpha)
        if place.layer.name == "Linear" and (len(B) != len(place.weight) or len(A) != B.shape[1]):
            return _from_merged_linear(A, B, place, layer.alpha, options)
        return Factors(values={"lora_A": A, "lora_B": B})

    def encode(
        self,
        adapter: Adapter,
        *,
        network: nn.Module | None,
        state: Mapping[str, Tensor] | None,
        options: Options,
    ) -> Encoded:
        """A state dict for ``load_state_dict(.., strict=False)``."""
        export = Export(tool=self.name, adapter=adapter)
        biases: dict[str, tuple[str, ...]] = {}
        for name, target in adapter.targets.items():
            path, _ = module_and_parameter(name)
            reason = self.refusal(target.layer, target.kind, grouped=target.groups > 1)
            if reason is None and target.layer == "Conv2d" and target.shape[2] != target.shape[3]:
                reason = f"loralib's kernels are square, this one is {target.shape[2:]}"
            if reason is not None:
                export.problems.append(f"{name!r}: {reason}")
                continue
            export.alpha(name, target)
            factors = adapter.factors_of(name)
            A, B, note = factors["lora_A"], factors["lora_B"], ""
            if target.layer == "Conv2d":
                biases[joined(path, "bias")] = (joined(path, "bias"), joined(path, "conv", "bias"))
            if target.layer == "Conv2d" and (target.shape[2] > 1 or target.groups > 1):
                try:
                    A, B = _to_convolution(A, B, target)
                except AdapterError as error:
                    export.problems.append(f"{name!r}: {error.message}")
                    continue
                note = f"laid out as loralib's Conv2d has it, at its rank {len(A) // target.shape[2]}"
            export.add(name, {joined(path, "lora_A"): A, joined(path, "lora_B"): B}, note)
        export.add_whole(biases)
        return export.encoded()


def _problem(path: str, slots: Mapping[str, str], source: Source) -> str | None:
    missing = [f"lora_{slot}" for slot in ("A", "B") if slot not in slots]
    if missing:
        return f"{path!r}: {missing[0]} is missing"
    down, up = (source.tensors[slots[slot]].shape for slot in ("A", "B"))
    if len(down) != 2 or len(up) != 2 or not up[1] or not down[0] or down[0] % up[1]:
        return f"{path!r}: lora_A is {down} and lora_B is {up}, which is no pair"
    return None


def _from_merged_linear(A: Tensor, B: Tensor, place: TargetModule, alpha: int | float, options: Options) -> Factors:
    """One pair of a layer whose output is parts side by side, some of them with a pair of their own."""
    out, fan_in = place.weight.shape
    shapes = f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, the base's weight ({out}, {fan_in})"
    flags, rank = options.enable_lora, B.shape[1]
    if flags is None:
        raise AdapterError(
            f"{shapes}: a MergedLinear, and the file does not say of which parts of the output; "
            "--enable-lora 1,0,1 of `loraio convert` (enable_lora=) does"
        )
    enabled = [part for part, flag in enumerate(flags) if flag]
    size = out // max(len(flags), 1)
    expected = (rank * len(enabled), fan_in), (size * len(enabled), rank)
    if not enabled or out % len(flags) or (tuple(A.shape), tuple(B.shape)) != expected:
        raise AdapterError(f"{shapes}, which is no MergedLinear with {len(enabled)} of {len(flags)} parts enabled")
    up = B.new_zeros(out, rank * len(enabled))
    for at, part in enumerate(enabled):
        up[part * size : (part + 1) * size, at * rank : (at + 1) * rank] = B[at * size : (at + 1) * size]
    note = f"the pairs of {len(enabled)} of {len(flags)} parts side by side as one of rank {len(A)}, which is exact"
    return at_other_rank(A, up, alpha=alpha, rank=rank, note=note)


def _from_convolution(A: Tensor, B: Tensor, place: TargetModule, alpha: int | float) -> Factors:
    out, inputs, kernel, width = place.weight.shape
    groups = place.groups
    rank = len(A) // kernel
    expected = (rank * kernel, inputs * groups * kernel), (out // groups * kernel, rank * kernel)
    if kernel != width or not rank or (tuple(A.shape), tuple(B.shape)) != expected:
        raise AdapterError(
            f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, which is no pair of loralib's for the base's "
            f"weight {tuple(place.weight.shape)} with groups={groups}"
        )
    if kernel == groups == 1:
        return Factors(values={"lora_A": A, "lora_B": B})
    own, theirs = _pieces(kernel, groups)
    down, up = _reduced(*_cut_anew(A, B, have=theirs, want=own))
    note = f"loralib's own layout as a pair of rank {len(down)}, which is exact"
    return at_other_rank(down, up, alpha=alpha, rank=rank, note=note)


def _to_convolution(A: Tensor, B: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """loralib's pair at the same alpha: where its rank must be larger, it is so by a power of two, and so is B."""
    from torch.nn.functional import pad

    kernel = target.shape[2]
    own, theirs = _pieces(kernel, target.groups)
    down, up = _cut_anew(A, B, have=own, want=theirs)
    needed = math.ceil(len(down) / kernel)
    factor = 1
    while target.rank * factor < needed:
        factor *= 2
    larger = up * factor
    if not (larger / factor).equal(up):
        raise AdapterError(f"lora_B has values too large to be multiplied by {factor}")
    more = target.rank * factor * kernel - len(down)
    return pad(down, (0, 0, 0, more)), pad(larger, (0, more))


def _pieces(kernel: int, groups: int) -> tuple[int, int]:
    """Into how many pieces a row of the weight as a matrix is cut, and how many of them make a row of loralib's B @ A.

    The rows are in / groups * k * k long here and in * k there, of the same numbers in the same order.
    """
    common = math.gcd(kernel, groups)
    return kernel // common, groups // common


def _cut_anew(A: Tensor, B: Tensor, *, have: int, want: int) -> tuple[Tensor, Tensor]:
    """The pair whose product is that of this one with its rows cut into pieces, ``want`` instead of ``have`` to a row.

    Each number of the pair is copied or left out, none is computed. Terms that are zero are left out as they come: a
    pair of many groups has mostly those.

    Args:
        A: (r, have * piece).
        B: (rows, r).

    Returns:
        (at most want * have * r, want * piece) and (rows * have / want, as many).
    """
    import torch

    rank, length = A.shape
    pieces = A.reshape(rank, have, length // have)
    number = torch.arange(len(B) * have, device=B.device)
    rows = len(number) // want
    downs, ups = [A.new_zeros(0, length // have * want)], [B.new_zeros(rows, 0)]
    for at in range(want):
        for origin in range(have):
            moved = number[(number % want == at) & (number % have == origin)]
            columns = B[moved // have]
            terms = pieces[:, origin].ne(0).any(1) & columns.ne(0).any(0)
            down = A.new_zeros(int(terms.sum()), want, length // have)
            down[:, at] = pieces[terms, origin]
            up = B.new_zeros(rows, len(down))
            up[moved // want] = columns[:, terms]
            downs.append(down.flatten(1))
            ups.append(up)
    return torch.cat(downs), torch.cat(ups, 1)


def _reduced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product at a smaller rank, where that takes no arithmetic: it gives our own pairs back as they were."""
    if not len(A):
        return A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)
    A, B = _together(A, B)
    up, down = _together(B.T, A.T)
    return down.T, up.T


def _together(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of ``columns @ rows``, with those as one that share a column and whose rows do not meet."""
    import torch

    _, alike = torch.unique(columns.T.double(), dim=0, return_inverse=True)
    found: dict[int, list[int]] = {}
    made: dict[int, Tensor] = {}
    for term, (row, group) in enumerate(zip(rows, alike.tolist(), strict=True)):
        mine = found.setdefault(group, [])
        place = next((one for one in mine if not (made[one].ne(0) & row.ne(0)).any()), None)
        if place is None:
            mine.append(term)
            made[term] = row
        else:
            made[place] = torch.where(row.ne(0), row, made[place])
    return torch.stack(list(made.values())), columns[:, list(made)]
