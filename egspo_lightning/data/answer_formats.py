r"""Answer formats of data sets: ``\boxed{72}``, ``#### 72``, ``**72**`` or the bare answer."""

import re
from collections.abc import Callable
from typing import Literal

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.extraction import extract_boxed, extract_framed

AnswerExtractor = Literal["auto", "none", "boxed", "gsm8k", "framebox", "bold", "olympiadbench"]
r"""Place of the answer in a text.

- ``auto``: the last ``\boxed{}``, else the text after ``####``, else the whole text
- ``none``: the whole text
- ``boxed``: the last ``\boxed{}``
- ``gsm8k``: the text after ``####``
- ``framebox``: the last ``\framebox{}``, ``\fbox{}`` or ``\boxed{}``
- ``bold``: the last ``**72**``, ``\textbf{72}`` or ``\mathbf{72}``
- ``olympiadbench``: the whole text without the ``$`` around formulas
"""

SolutionFormat = Literal["auto", "boxed", "gsm8k", "plain"]
r"""End of a solution: ``\boxed{72}``, ``#### 72`` (with calculator marks before it), or no answer at all."""

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DOLLAR = re.compile(r"(?<!\\)\$")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|\\(?:textbf|mathbf)\s*\{([^{}]+(?:\{[^{}]*\}[^{}]*)*)\}")
_ANSWER_WORDS = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is\b)?\s*[:=]?\s*", re.IGNORECASE)
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def normalize_problem(text: str) -> str:
    """Fold case and turn each run of whitespace into one space; problems with the same result count as the same."""
    return " ".join(text.casefold().split())


def gsm8k_answer(text: str) -> str | None:
    """Return the text after the last ``####``, without thousands commas; None where there is none."""
    _, mark, answer = text.rpartition("####")
    return _THOUSANDS_COMMA.sub("", answer.strip()) or None if mark else None


def bold_answer(text: str) -> str | None:
    r"""Return the last bold text, without "Answer:" before it and the full stop; None where nothing is bold."""
    bold = [first or second for first, second in _BOLD.findall(text)]
    if not bold:
        return None
    answer = _ANSWER_WORDS.sub("", bold[-1].strip(), count=1).strip()
    return answer.removesuffix(".").strip() or None


_EXTRACTORS: dict[AnswerExtractor, Callable[[str], str | None]] = {
    "auto": lambda text: extract_boxed(text) or gsm8k_answer(text) or text.strip(),
    "none": str.strip,
    "boxed": extract_boxed,
    "gsm8k": gsm8k_answer,
    "framebox": extract_framed,
    "bold": bold_answer,
    "olympiadbench": lambda text: _DOLLAR.sub("", text).strip(),
}


def extract_answer(text: str, extractor: AnswerExtractor, where: str) -> str:
    """Return the gold answer in the text of a data set's answer field; ``where`` names the row for the error.

    Raises:
        UserError: the extractor finds nothing.
    """
    answer = _EXTRACTORS[extractor](text)
    if not answer:
        raise UserError(
            f"{where}: answer_extractor={extractor!r} finds no answer in {_tail(text)}. "
            "Correct the row, or choose another extractor or answer field."
        )
    return answer


def ending_of(solution: str) -> Literal["boxed", "gsm8k", "plain"]:
    """Return the format of a solution's end, which ``auto`` takes."""
    return "boxed" if extract_boxed(solution) else "gsm8k" if gsm8k_answer(solution) else "plain"


def boxed_solution(solution: str, answer: str | None, solution_format: SolutionFormat, where: str) -> str:
    r"""Convert a solution into the form of all training data: worked text whose final answer is in ``\boxed{}``.

    ``boxed`` leaves the text as it is. ``gsm8k`` drops the ``<<48/2=24>>`` marks and turns the line ``#### 72`` into
    ``\boxed{72}``. ``plain`` appends ``\boxed{answer}``, without the ``$`` around the answer. ``auto`` takes the first
    of these three that applies. ``where`` names the row for the error.

    Raises:
        UserError: the row has no answer in this format.
    """
    final = gsm8k_answer(solution)
    match ending_of(solution) if solution_format == "auto" else solution_format:
        case "boxed":
            if extract_boxed(solution):
                return solution.strip()
            missing = "the solution has no \\boxed{} with an answer"
        case "gsm8k":
            if final:
                worked = _CALCULATOR_MARK.sub("", solution.rpartition("####")[0])
                return f"{worked.strip()}\n\\boxed{{{final}}}".lstrip()
            missing = "the solution has no line '#### ANSWER'"
        case "plain":
            if answer and answer.strip():
                return f"{solution.strip()}\n\\boxed{{{_without_dollars(answer.strip())}}}"
            missing = "neither the solution nor an answer field gives the answer"
    raise UserError(
        f"{where}: a demonstration must end in its answer, but {missing} (it ends {_tail(solution)}). "
        "Correct the row, or name another solution_format or answer field."
    )


def _without_dollars(answer: str) -> str:
    is_wrapped = len(answer) > 2 and answer[0] == answer[-1] == "$" and answer.count("$") == 2
    return answer[1:-1].strip() if is_wrapped else answer


def _tail(text: str) -> str:
    return repr(text if len(text) <= 60 else "..." + text[-57:])
