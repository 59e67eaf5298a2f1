"""Training on Lightning: rollout phase, advantages and gate, minibatches, base module, strategies, fit loop."""
