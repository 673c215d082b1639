"""Files as bytes: read strictly, written whole. Nothing here knows about LoRA."""
