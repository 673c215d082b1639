"""The version of loraio."""

__version__ = "0.1.0"
