"""State dicts from ``torch.save``, read with ``weights_only=True`` and in no other way: a file never runs code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraio.errors import FormatError, MissingFileError
from loraio.registry import known

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPED_IN = ("state_dict", "model_state_dict", "model")  # keys under which training scripts save the state dict


def is_saved_by_torch(path: Path) -> bool:
    """Whether the file starts as one of ``torch.save`` does, new or old."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # reading it says what is wrong
        return False
    safetensors = start[8:] == b"{"  # after its length, which may start as a pickle does
    return not safetensors and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in the file, contiguous and on the CPU.

    Raises:
        MissingFileError: no such file.
        FormatError: it is not a dict of tensors, or needs more than ``weights_only=True`` allows.
    """
    import torch
    from torch import Tensor

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MissingFileError(f"{str(path)!r} does not exist") from None
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors here
        raise FormatError(
            f"not a state dict that can be read with weights_only=True: {str(error).splitlines()[0]}",
            where=f"{str(path)!r}",
            hint="torch.save(model.state_dict(), path) makes one",
        ) from error
    for key in _WRAPPED_IN:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"holds {type(loaded).__name__}, not a state dict", where=f"{str(path)!r}")
    wrong = [str(name) for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise FormatError(f"not a state dict: what is not a tensor is {known(wrong, limit=5)}", where=f"{str(path)!r}")
    return {name: tensor.detach().contiguous() for name, tensor in loaded.items()}
