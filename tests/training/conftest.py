"""Fixtures of random rollouts."""

from random_rollouts import make_gating, make_rollout, make_scored, on_ranks, sized, split_scored, take

__all__ = ["make_gating", "make_rollout", "make_scored", "on_ranks", "sized", "split_scored", "take"]
