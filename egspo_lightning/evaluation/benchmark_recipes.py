"""Published benchmarks: their data sets on the Hub, their columns, and their usual sampling.

Small sets of competition problems get 32 samples a problem, since one problem of 30 is worth 3.3 points. Temperature
0.6, top_p 0.95 and 32768 tokens follow DeepSeek-R1 (arXiv 2501.12948, which draws 64); 32 samples follow DAPO (arXiv
2503.14476). Larger sets get one greedy answer of at most 2048 tokens, as in the evaluation script of Qwen2.5-Math
(arXiv 2409.12122). Papers differ in all four values, so report yours with a score.
"""

from typing import NamedTuple

from egspo_lightning.data.answer_formats import AnswerExtractor
from egspo_lightning.data.rows import ProblemRows
from egspo_lightning.evaluation.answers import AnswerSampling

COMPETITION = AnswerSampling(num_samples=32, temperature=0.6, top_p=0.95, max_completion_length=32768)
"""For sets of fewer than a hundred problems."""
ONCE = AnswerSampling(max_completion_length=2048)
"""For larger sets."""


class Recipe(NamedTuple):
    """A published benchmark: its rows on the Hugging Face Hub, and its sampling."""

    rows: ProblemRows
    sampling: AnswerSampling
    local_extractor: AnswerExtractor = "none"
    """For the "answer" of local files: a bare answer; OlympiadBench's has dollars."""


KNOWN: dict[str, Recipe] = {
    "math500": Recipe(ProblemRows("HuggingFaceH4/MATH-500", split="test"), ONCE),
    "gsm8k": Recipe(
        ProblemRows("openai/gsm8k", config="main", split="test", problem_field="question", answer_extractor="gsm8k"),
        ONCE,
    ),
    "minerva": Recipe(ProblemRows("math-ai/minervamath", split="test", problem_field="question"), ONCE),
    "olympiadbench": Recipe(
        ProblemRows(
            "math-ai/olympiadbench",
            split="test",
            problem_field="question",
            answer_field="final_answer",
            answer_extractor="olympiadbench",
        ),
        ONCE,
        local_extractor="olympiadbench",
    ),
    "aime24": Recipe(ProblemRows("HuggingFaceH4/aime_2024", split="train"), COMPETITION),
    "aime25": Recipe(ProblemRows("math-ai/aime25", split="test"), COMPETITION),
    "amc23": Recipe(ProblemRows("math-ai/amc23", split="test", problem_field="question"), COMPETITION),
}
"""The benchmarks that ``KnownBenchmark`` knows by name."""
