"""Published benchmarks: their data sets on the Hub, their columns, and their usual sampling.

Small sets of competition problems get 32 samples a problem, since one problem of 30 is worth 3.3 points. Temperature
0.6, top_p 0.95 and 32768 tokens follow DeepSeek-R1 (arXiv 2501.12948, which draws 64); 32 samples follow DAPO (arXiv
2503.14476). Larger sets get one greedy answer of at most 2048 tokens, as in the evaluation script of Qwen2.5-Math
(arXiv 2409.12122). Papers differ in all four values, so report yours with a score.
"""

from typing import NamedTuple

from egspo_lightning.data.answer_formats import AnswerExtractor
from egspo_lightning.evaluation.answer_sampling import AnswerSampling

COMPETITION = AnswerSampling(num_samples=32, temperature=0.6, top_p=0.95, max_completion_length=32768)
"""For sets of fewer than a hundred problems."""
ONCE = AnswerSampling(max_completion_length=2048)
"""For larger sets."""


class Recipe(NamedTuple):
    """A published benchmark: its data set on the Hugging Face Hub, its columns there, and its sampling."""

    dataset: str
    sampling: AnswerSampling
    config: str | None = None
    split: str = "test"
    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_extractor: AnswerExtractor = "none"
    local_extractor: AnswerExtractor = "none"
    """For the "answer" of local files: a bare answer; OlympiadBench's has dollars."""


KNOWN: dict[str, Recipe] = {
    "math500": Recipe("HuggingFaceH4/MATH-500", ONCE),
    "gsm8k": Recipe("openai/gsm8k", ONCE, config="main", problem_column="question", answer_extractor="gsm8k"),
    "minerva": Recipe("math-ai/minervamath", ONCE, problem_column="question"),
    "olympiadbench": Recipe(
        "math-ai/olympiadbench",
        ONCE,
        problem_column="question",
        answer_column="final_answer",
        answer_extractor="olympiadbench",
        local_extractor="olympiadbench",
    ),
    "aime24": Recipe("HuggingFaceH4/aime_2024", COMPETITION, split="train"),
    "aime25": Recipe("math-ai/aime25", COMPETITION),
    "amc23": Recipe("math-ai/amc23", COMPETITION, problem_column="question"),
}
"""The benchmarks that ``KnownBenchmark`` knows by name."""
