"""Many runs of many methods from the same SFT checkpoints, and the statistics of what came out."""
