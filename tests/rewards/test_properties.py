"""Properties of MathGrader: rewritten random answers are accepted, other values are rejected."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_lightning.rewards.fast_path import compare_fast
from egspo_lightning.rewards.grading import MathGrader

REPEATABLE = settings(max_examples=40, derandomize=True, deadline=None, database=None)

nonzero = st.integers(-999, 999).filter(bool)
fractions = st.builds(Fraction, st.integers(-999, 999), st.sampled_from([2, 3, 4, 5, 7, 8, 9, 20, 25, 125]))
spaces = st.sampled_from(["", " ", r"\,", r"\;", "~"])
frac_commands = st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"])
wrappers = st.sampled_from(["{}", "${}$", r"\({}\)", " {} ", "{}.", r"\displaystyle {}", r"\boxed{{{}}}"])


def correct(grader: MathGrader, answer: str, gold: str) -> bool:
    (grade,) = grader.grade_answers([answer], [gold])
    assert grade.status == "graded"
    return grade.correct


@st.composite
def spellings_of_a_fraction(draw: st.DrawFn, value: Fraction) -> str:
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    scale = draw(st.integers(1, 9))
    scaled = f"{{{scale * top}}}{{{scale * bottom}}}"
    forms = [f"{sign}{draw(frac_commands)}{scaled}", f"{sign}{scale * top}/{scale * bottom}"]
    whole, rest = divmod(top, bottom)
    if whole and rest:
        forms += [rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}", f"{sign}{whole} {rest}/{bottom}"]
    if bottom in (1, 2, 4, 5, 8, 20, 25, 125):
        forms.append(f"{sign}{float(abs(value)):.6f}".rstrip("0").rstrip("."))
    return draw(st.sampled_from(forms))


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, ...]:
    """An expression in x, the same expression reordered and respelled, and one with another constant."""
    a, b, c = draw(nonzero), draw(nonzero), draw(st.integers(1, 99))
    space, frac = draw(spaces), draw(frac_commands)
    gold, other = (rf"{a}x^2+{b}x+\frac{{{top}}}{{7}}" for top in (c, c + 1))
    shuffled = draw(st.permutations([f"{a}{space}x^{{2}}", f"{b}x", rf"{frac}{{{2 * c}}}{{14}}"]))
    return tuple(text.replace("+-", "-") for text in (gold, f"{space}+".join(shuffled), other))


@REPEATABLE
@given(data=st.data(), value=fractions, wrapper=wrappers)
def test_fraction_is_accepted_in_any_spelling(
    patient_grader: MathGrader, data: st.DataObject, value: Fraction, wrapper: str
) -> None:
    gold = data.draw(spellings_of_a_fraction(value))
    answer = wrapper.format(data.draw(spellings_of_a_fraction(value)))
    other = wrapper.format(data.draw(spellings_of_a_fraction(value + Fraction(1, value.denominator))))
    assert correct(patient_grader, answer, gold)
    assert not correct(patient_grader, other, gold)


@REPEATABLE
@given(
    value=st.integers(1000, 10**9),
    separator=st.sampled_from([",", "{,}", r"\,", " ", r",\!"]),
    wrapper=wrappers,
    by=nonzero,
)
def test_integer_is_accepted_with_any_thousands_separator(
    patient_grader: MathGrader, value: int, separator: str, wrapper: str, by: int
) -> None:
    assert correct(patient_grader, wrapper.format(f"{value:,}".replace(",", separator)), str(value))
    assert not correct(patient_grader, wrapper.format(f"{value + by:,}".replace(",", separator)), str(value))


@REPEATABLE
@given(
    elements=st.lists(fractions, min_size=2, max_size=4, unique=True),
    data=st.data(),
    sizing=st.sampled_from([("", ""), (r"\left", r"\right"), (r"\big", r"\big")]),
)
def test_sets_ignore_order_and_tuples_do_not(
    patient_grader: MathGrader, elements: list[Fraction], data: st.DataObject, sizing: tuple[str, str]
) -> None:
    def written(values: list[Fraction], opening: str, closing: str) -> str:
        parts = [data.draw(spellings_of_a_fraction(value)) for value in values]
        return f"{sizing[0]}{opening}{', '.join(parts)}{sizing[1]}{closing}"

    turned = [*elements[1:], elements[0]]
    assert correct(patient_grader, written(turned, r"\{", r"\}"), written(elements, r"\{", r"\}"))
    assert correct(patient_grader, written(elements, "(", ")"), written(elements, "(", ")"))
    assert not correct(patient_grader, written(turned, "(", ")"), written(elements, "(", ")"))
    changed = [elements[0] + 1000, *elements[1:]]
    assert not correct(patient_grader, written(changed, r"\{", r"\}"), written(elements, r"\{", r"\}"))


@REPEATABLE
@given(case=expressions(), wrapper=wrappers)
def test_expression_is_accepted_when_reordered(patient_grader: MathGrader, case: tuple[str, ...], wrapper: str) -> None:
    gold, rewritten, other = case
    assert correct(patient_grader, wrapper.format(rewritten), gold)
    assert not correct(patient_grader, wrapper.format(other), gold)


@REPEATABLE
@given(
    a=st.integers(2, 30),
    b=st.sampled_from([2, 3, 5, 6, 7, 10]),
    form=st.sampled_from([r"\sqrt{{{}}}", r"\sqrt {{{}}}", "{}^{{1/2}}"]),
)
def test_square_root_is_accepted_in_other_forms(patient_grader: MathGrader, a: int, b: int, form: str) -> None:
    assert correct(patient_grader, form.format(a * a * b), rf"{a}\sqrt{{{b}}}")
    assert correct(patient_grader, rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}", rf"{a}\sqrt{{{b}}}")
    assert not correct(patient_grader, form.format(a * a * b + 1), rf"{a}\sqrt{{{b}}}")


PIECES = (
    r"= \approx \pm , ; : ( ) [ ] \{ \} { } | $ \$ % \% ^ _ ' . ... 1 23 0.5 1,000 x i \pi \frac \sqrt \text{cm} "
    r"\text{or} and or \circ < \le \in \cup \infty / * \\ \ ½ ² √ 元 e5 10^ -"
)
pieces = st.sampled_from(PIECES.split())


@settings(REPEATABLE, max_examples=500)
@given(answer=st.lists(pieces, max_size=8), gold=st.lists(pieces, max_size=5))
def test_any_text_is_compared_without_an_exception(answer: list[str], gold: list[str]) -> None:
    assert compare_fast("".join(answer), "".join(gold)) in (True, False, None)


def test_deeply_nested_sets_are_left_to_the_workers() -> None:
    assert compare_fast("x", r"\{" * 1000 + "5" + r"\}" * 1000) is None
