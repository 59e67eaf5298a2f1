"""Every grading rule of rewards.grading, tested through MathGrader."""

import pytest

from egspo_lightning.rewards.grading import MathGrader

Pairs = list[tuple[str, str]]

EQUAL: dict[str, Pairs] = {
    "units": [
        ("12 cm", "12"),
        ("12", r"12\text{ cm}"),
        (r"12\ \mathrm{cm}", "12 centimeters"),
        (r"\frac{270}{7}\text{ degrees}", r"\frac{270}7"),
        (r"864 \mbox{ inches}^2", "864"),
        (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}"),
        (r"\$18.90", "18.90"),
        ("5 m", r"5\text{ m}"),
        (r"12^{\mathrm{th}} \text{ grade}", "12"),
        ("10 miles per hour", "10 mph"),
        (r"2\pi\text{ radians}", r"2\pi"),
    ],
    "percentages": [
        (r"10\%", "10"),
        ("10", r"10\%"),
        ("0.1", r"10\%"),
        (r"\frac18", "12.5%"),
        (r"33.333333\%", r"\frac{100}{3}"),
        (r"10\sqrt{2}\%", r"\sqrt{200}"),
        (r"10\%, 20\%", "10, 20"),
        ("0.1", r"(C) 10\%"),
        ("10 percent", r"10\%"),
    ],
    "bases": [("2516_8", "2516_{8}"), ("2516", "2516_8"), ("5_{10}", "101_2")],
    "sets and tuples": [
        (r"\{2, 1\}", r"\{1, 2\}"),
        ("2, 1", r"\{1, 2\}"),
        ("2,1", "1,2"),
        (r"\{\sqrt{4}, 1\}", r"\{1, 2\}"),
        ("1, 2", "(1, 2)"),
        ("(1, 2)", "1, 2"),
        (r"(1, \sqrt{8})", r"1, 2\sqrt{2}"),
        ("(0.5, 3)", r"(\frac12, 3)"),
        (r"x=1 \text{ or } x=2", "1, 2"),
    ],
    "assignments": [
        ("(4,3)", "x=4,y=3"),
        ("4, 3", "x=4, y=3"),
        ("(4,3)", r"$x=4$ and $y=3$"),
        ("x=4, y=3", "(4,3)"),
        ("y=3, x=4", "(4,3)"),
        ("y=3, x=4", "x=4, y=3"),
        (r"(\sqrt{16}, 3)", "x=4, y=3"),
        ("4, 3", "x_1=3, x_2=4"),
        ("x=3, x=4", "4, 3"),
    ],
    "intervals": [
        (r"[-4/2, 0.5)", r"[-2, \frac{1}{2})"),
        (r"3 < x \le 4", "(3, 4]"),
        (r"x \in [1, 2]", "[1, 2]"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(3, \infty) \cup (-\infty, 2)"),
    ],
    "mixed numbers": [(r"3\frac{1}{2}", "3.5"), ("3 1/2", r"\frac{7}{2}"), (r"-3\frac12", "-7/2")],
    "decimals and fractions": [
        ("0.5", r"\frac12"),
        ("0.333333", r"\frac13"),
        ("0.3333333333", r"\frac13"),
        ("3.141593", r"\pi"),
        ("1.414214", r"\sqrt{2}"),
        ("2.50", "5/2"),
        ("0.1+0.2-0.3", "0"),
        ("0", "0.3-0.1-0.2"),
        ("0.1+0.2-0.3+x", "x"),
        ("(0.1+0.2-0.3, 1)", "(0, 1)"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", r"\frac13"),
        (r"0.1\overline{6}", r"\frac16"),
        (r"0.\bar{3}", "1/3"),
        ("0.(3)", "1/3"),
    ],
    "several boxes": [
        (r"\boxed{3} and \boxed{4}", "3, 4"),
        (r"\boxed{12}, \boxed{150}", "12, 150"),
        (r"\boxed{4} so \boxed{5}", "5"),
        (r"\boxed{5}. \boxed{5}", "5"),
    ],
    "text": [
        (r"\text{Yes}", "yes"),
        ("Monday", r"\text{Monday}"),
        (r"\textbf{even}", "even"),
        (r"\text{No solution.}", "no solution"),
        ('"5"', "5"),
    ],
    "choices": [
        ("(A)", "A"),
        ("A", r"\text{(A)}"),
        ("a", "A"),
        ("A.", "A"),
        (r"\textbf{(C)}\ 12", "12"),
        ("(C) 12", "C"),
    ],
    "thousands": [
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("1 234", "1234"),
        (r"\$32,\!348", "32348"),
        ("１，２３４", "1234"),
        (r"11,\! 111,\! 100", "11111100"),
    ],
    "degrees": [("90°", "90"), (r"90^\circ", "90"), (r"90^{\circ}", "90 degrees"), (r"\cos 60^\circ", r"\frac12")],
    "presentation": [
        ("5.", "5"),
        ("$x+1$.", "1+x"),
        ("x=5", "5"),
        ("y = 2x+1", "1+2x"),
        (r"\displaystyle\frac{1}{2}", "1/2"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\(\frac{1}{2}\)", "0.5"),
        ("√12", r"2\sqrt{3}"),
        ("π/2", r"\frac{\pi}{2}"),
        ("x²", "x^2"),
        (r"k_{\mathrm{B}} T", "k_B T"),
    ],
    "plus or minus": [
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
        (r"\pm 3", "3, -3"),
        (r"\frac{-1\pm\sqrt{5}}{2}", r"\frac{-1-\sqrt{5}}{2}, \frac{-1+\sqrt{5}}{2}"),
    ],
    "matrices": [
        (r"\begin{pmatrix}0.2\\-3.6\end{pmatrix}", r"\begin{pmatrix}1/5\\-18/5\end{pmatrix}"),
        (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & \sqrt{16} \end{pmatrix}"),
    ],
    "algebra": [
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\tan^2(y)+1", r"\sec^2(y)"),
        ("2x+2y=2", "x+y=1"),
        (r"\log_2 8", "3"),
    ],
}

DIFFERENT: dict[str, Pairs] = {
    "units": [
        ("12 cm", "12 m"),
        (r"12\text{ cm}", r"12\text{ mm}"),
        ("120 mm", "12 cm"),
        (r"5\text{ m}^2", r"5\text{ m}"),
        ("3", "3t"),
        ("5", "5s"),
        (r"5\text{ cents}", r"\$5"),
        ("12 cm", "13"),
    ],
    "percentages": [
        (r"10\%", "1"),
        (r"10\%", r"0.1\%"),
        (r"0.1\%", r"10\%"),
        (r"10\%", r"11\%"),
        ("0.01", r"10\%"),
        (r"10\%", "0.1"),
        ("12.5%", r"\frac18"),
        (r"33.333333\%", r"\frac13"),
        (r"10\sqrt{2}\%", r"\frac{\sqrt{2}}{10}"),
        (r"10\%, 20\%", "0.1, 0.2"),
        (r"10\%", "(C) 0.1"),
    ],
    "bases": [("2516_9", "2516_8"), ("5", "101_2"), ("101_2", "101_3"), ("7", "101_2")],
    "sets and tuples": [
        (r"\{1,2\}", "(1,2)"),
        ("(1,2)", r"\{1,2\}"),
        ("(2,1)", "(1,2)"),
        ("(2, 1)", "1, 2"),
        ("(1, 2)", "2, 1"),
        ("2, 1", "(1, 2)"),
        (r"(\sqrt{4}, \sqrt{1})", r"\sqrt{1}, \sqrt{4}"),
        ("1,2", "1,2,3"),
        (r"\{1,2\}", r"\{1,3\}"),
        ("1", "1, 2"),
        ("(1,2,3)", "(1,2)"),
    ],
    "assignments": [
        ("(3,4)", "x=4,y=3"),
        ("3, 4", "x=4, y=3"),
        ("(3,4)", r"x=4 \text{ and } y=3"),
        ("x=4, y=3", "(3,4)"),
        ("(3, 4)", "y=3, x=4"),
        ("x=3, y=4", "x=4, y=3"),
        ("(4, 3, 1)", "x=4, y=3"),
        (r"\{3, 4\}", "x=4, y=3"),
    ],
    "intervals": [
        ("1, 2", "[2,1]"),
        ("1,2", "[1,2]"),
        ("2,1", "[1,2]"),
        (r"1,\sqrt4", "[2,1]"),
        ("[1,2]", "(1,2)"),
        ("[1,2)", "(1,2]"),
        (r"(-\infty, 5]", r"(-\infty, 5)"),
        (r"x<4", r"(-\infty,4]"),
    ],
    "mixed numbers": [("31/2", r"3\frac12"), (r"3\frac{1}{2}", r"\frac32"), (r"3\frac12", r"3\frac13")],
    "decimals and fractions": [
        ("0.33", r"\frac13"),
        ("0.333", r"\frac13"),
        ("3.14", r"\pi"),
        ("0.0000003", r"\frac{1}{3000000}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("17", "17.001"),
        ("4.9999999", "5"),
        ("0.1+0.2-0.30001", "0"),
        ("0.1+0.2-0.3000000001", "0"),
        ("0.0000000001", "0"),
        ("0.1+0.2-0.3+x", "y"),
    ],
    "repeating decimals": [("0.3", r"0.\overline{3}"), (r"0.\overline{3}", r"0.\overline{4}"), ("0.(3)", "0.3")],
    "several boxes": [
        (r"\boxed{3}, \boxed{4}", "4"),
        (r"\boxed{12}, \boxed{150}", "12150"),
        (r"\boxed{4}\n\boxed{5}".replace(r"\n", "\n"), "5"),
        (r"\boxed{5} so \boxed{4}", "5"),
        (r"$\boxed{4}$ or $\boxed{5}$", "5"),
    ],
    "text": [(r"\text{Yes}", "No"), ("neve", r"\text{even}"), (r"\text{Tuesday}", "Monday"), ("5", r"\text{five}")],
    "choices": [("A", "B"), ("(A)", r"\text{B}"), ("(C) 12", "D"), ("(C) 12", "13"), ("A, B", "A")],
    "thousands": [("1.234", "1234"), ("1 2", "12"), ("1 2345", "12345"), ("(1,234)", "1234"), ("1,23", "123")],
    "degrees": [(r"90^\circ", "91"), (r"\frac{\pi}{2}", r"90^\circ")],
    "presentation": [("x=5", "6"), ("x=5", "y=5"), ("5=6", "6"), ("x+1.", "x"), (r"k_B T", r"k_C T")],
    "plus or minus": [(r"1+\sqrt{19}", r"1 \pm \sqrt{19}"), (r"\pm 3", "3"), ("3", r"\pm 3")],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "algebra": [("x+1", "x+2"), ("x", "y"), (r"\sqrt{3}", r"\sqrt{2}"), (r"2^{10}", "210"), ("(a+5)(b+2)", "(5)(b+2)")],
}


@pytest.mark.parametrize("rule", EQUAL)
def test_equal_answers_are_accepted(patient_grader: MathGrader, rule: str) -> None:
    assert _accepted(patient_grader, EQUAL[rule]) == EQUAL[rule]


@pytest.mark.parametrize("rule", DIFFERENT)
def test_different_answers_are_rejected(patient_grader: MathGrader, rule: str) -> None:
    assert _accepted(patient_grader, DIFFERENT[rule]) == []


def test_every_rule_has_equal_and_different_pairs() -> None:
    assert EQUAL.keys() == DIFFERENT.keys()


def _accepted(grader: MathGrader, pairs: Pairs) -> Pairs:
    grades = grader.grade_answers([answer for answer, _ in pairs], [gold for _, gold in pairs])
    assert {grade.status for grade in grades} == {"graded"}
    return [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct]
