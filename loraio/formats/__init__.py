"""Read, write, check and convert the adapter files of every tool, ours included."""
