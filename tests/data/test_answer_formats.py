import pytest

from egspo_lightning.data.answer_formats import AnswerExtractor, extract_answer
from egspo_lightning.errors import UserError


@pytest.mark.parametrize(
    ("text", "extractor", "answer"),
    [
        (r"minutes: $\framebox{204}$ minutes", "framebox", "204"),
        (r"so \fbox{ \frac{1}{2} }.", "framebox", r"\frac{1}{2}"),
        (r"\framebox[2cm]{7} and then $\boxed{49}$", "framebox", "49"),
        (r"\boxed{3}, later \framebox{4}", "boxed", "3"),
        ("First **12**, so the answer is **72**.", "bold", "72"),
        ("**Answer: 72.**", "bold", "72"),
        ("**The final answer is 1/2**", "bold", "1/2"),
        (r"so \textbf{(019)} it is", "bold", "(019)"),
        (r"$\mathbf{\frac{1}{2}}$", "bold", r"\frac{1}{2}"),
        ("work #### 1,080", "gsm8k", "1080"),
        (r"\boxed{1} and \boxed{2}", "boxed", "1, 2"),
    ],
)
def test_extract_answer_finds_the_answer_in_each_format(text: str, extractor: AnswerExtractor, answer: str) -> None:
    assert extract_answer(text, extractor, "row 1") == answer


@pytest.mark.parametrize("extractor", ["framebox", "bold"])
def test_missing_answer_error_names_the_row(extractor: AnswerExtractor) -> None:
    with pytest.raises(UserError, match=f"row 7: answer_extractor='{extractor}' finds no answer"):
        extract_answer("nothing of the kind: 72", extractor, "row 7")
