"""Rewards, without torch: answer extraction, grading in worker processes that can be killed, reward functions."""
