"""Adapters, and how they change one weight."""

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import BaseReference, Target, WholeTensor

__all__ = ["Adapter", "BaseReference", "Target", "WholeTensor"]
