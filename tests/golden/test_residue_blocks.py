"""Blocks of residues that were written once give the same weights on every machine."""

from __future__ import annotations

import pytest
import torch

from loraio.adapter import Adapter, BaseReference, Target
from loraio.merging.residues import restored

BLOCKS = {
    "lora": "52000000425a68393141592653591141cbbb0000095fc7c0100040000400041008000800040000800400881010020020002227"
    "a8d069b4d414c001342394b6edda84ec4dc8417a3e2ee48a70a12022839776",
    "dora": "5d0000005d2431e9530de13f000000000000f07f425a6839314159265359e5f0784900000874aaf00208100008000100080064"
    "4000000a0050a00022b41a313d21ea14d3231313115d9fabb96803850930427c5dc914e1424397c1e124",
}
BASE = torch.tensor([[0.1, -0.2, 1e-9], [float("inf"), 0.3, 0.4]])
FOLDED = torch.tensor([[0.3625, -0.1, -0.2], [float("inf"), 0.6, -0.0625]])  # nobody's sums: all is in the residue


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_of_old_gives_the_weight_of_old(kind: str) -> None:
    target = Target(rank=2, alpha=3, kind=kind, shape=(2, 3), dtype="F32", layer="Linear", base_sha256="0" * 64)
    factors = {
        "w.lora_A": torch.tensor([[0.5, -0.25, 0.125], [1.0, 0.3, -0.7]]),
        "w.lora_B": torch.tensor([[0.1, 0.2], [-0.3, 0.4]]),
    }
    if kind == "dora":
        factors["w.magnitude"] = torch.tensor([1.5, 0.75], dtype=torch.float64)
    adapter = Adapter(targets={"w": target}, factors=factors, base=BaseReference(sha256="0" * 64))
    found = restored(adapter, FOLDED, 0.75, bytes.fromhex(BLOCKS[kind]), where="golden")
    assert found.view(torch.int32).equal(BASE.view(torch.int32))
