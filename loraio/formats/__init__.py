"""Adapter files of every tool, ours included."""
