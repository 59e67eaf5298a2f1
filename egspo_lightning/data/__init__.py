"""Training data: demonstrations and problems, their sources, prompts, tokens and batches."""
