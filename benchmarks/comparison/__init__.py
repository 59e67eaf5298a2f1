"""Comparison of methods: training runs from shared SFT checkpoints, and statistics of their results."""
