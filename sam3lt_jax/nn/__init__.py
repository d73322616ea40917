"""Flax modules, one file a box of the architecture figure. They take plain numbers, never a config."""
