"""Fold adapters into weights for good, prove it, and take it back."""
