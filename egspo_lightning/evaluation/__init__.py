"""Benchmarks and the metrics that the field reports for them."""
