"""Read and write state dicts of Microsoft's loralib: ``<module>.lora_A`` and ``.lora_B``, and biases.

Its convolutions have a layout of their own: ``(B @ A).view(weight.shape)`` with A (r * k, in * k) and B
(out / groups * k, r * k). The change of layout is exact both ways: rows of the weight are cut into pieces, which are
placed anew. Only the rank grows on reading, unless the pair was written from one of ours.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from loraio.adapter import Target
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Factors, ForeignLayer, Options, Values
from loraio.formats.reading import Reading
from loraio.formats.statedicts import Export, StateDictDialect, at_other_rank, joined

if TYPE_CHECKING:
    from torch import Tensor

_INNER = re.compile(r"(?P<path>(?:.+\.)?)conv\.(?P<parameter>weight|bias)")
"""Parameters of the convolution inside a ConvLoRA, which some releases also have without the "conv"."""

_LAYERS = ("Conv2d", "Linear", "Embedding")


class Loralib(StateDictDialect):
    """Microsoft's loralib: Linear, MergedLinear, Embedding and Conv2d."""

    name = tool = "loralib"
    own_alpha = "loralib's lora_alpha is 1 unless its layers were made with another"
    keys = telling = re.compile(r"(?:(?P<path>.+)(?<!weight)\.)?(?P<slot>lora_[AB])")
    """A module's name comes first. After a weight's name it is a factor of ours that has lost its metadata."""

    def take_whole(self, key: str, reading: Reading) -> None:
        # tensors of the convolution inside of a ConvLoRA take the name of the ConvLoRA
        inner = _INNER.fullmatch(key)
        path = inner["path"].removesuffix(".") if inner else ""
        name = joined(path, inner["parameter"]) if inner and path in reading.slots else key
        if name != key and name in reading.source.tensors:
            reading.not_used[key] = f"{name!r} is the same parameter"
        else:
            reading.whole[name] = key

    def read_layer(self, name: str, slots: dict[str, str], reading: Reading) -> None:
        shapes = reading.pair(name, slots, "lora_A", "lora_B")
        if shapes is None:
            return
        down, up = shapes
        if not up[1] or not down[0] or down[0] % up[1]:
            reading.refuse_pair(name, down, up)
            return
        # lora_A has a multiple of that rank in MergedLinear and Conv2d
        reading.layers.append(ForeignLayer(name=name, slots=slots, rank=up[1], alpha=None))

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        if layer in ("Conv1d", "Conv3d"):
            return "loralib's Conv1d and Conv3d fail for kernels of more than one point"
        if layer not in _LAYERS:
            return "loralib has no LoRA for this layer type"
        return None if kind == "lora" else f"loralib has no {kind}"

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        A, B = values["lora_A"], values["lora_B"]
        assert layer.alpha is not None
        if place.layer.name == "Conv2d":
            return _from_convolution(A, B, place, layer.alpha)
        if place.layer.name == "Linear" and (len(B) != len(place.weight) or len(A) != B.shape[1]):
            return _from_merged_linear(A, B, place, layer.alpha, options)
        return Factors(values={"lora_A": A, "lora_B": B})

    def write_layer(self, name: str, target: Target, export: Export) -> None:
        path = name.rpartition(".")[0]
        factors = export.adapter.factors_of(name)
        A, B, note = factors["lora_A"], factors["lora_B"], ""
        if target.layer == "Conv2d":
            height, width = target.shape[2:]
            if height != width:
                export.problems.append(f"{name!r}: loralib's kernels are square, this one is {target.shape[2:]}")
                return
            export.spelled[joined(path, "bias")] = (joined(path, "bias"), joined(path, "conv", "bias"))
            if height > 1 or target.groups > 1:
                try:
                    A, B = _to_convolution(A, B, target)
                except AdapterError as error:
                    export.problems.append(f"{name!r}: {error.message}")
                    return
                note = f"laid out as loralib's Conv2d has it, at its rank {len(A) // height}"
        export.add(name, target, {joined(path, "lora_A"): A, joined(path, "lora_B"): B}, note)


def _from_merged_linear(A: Tensor, B: Tensor, place: TargetModule, alpha: int | float, options: Options) -> Factors:
    """Return one pair for a layer with several outputs side by side, of which some have a pair of their own."""
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
    """Return loralib's pair at the same alpha; if its rank must grow, rank and B grow by a power of two."""
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
    """Return how many pieces make a row of the weight as a matrix, and how many a row of loralib's B @ A.

    Rows are in / groups * k * k long here and in * k there, with the same numbers in the same order.
    """
    common = math.gcd(kernel, groups)
    return kernel // common, groups // common


def _cut_anew(A: Tensor, B: Tensor, *, have: int, want: int) -> tuple[Tensor, Tensor]:
    """Return the pair for the same product with other rows: ``want`` pieces to a row, instead of ``have``.

    Each number of the pair is copied or left out; none is computed. Terms of zeros are left out at once, since a pair
    of many groups has mostly those.

    Args:
        A: (r, have * piece).
        B: (rows, r).

    Returns:
        (R, want * piece) and (rows * have / want, R), with R at most want * have * r.
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
    """Return the same product at a smaller rank, without arithmetic; it gives our own pairs back as they were."""
    if not len(A):
        return A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)
    A, B = _together(A, B)
    up, down = _together(B.T, A.T)
    return down.T, up.T


def _together(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Join terms of ``columns @ rows`` that share a column, if their rows have no entry in common."""
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
