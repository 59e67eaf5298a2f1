"""How training hangs on Lightning: base modules, the rollout phase, the gate, strategies, fit-loop overrides."""
