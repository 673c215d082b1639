"""LoRA adapters for PyTorch CNNs: train, check, swap and merge them, and prove every step.

    base = loraio.load_base("base.safetensors")            # read a network and its weights
    adapter = loraio.train(base, config, dataset)          # train an adapter for it
    loraio.save(adapter, "three.safetensors")              # write it; `load` and `check` read it
    live = loraio.attach(base, adapter)                    # put it on; `live.swap(other)`, `live.detach()`
    state = loraio.merge(base.state_dict(), adapter)       # fold it into the weights for good
    report = loraio.verify(base.state_dict(), adapter, state, inputs=images)  # prove that it went in right

Names are loaded on first use: ``import loraio`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loraio.version import __version__

if TYPE_CHECKING:
    from loraio.adapter import Adapter, BaseReference, Target, WholeTensor
    from loraio.bases.checkpoints import BaseCheckpoint, read_base
    from loraio.bases.models import load_base, save_base
    from loraio.bases.networks import build_network
    from loraio.bases.receipts import Receipt, receipt
    from loraio.errors import LoraioError
    from loraio.exporting.export import Exported, export
    from loraio.exporting.outputs import ExportedOutput
    from loraio.formats.checking import Checked, check
    from loraio.formats.conversion import Conversion, convert
    from loraio.formats.loading import load, save
    from loraio.formats.pack import pack, unpack
    from loraio.live.attachment import Attachment, adapter_from, attach, attachment_of
    from loraio.live.base_state import base_state_dict
    from loraio.merging.effect import MergeEffect, merge_effect
    from loraio.merging.in_memory import merge
    from loraio.merging.on_files import MergedFile, merge_file
    from loraio.merging.unmerging import UnmergedFile, unmerge_file
    from loraio.merging.verification import OutputReport, Report, verify
    from loraio.merging.weight_check import WeightReport, verify_weights
    from loraio.serving.bank import Bank
    from loraio.training.config import PretrainConfig, TrainConfig
    from loraio.training.datasets import Dataset, load_dataset
    from loraio.training.evaluation import Evaluation, evaluate, evaluate_each, predict
    from loraio.training.image_folders import ImageForm, image_form
    from loraio.training.images import read_image
    from loraio.training.loop import pretrain, train, train_each
    from loraio.training.optimizing import Progress
    from loraio.training.planning import new_adapter, parameter_report, plan_targets, plan_whole
    from loraio.training.run_files import RunFiles

_PLACES = {
    "adapter": ("Adapter", "BaseReference", "Target", "WholeTensor"),
    "live.attachment": ("Attachment", "adapter_from", "attach", "attachment_of"),
    "serving.bank": ("Bank",),
    "bases.checkpoints": ("BaseCheckpoint", "read_base"),
    "bases.models": ("load_base", "save_base"),
    "live.base_state": ("base_state_dict",),
    "formats.checking": ("Checked", "check"),
    "formats.conversion": ("Conversion", "convert"),
    "errors": ("LoraioError",),
    "exporting.export": ("Exported", "export"),
    "exporting.outputs": ("ExportedOutput",),
    "merging.on_files": ("MergedFile", "merge_file"),
    "formats.loading": ("load", "save"),
    "formats.pack": ("pack", "unpack"),
    "merging.effect": ("MergeEffect", "merge_effect"),
    "merging.in_memory": ("merge",),
    "bases.networks": ("build_network",),
    "bases.receipts": ("Receipt", "receipt"),
    "training.config": ("PretrainConfig", "TrainConfig"),
    "training.datasets": ("Dataset", "load_dataset"),
    "training.evaluation": ("Evaluation", "evaluate", "evaluate_each", "predict"),
    "training.image_folders": ("ImageForm", "image_form"),
    "training.images": ("read_image",),
    "training.loop": ("pretrain", "train", "train_each"),
    "training.optimizing": ("Progress",),
    "training.run_files": ("RunFiles",),
    "training.planning": ("new_adapter", "parameter_report", "plan_targets", "plan_whole"),
    "merging.unmerging": ("UnmergedFile", "unmerge_file"),
    "merging.verification": ("OutputReport", "Report", "verify"),
    "merging.weight_check": ("WeightReport", "verify_weights"),
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
    "LoraioError",
    "MergeEffect",
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
    "load",
    "load_base",
    "load_dataset",
    "merge",
    "merge_effect",
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
