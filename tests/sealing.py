"""Files that somebody changed and gave fitting digests again, as one who means harm can."""

from __future__ import annotations

import hashlib
import re

from loraio.files.integrity import PENDING

_ENTRY = re.compile(rb'(integrity\\?": ?\{\\?"file\\?": ?\\?")[0-9a-f]{64}')


def resealed(text: bytes) -> bytes:
    """A header (with its length) or an index, with the digest that it must have now; others as they are."""
    pending = _ENTRY.sub(rb"\g<1>" + PENDING.encode(), text)
    return _ENTRY.sub(rb"\g<1>" + hashlib.sha256(pending).hexdigest().encode(), pending)


def resealed_file(content: bytes) -> bytes:
    """As `resealed`, of a whole safetensors file; the digests of its tensors stay as they are."""
    end = 8 + int.from_bytes(content[:8], "little")
    return resealed(content[:end]) + content[end:]
