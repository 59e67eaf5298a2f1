"""Metamorphic test of the grader: rewrites of real gold answers that keep the value, and rewrites that change it."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from egspo_lightning.rewards.grading import MathGrader

Pairs = list[tuple[str, str]]
FILES = ("math500", "math_demos", "olympiadbench", "aime24", "aime25", "amc23", "gsm8k_test")
_SUM = re.compile(r"([^-+=<>,()\\{}\[\]^_|:%$]*\d?[a-z]?(?:\^\{?\d\}?)?)\s*\+\s*(\d+)")
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[a-hj-z](?![A-Za-z_])")
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?")


def spaced(gold: str) -> str:
    return f" {gold} "


def dfrac(gold: str) -> str:
    return gold.replace(r"\frac", r"\dfrac").replace(r"\tfrac", r"\dfrac")


def stopped(gold: str) -> str:
    return f"${gold.strip('$ ')}$."


def thin_spaces(gold: str) -> str:
    return re.sub(r"(?<=[+=])\s*|\s*(?=[+=])", r"\\,", gold) if "text" not in gold else gold


def unit(gold: str) -> str:
    return rf"{gold}\text{{ cm}}" if _PLAIN.fullmatch(gold) else gold


def noun(gold: str) -> str:
    return f"{gold} apples" if _PLAIN.fullmatch(gold) else gold


def reordered(gold: str) -> str:
    match = _SUM.fullmatch(gold)
    return f"{match[2]} + {match[1]}" if match and match[1].strip() else gold


def last_digit(gold: str) -> str:
    return re.sub(r"(\d)(?=\D*$)", lambda match: str((int(match[1]) + 1) % 10), gold)


def sign(gold: str) -> str:
    if gold.startswith("-"):
        return gold[1:] if "," not in gold else gold
    return f"-{gold}" if re.fullmatch(r"[1-9]\d*|\\[dt]?frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}", gold) else gold


def case(gold: str) -> str:
    return re.sub(_VARIABLE, lambda match: match[0].upper(), gold) if is_algebra(gold) else gold


def index(gold: str) -> str:
    return re.sub(_VARIABLE, r"\g<0>_7", gold, count=1) if is_algebra(gold) else gold


def dropped(gold: str) -> str:
    rest, _, last = gold.rpartition(",")
    is_list = re.fullmatch(r"-?\d+(?:,\s*-?\d+)+", gold) and last.strip() not in rest.split(",")
    return rest.strip() if is_list else gold


def is_algebra(gold: str) -> bool:
    """Return whether a gold answer is one expression in single letters, with more than a letter in it."""
    letters = re.sub(r"\\[A-Za-z]+", "", gold)
    return (
        not re.search(r"=|text|mbox|begin|cup|\\in|%", gold)
        and not re.search("[A-Z]|[a-z]{2}", letters)
        and len(gold) > 3
    )


KEEPING: list[Callable[[str], str]] = [spaced, dfrac, stopped, thin_spaces, unit, noun, reordered]
CHANGING: list[Callable[[str], str]] = [last_digit, sign, case, index, dropped]


@pytest.mark.slow
def test_rewrites_that_keep_the_value_are_accepted_and_others_refused(shared_file: Callable[[str], Path]) -> None:
    golds = list(dict.fromkeys(_golds(shared_file)))
    golds = random.Random(0).sample(golds, 2000)
    kept, changed = _pairs(golds, KEEPING), _pairs(golds, CHANGING)
    assert len(kept) == 2000
    assert len(changed) >= 1500
    with MathGrader(num_workers=2, deadline_s=20.0) as grader:
        refused = [pair for pair in kept if not _is_correct(grader, *pair)]
        accepted = [pair for pair in changed if _is_correct(grader, *pair)]
    assert len(refused) <= 0.005 * len(kept), refused
    assert len(accepted) <= 0.001 * len(changed), accepted


def _golds(shared_file: Callable[[str], Path]) -> Iterator[str]:
    for file in FILES:
        for line in shared_file(f"data/{file}.jsonl").read_text(encoding="utf-8").splitlines():
            yield str(json.loads(line)["answer"]).strip()


def _pairs(golds: list[str], rewrites: list[Callable[[str], str]]) -> Pairs:
    """Return one rewrite of each gold answer: the rewrites take turns, and each skips those it cannot rewrite."""
    pairs = []
    for turn, gold in enumerate(golds):
        ordered = rewrites[turn % len(rewrites) :] + rewrites[: turn % len(rewrites)]
        answer = next((new for rewrite in ordered if (new := rewrite(gold)) != gold), None)
        if answer is not None:
            pairs.append((answer, gold))
    return pairs


def _is_correct(grader: MathGrader, answer: str, gold: str) -> bool:
    return grader.grade_answers([answer], [gold])[0].correct
