"""Comparison of methods: training runs from shared SFT checkpoints, their schedule and their results."""
