"""Training on Lightning: rollout phase, advantages and gate, micro-batches, base modules, strategies, fit loop."""
