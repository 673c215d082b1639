"""Train base models and adapters: data sets, settings, loops and evaluation."""
