"""Checkpoints: load, adapt, check compatibility, mid-epoch state, random states."""
