"""Held-out accuracy of a language model, the same for our trainer and TRL's."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling


def held_out_accuracy(lm: Any, folder: Path, num_problems: int, max_completion_length: int) -> float:
    """Greedy accuracy on generated held-out sums; keeps the model in train or eval mode."""
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
