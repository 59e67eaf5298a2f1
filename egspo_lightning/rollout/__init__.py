"""Rollouts: engines, sampling, grading and scoring. Independent of losses and gates."""
