"""The network before any adapter: checkpoints, networks by name, identity and receipts."""
