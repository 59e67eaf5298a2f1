"""Pure tensor functions: no config, no module, no rank, no logger. ``objective`` is the algorithm."""
