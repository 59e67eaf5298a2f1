"""Held-out accuracy of a model, measured in one way for both sides."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling


def held_out_accuracy(lm: Any, folder: Path, num_problems: int, max_completion_length: int) -> float:
    """Share of held-out sums that greedy answers get right; the model is left in the mode that it was in."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = GeneratedBenchmark(num_problems=num_problems).load()
    requests = [Request(tokenizer.encode(problem.problem), "") for problem in problems]
    was_training = lm.training
    lm.eval()
    samples = TransformersEngine().generate(
        lm,
        requests,
        Sampling(max_completion_length, temperature=0.0),
        eos_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
    )
    lm.train(was_training)
    texts = tokenizer.batch_decode([sample.token_ids for sample in samples], skip_special_tokens=True)
    with MathGrader() as grader:
        grades = grader.grade(texts, [problem.answer for problem in problems])
    return sum(grade.correct for grade in grades) / len(problems)
