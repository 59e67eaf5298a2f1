r"""Final answers in the forms that data sets write them: ``\boxed{72}``, ``#### 72``, ``**72**`` or bare."""

import re
from typing import Literal, get_args

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.extraction import extract_boxed, extract_framed

AnswerExtractor = Literal["none", "boxed", "gsm8k", "framebox", "bold", "olympiadbench"]
r"""Where the answer stands in a text.

``none``: it is the whole text; ``boxed``: in the last ``\boxed{}``; ``gsm8k``: behind ``####``; ``framebox``: in the
last ``\framebox{}``, ``\fbox{}`` or ``\boxed{}``; ``bold``: in the last ``**72**``, ``\textbf{72}`` or
``\mathbf{72}``; ``olympiadbench``: the whole text without the ``$`` around formulas.
"""

SolutionFormat = Literal["auto", "boxed", "gsm8k", "plain"]
r"""How a solution ends: with ``\boxed{}``, with ``#### 72`` after calculator marks, or without its answer."""

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DOLLAR = re.compile(r"(?<!\\)\$")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|\\(?:textbf|mathbf)\s*\{([^{}]+(?:\{[^{}]*\}[^{}]*)*)\}")
_ANSWER_WORDS = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is\b)?\s*[:=]?\s*", re.IGNORECASE)
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def normalize_problem(text: str) -> str:
    """The text by which two problems count as the same: case folded, each run of whitespace one space."""
    return " ".join(text.casefold().split())


def gsm8k_answer(text: str) -> str | None:
    """What follows the last ``####``, without thousands commas; None where nothing does."""
    _, mark, answer = text.rpartition("####")
    return _THOUSANDS_COMMA.sub("", answer.strip()) or None if mark else None


def bold_answer(text: str) -> str | None:
    r"""What the last bold text says, without "Answer:" before it and a full stop; None where nothing is bold."""
    bold = [first or second for first, second in _BOLD.findall(text)]
    if not bold:
        return None
    answer = _ANSWER_WORDS.sub("", bold[-1].strip(), count=1).strip()
    return answer.removesuffix(".").strip() or None


def extract_answer(text: str, extractor: AnswerExtractor, where: str) -> str:
    """The reference answer in a data set's answer field; ``where`` names the row for the error.

    Raises:
        UserError: the extractor does not exist or finds nothing.
    """
    match extractor:
        case "none":
            answer: str | None = text.strip()
        case "boxed":
            answer = extract_boxed(text)
        case "gsm8k":
            answer = gsm8k_answer(text)
        case "olympiadbench":
            answer = _DOLLAR.sub("", text).strip()
        case "framebox":
            answer = extract_framed(text)
        case "bold":
            answer = bold_answer(text)
        case _:
            known = ", ".join(f'"{name}"' for name in get_args(AnswerExtractor))
            raise UserError(f"answer_extractor must be one of {known}, got {extractor!r}.")
    if not answer:
        raise UserError(
            f"{where}: answer_extractor={extractor!r} finds no answer in {_tail(text)}. "
            "Correct the row, or choose another extractor or answer field."
        )
    return answer


def boxed_solution(solution: str, answer: str | None, solution_format: SolutionFormat, where: str) -> str:
    r"""The solution in the one form that is trained on: worked text whose final answer is in ``\boxed{}``.

    ``boxed`` leaves the text as it is; ``gsm8k`` drops the ``<<48/2=24>>`` marks and turns the line
    ``#### 72`` into ``\boxed{72}``; ``plain`` appends ``\boxed{answer}``, without the ``$`` around the
    answer; ``auto`` takes the first of these three that applies. ``where`` names the row for the error.

    Raises:
        UserError: the format does not exist, or the row gives it no answer to box.
    """
    match solution_format:
        case "auto":
            return boxed_solution(solution, answer, _recognize(solution), where)
        case "boxed":
            if extract_boxed(solution):
                return solution.strip()
            missing = "the solution has no \\boxed{} with an answer"
        case "gsm8k":
            if final := gsm8k_answer(solution):
                worked = _CALCULATOR_MARK.sub("", solution.rpartition("####")[0])
                return f"{worked.strip()}\n\\boxed{{{final}}}".lstrip()
            missing = "the solution has no line '#### ANSWER'"
        case "plain":
            if answer and answer.strip():
                return f"{solution.strip()}\n\\boxed{{{_without_dollars(answer.strip())}}}"
            missing = "neither the solution nor an answer field gives the answer"
        case _:
            raise UserError(f'solution_format must be "auto", "boxed", "gsm8k" or "plain", got {solution_format!r}.')
    raise UserError(
        f"{where}: a demonstration must end in its answer, but {missing} (it ends {_tail(solution)}). "
        "Correct the row, or name another solution_format or answer field."
    )


def _recognize(solution: str) -> SolutionFormat:
    if extract_boxed(solution):
        return "boxed"
    return "gsm8k" if gsm8k_answer(solution) else "plain"


def _without_dollars(answer: str) -> str:
    is_wrapped = len(answer) > 2 and answer[0] == answer[-1] == "$" and answer.count("$") == 2
    return answer[1:-1].strip() if is_wrapped else answer


def _tail(text: str) -> str:
    return repr(text if len(text) <= 60 else "..." + text[-57:])
