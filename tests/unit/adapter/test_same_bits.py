"""Folds give the same bits on every processor and with any number of threads.

Libraries choose their kernels by the processor. Environment variables make them choose as an older one would have
them do, so that one machine stands for several.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from loraio.adapter import Target
from loraio.adapter.kinds import KINDS, dora, lora
from loraio.files.tensors import tensor_sha256

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYERS = {"Linear": (64, 288), "Conv2d": (40, 130, 3, 3), "ConvTranspose2d": (30, 50, 3, 3), "Embedding": (900, 70)}

OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
"""MKL_CBWR changes the order of MKL's sums on processors of every maker."""

SETTINGS = [
    *({"ONEDNN_MAX_CPU_ISA": isa} for isa in ("SSE41", "AVX2", "AVX512_CORE")),
    *({"MKL_ENABLE_INSTRUCTIONS": isa} for isa in ("SSE4_2", "AVX2", "AVX512")),
    *({"MKL_CBWR": branch} for branch in ("COMPATIBLE", "AVX2")),
    *({"ATEN_CPU_CAPABILITY": isa} for isa in ("default", "avx2", "avx512")),
]


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers in +-1 that are the same everywhere: torch's own generators are not."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape) * 2 - 1)


def fold(layer: str, dtype: str, kind: str, rank: int) -> torch.Tensor:
    shape = LAYERS[layer]
    target = Target(rank=rank, alpha=2.5, shape=shape, dtype=dtype, layer=layer, kind=kind, base_sha256="0" * 64)
    shapes = target.factor_shapes.items()
    factors = {name: drawn(shape, seed).float() for seed, (name, shape) in enumerate(shapes)}
    return target.fold(drawn(shape, 9).to(DTYPES[dtype]), factors, strength=0.7)


def digests() -> set[str]:
    """One digest for each number of threads, over all layers, dtypes and kinds; in truth there is one."""
    cases = [(layer, dtype, kind, rank) for layer in LAYERS for dtype in DTYPES for kind in KINDS for rank in (4, 17)]
    found, before = set(), torch.get_num_threads()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.add(" ".join(tensor_sha256(fold(*case)) for case in cases))
    torch.set_num_threads(before)
    return found


def in_another_process(settings: dict[str, str]) -> set[str]:
    code = "import json, test_same_bits; print(json.dumps(list(test_same_bits.digests())))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "PYTHONPATH": path},
        capture_output=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_merged_bits_are_those_of_an_older_processor_and_of_any_number_of_threads() -> None:
    assert len(digests() | in_another_process(OLDER)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "=".join(*settings.items()))
def test_merged_bits_are_the_same_under_every_setting(settings: dict[str, str]) -> None:
    assert len(digests() | in_another_process(settings)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_folds_of_float64_weights_call_no_library_of_sums(
    layer: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fold(layer, "F64", kind, 4)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a library that adds in its own order")

    for name in ("addmm", "addmm_", "mm", "matmul", "__matmul__", "norm"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert fold(layer, "F64", kind, 4).equal(expected)


def test_sums_in_order_are_those_of_plain_python_numbers() -> None:
    A, B = drawn((5, 7), 1), drawn((3, 5), 2)
    product = lora.product_in_order({"lora_A": A, "lora_B": B})
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for rank in range(5):
        for row in range(3):
            for column in range(7):
                expected[row, column] = expected[row, column].item() + B[row, rank].item() * A[rank, column].item()
    assert product.equal(expected)
    squares = [[value * value for value in row] for row in B.tolist()]
    halves = [(a + c) + e + (b + d) for a, b, c, d, e in squares]
    assert dora.squares_in_order(B)[:, 0].tolist() == halves
