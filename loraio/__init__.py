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

from loraio.version import __version__ as __version__

if TYPE_CHECKING:  # `as` exports a name to type checkers, which do not compute `__all__`
    from loraio.adapter import Adapter as Adapter
    from loraio.adapter import BaseReference as BaseReference
    from loraio.adapter import Target as Target
    from loraio.adapter import WholeTensor as WholeTensor
    from loraio.bases.checkpoints import BaseCheckpoint as BaseCheckpoint
    from loraio.bases.checkpoints import read_base as read_base
    from loraio.bases.models import load_base as load_base
    from loraio.bases.models import save_base as save_base
    from loraio.bases.networks import build_network as build_network
    from loraio.bases.receipts import Receipt as Receipt
    from loraio.bases.receipts import receipt as receipt
    from loraio.errors import LoraioError as LoraioError
    from loraio.exporting.export import Exported as Exported
    from loraio.exporting.export import export as export
    from loraio.exporting.outputs import ExportedOutput as ExportedOutput
    from loraio.formats.checking import Checked as Checked
    from loraio.formats.checking import check as check
    from loraio.formats.conversion import Conversion as Conversion
    from loraio.formats.conversion import convert as convert
    from loraio.formats.loading import load as load
    from loraio.formats.loading import save as save
    from loraio.formats.pack import pack as pack
    from loraio.formats.pack import unpack as unpack
    from loraio.live.attachment import Attachment as Attachment
    from loraio.live.attachment import adapter_from as adapter_from
    from loraio.live.attachment import attach as attach
    from loraio.live.attachment import attachment_of as attachment_of
    from loraio.live.base_state import base_state_dict as base_state_dict
    from loraio.merging.effect import MergeEffect as MergeEffect
    from loraio.merging.effect import merge_effect as merge_effect
    from loraio.merging.in_memory import merge as merge
    from loraio.merging.on_files import MergedFile as MergedFile
    from loraio.merging.on_files import merge_file as merge_file
    from loraio.merging.unmerging import UnmergedFile as UnmergedFile
    from loraio.merging.unmerging import unmerge_file as unmerge_file
    from loraio.merging.verification import OutputReport as OutputReport
    from loraio.merging.verification import Report as Report
    from loraio.merging.verification import verify as verify
    from loraio.merging.weight_check import WeightReport as WeightReport
    from loraio.merging.weight_check import verify_weights as verify_weights
    from loraio.serving.bank import Bank as Bank
    from loraio.training.config import PretrainConfig as PretrainConfig
    from loraio.training.config import TrainConfig as TrainConfig
    from loraio.training.datasets import Dataset as Dataset
    from loraio.training.datasets import load_dataset as load_dataset
    from loraio.training.evaluation import Evaluation as Evaluation
    from loraio.training.evaluation import evaluate as evaluate
    from loraio.training.evaluation import evaluate_each as evaluate_each
    from loraio.training.evaluation import predict as predict
    from loraio.training.image_folders import ImageForm as ImageForm
    from loraio.training.image_folders import image_form as image_form
    from loraio.training.images import read_image as read_image
    from loraio.training.loop import pretrain as pretrain
    from loraio.training.loop import train as train
    from loraio.training.loop import train_each as train_each
    from loraio.training.optimizing import Progress as Progress
    from loraio.training.planning import new_adapter as new_adapter
    from loraio.training.planning import parameter_report as parameter_report
    from loraio.training.planning import plan_targets as plan_targets
    from loraio.training.planning import plan_whole as plan_whole
    from loraio.training.run_files import RunFiles as RunFiles

_PLACES = {
    "adapter": ("Adapter", "BaseReference", "Target", "WholeTensor"),
    "bases.checkpoints": ("BaseCheckpoint", "read_base"),
    "bases.models": ("load_base", "save_base"),
    "bases.networks": ("build_network",),
    "bases.receipts": ("Receipt", "receipt"),
    "errors": ("LoraioError",),
    "exporting.export": ("Exported", "export"),
    "exporting.outputs": ("ExportedOutput",),
    "formats.checking": ("Checked", "check"),
    "formats.conversion": ("Conversion", "convert"),
    "formats.loading": ("load", "save"),
    "formats.pack": ("pack", "unpack"),
    "live.attachment": ("Attachment", "adapter_from", "attach", "attachment_of"),
    "live.base_state": ("base_state_dict",),
    "merging.effect": ("MergeEffect", "merge_effect"),
    "merging.in_memory": ("merge",),
    "merging.on_files": ("MergedFile", "merge_file"),
    "merging.unmerging": ("UnmergedFile", "unmerge_file"),
    "merging.verification": ("OutputReport", "Report", "verify"),
    "merging.weight_check": ("WeightReport", "verify_weights"),
    "serving.bank": ("Bank",),
    "training.config": ("PretrainConfig", "TrainConfig"),
    "training.datasets": ("Dataset", "load_dataset"),
    "training.evaluation": ("Evaluation", "evaluate", "evaluate_each", "predict"),
    "training.image_folders": ("ImageForm", "image_form"),
    "training.images": ("read_image",),
    "training.loop": ("pretrain", "train", "train_each"),
    "training.optimizing": ("Progress",),
    "training.planning": ("new_adapter", "parameter_report", "plan_targets", "plan_whole"),
    "training.run_files": ("RunFiles",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(["__version__", *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'loraio' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"loraio.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
