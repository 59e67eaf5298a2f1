"""Entropy-gated hybrid SFT + RL training of language models for mathematical reasoning.

Importing the package imports nothing heavy: the grader's worker processes import it too.
"""

__version__ = "0.1.0"
