"""Prompts to completions to rewards to minibatches. Knows nothing of losses or gates."""
