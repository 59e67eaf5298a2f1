"""Benchmarks, their metrics, and sampling, grading and recording the answers."""
