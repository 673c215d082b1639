"""LoRA adapters for PyTorch CNNs: train, check, swap and merge them, and prove every step.

Names are loaded on first use: ``import loraio`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraio.adapter import Adapter, BaseReference, Target
    from loraio.attachment import Attachment, attach, base_state_dict
    from loraio.bases import BaseCheckpoint, build_network, load_base, read_base, save_base
    from loraio.errors import LoraioError
    from loraio.filemerge import MergedFile, merge_file
    from loraio.formats import load, save
    from loraio.merging import merge
    from loraio.training.config import PretrainConfig, TrainConfig
    from loraio.training.data import Dataset, load_dataset
    from loraio.training.evaluation import Evaluation, evaluate, evaluate_each, predict
    from loraio.training.images import read_image
    from loraio.training.loop import Progress, new_adapter, parameter_report, pretrain, train, train_each
    from loraio.verification import OutputReport, Report, WeightReport, verify, verify_weights

_PLACES = {
    "adapter": ("Adapter", "BaseReference", "Target"),
    "attachment": ("Attachment", "attach", "base_state_dict"),
    "bases": ("BaseCheckpoint", "build_network", "load_base", "read_base", "save_base"),
    "errors": ("LoraioError",),
    "filemerge": ("MergedFile", "merge_file"),
    "formats": ("load", "save"),
    "merging": ("merge",),
    "training.config": ("PretrainConfig", "TrainConfig"),
    "training.data": ("Dataset", "load_dataset"),
    "training.evaluation": ("Evaluation", "evaluate", "evaluate_each", "predict"),
    "training.images": ("read_image",),
    "training.loop": ("Progress", "new_adapter", "parameter_report", "pretrain", "train", "train_each"),
    "verification": ("OutputReport", "Report", "WeightReport", "verify", "verify_weights"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Adapter",
    "Attachment",
    "BaseCheckpoint",
    "BaseReference",
    "Dataset",
    "Evaluation",
    "LoraioError",
    "MergedFile",
    "OutputReport",
    "PretrainConfig",
    "Progress",
    "Report",
    "Target",
    "TrainConfig",
    "WeightReport",
    "__version__",
    "attach",
    "base_state_dict",
    "build_network",
    "evaluate",
    "evaluate_each",
    "load",
    "load_base",
    "load_dataset",
    "merge",
    "merge_file",
    "new_adapter",
    "parameter_report",
    "predict",
    "pretrain",
    "read_base",
    "read_image",
    "save",
    "save_base",
    "train",
    "train_each",
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
