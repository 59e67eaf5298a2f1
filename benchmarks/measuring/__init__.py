"""What the benchmarks of speed and memory share: clocks, workloads, tables."""
