"""Speed and memory measurements: clocks, workloads, tables."""
