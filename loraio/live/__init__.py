"""One adapter on a running model: attach, swap, detach."""
