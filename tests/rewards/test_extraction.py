import time

import pytest

from egspo_lightning.rewards.extraction import MAX_ANSWER_LENGTH, extract_boxed, extract_final


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{3} ... wait \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed  {5}", "5"),
        ("\\boxed\n{\n 5 \n}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} } \boxed{5} { {", "5"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{5\}", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{5} put the answer within \boxed{}", None),
        (r"\\boxed{5}", None),  # a line break followed by text
        (r"\fbox{5}", None),
        ("boxed{5}", None),
        (r"\boxed 5", None),
        ("", None),
        (r"<think>\boxed{6}</think>\boxed{5}", "5"),
        (r"a</think>\boxed{6}</think>\boxed{5}", "5"),
        (r"<think>\boxed{5}</think> The answer is 6", None),
        (r"<think>hmm \boxed{5}", None),
        ("\\boxed{5}\ud800", "5"),
        (r"\boxed{12}, \boxed{150}", "12, 150"),
        (r"\boxed{1} and \boxed{2} and \boxed{2}", "1, 2"),
    ],
)
def test_extract_boxed_finds_last_balanced_box_after_reasoning(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\fbox{42}", "42"),
        (r"\framebox[2cm]{42} left", "42"),
        (r"so \boxed 42.", "42."),
        (r"\boxed{42} and \fbox{note}", "42"),
        (r"\boxed and nothing", "and"),
        (r"<think>\fbox{42}</think> so 5", None),
        ("no box", None),
    ],
)
def test_extract_final_takes_other_boxes_where_there_is_no_boxed(text: str, expected: str | None) -> None:
    assert extract_final(text) == expected


def test_answers_above_max_length_are_ignored() -> None:
    assert extract_boxed(r"\boxed{" + "1" * MAX_ANSWER_LENGTH + "}") == "1" * MAX_ANSWER_LENGTH
    assert extract_boxed(r"\boxed{5} \boxed{" + "1" * (MAX_ANSWER_LENGTH + 1) + "}") is None
    joined = r"\boxed{5}, \boxed{" + "1" * (MAX_ANSWER_LENGTH - 3) + "}"
    assert len(extract_boxed(joined)) == MAX_ANSWER_LENGTH
    assert extract_boxed(joined.replace("5", "55")) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        r"\boxed{" * 100_000 + "7" + "}" * 100_000,
        r"\boxed{" + "{" * 300_000,
        r"\boxed" + " " * 500_000,
        r"\boxed " * 100_000,
        "\\" * 500_000,
        "<think>" * 100_000,
        "<" * 500_000,
        "<seed:think>[THINK]" * 100_000,
    ],
    ids=["unclosed", "nested", "braces", "spaces", "no brace", "backslashes", "think", "brackets", "two marks"],
)
def test_extract_boxed_takes_linear_time_on_hostile_text(text: str) -> None:
    started = time.process_time()
    extract_final(text)
    assert time.process_time() - started < 2.0  # quadratic time would be minutes
