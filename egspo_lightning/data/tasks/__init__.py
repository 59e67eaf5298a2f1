"""Families of generated problems with worked solutions: no file, no network."""
