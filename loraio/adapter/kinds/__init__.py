"""Adapter kinds: which factors an adapter has for a weight matrix, and how they change it.

A kind works on matrices (out, fan_in); `loraio.adapter.layers` turns weights into matrices. A new kind is one file
here, with a subclass of `Kind`, and one line in `KINDS`.
"""

from loraio.adapter.kinds.dora import Dora
from loraio.adapter.kinds.kind import Kind
from loraio.adapter.kinds.lora import Lora

__all__ = ["KINDS", "Kind"]

KINDS: dict[str, Kind] = {
    "dora": Dora(),
    "lora": Lora(),
}
