"""LoRA adapters for PyTorch CNNs: train, check, swap and merge them, and prove every step.

Names are loaded on first use: ``import loraio`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraio.adapter import Adapter, BaseReference, Target, WholeTensor
    from loraio.attachment import Attachment, adapter_from, attach, attachment_of
    from loraio.bank import Bank
    from loraio.bases import BaseCheckpoint, load_base, read_base, save_base
    from loraio.basestate import base_state_dict
    from loraio.checking import Checked, check
    from loraio.conversion import Conversion, convert
    from loraio.errors import LoraioError
    from loraio.exporting import Exported, ExportedOutput, export
    from loraio.filemerge import MergedFile, merge_file
    from loraio.formats import load, save
    from loraio.formats.pack import pack, unpack
    from loraio.merging import Landing, landing, merge
    from loraio.networks import build_network
    from loraio.receipts import Receipt, receipt
    from loraio.training.config import PretrainConfig, TrainConfig
    from loraio.training.data import Dataset, load_dataset
    from loraio.training.evaluation import Evaluation, evaluate, evaluate_each, predict
    from loraio.training.folders import ImageForm, image_form
    from loraio.training.images import read_image
    from loraio.training.loop import pretrain, train, train_each
    from loraio.training.optimizing import Progress
    from loraio.training.recording import RunFiles
    from loraio.training.starting import new_adapter, parameter_report, plan_targets, plan_whole
    from loraio.unmerging import UnmergedFile, unmerge_file
    from loraio.verification import OutputReport, Report, WeightReport, verify, verify_weights

_PLACES = {
    "adapter": ("Adapter", "BaseReference", "Target", "WholeTensor"),
    "attachment": ("Attachment", "adapter_from", "attach", "attachment_of"),
    "bank": ("Bank",),
    "bases": ("BaseCheckpoint", "load_base", "read_base", "save_base"),
    "basestate": ("base_state_dict",),
    "checking": ("Checked", "check"),
    "conversion": ("Conversion", "convert"),
    "errors": ("LoraioError",),
    "exporting": ("Exported", "ExportedOutput", "export"),
    "filemerge": ("MergedFile", "merge_file"),
    "formats": ("load", "save"),
    "formats.pack": ("pack", "unpack"),
    "merging": ("Landing", "landing", "merge"),
    "networks": ("build_network",),
    "receipts": ("Receipt", "receipt"),
    "training.config": ("PretrainConfig", "TrainConfig"),
    "training.data": ("Dataset", "load_dataset"),
    "training.evaluation": ("Evaluation", "evaluate", "evaluate_each", "predict"),
    "training.folders": ("ImageForm", "image_form"),
    "training.images": ("read_image",),
    "training.loop": ("pretrain", "train", "train_each"),
    "training.optimizing": ("Progress",),
    "training.recording": ("RunFiles",),
    "training.starting": ("new_adapter", "parameter_report", "plan_targets", "plan_whole"),
    "unmerging": ("UnmergedFile", "unmerge_file"),
    "verification": ("OutputReport", "Report", "WeightReport", "verify", "verify_weights"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Adapter",
    "Attachment",
    "Bank",
    "BaseCheckpoint",
    "BaseReference",
    "Checked",
    "Conversion",
    "Dataset",
    "Evaluation",
    "Exported",
    "ExportedOutput",
    "ImageForm",
    "Landing",
    "LoraioError",
    "MergedFile",
    "OutputReport",
    "PretrainConfig",
    "Progress",
    "Receipt",
    "Report",
    "RunFiles",
    "Target",
    "TrainConfig",
    "UnmergedFile",
    "WeightReport",
    "WholeTensor",
    "__version__",
    "adapter_from",
    "attach",
    "attachment_of",
    "base_state_dict",
    "build_network",
    "check",
    "convert",
    "evaluate",
    "evaluate_each",
    "export",
    "image_form",
    "landing",
    "load",
    "load_base",
    "load_dataset",
    "merge",
    "merge_file",
    "new_adapter",
    "pack",
    "parameter_report",
    "plan_targets",
    "plan_whole",
    "predict",
    "pretrain",
    "read_base",
    "read_image",
    "receipt",
    "save",
    "save_base",
    "train",
    "train_each",
    "unmerge_file",
    "unpack",
    "verify",
    "verify_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'loraio' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"loraio.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
