import os
import signal
import threading
from importlib.metadata import version

import pytest
from jsonargparse import ArgumentParser

from egspo_lightning.errors import UserError
from egspo_lightning.rewards import workers
from egspo_lightning.rewards.functions import CorrectnessReward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rewards.workers import Grade

HANGING_ANSWER = r"9^{9^{9^{9}}}+x"


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", True),
        (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{3}", False),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("(0.5, 3)", r"\left(\frac{1}{2}, 3\right)", True),
        ("(3, 0.5)", r"\left(\frac{1}{2}, 3\right)", False),
        (r"(-\infty, 5]", r"(-\infty, 5)", False),
        (r"[-4/2, 0.5]", r"[-2, \frac{1}{2}]", True),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        (r"\{1, 3\}", r"\{1, 2\}", False),
        (r"3 < x \le 4", "(3, 4]", True),
        (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}", True),
        ("90°", "90", True),
        ("x=5", "5", True),
        (r"3\frac{1}{2}", r"\frac72", True),
        (r"12\text{ cm}", "12", True),
        (r"$\frac{\pi}{4}$", r"\frac{1}{4}\pi", True),
        (r"\begin{pmatrix}0.2\\-3.6\end{pmatrix}", r"\begin{pmatrix}1/5\\-18/5\end{pmatrix}", True),
    ],
)
def test_grader_verdicts_on_typical_answers(grader: MathGrader, answer: str, gold: str, correct: bool) -> None:
    (grade,) = grader.grade_answers([answer], [gold])
    assert grade[:3] == (correct, "graded", answer)


def test_completions_are_graded_in_their_order(grader: MathGrader) -> None:
    completions = [
        r"\boxed{x+1}",
        "no box",
        r"\boxed{7}",
        r"\boxed{x+2}",
        r"\boxed{" + HANGING_ANSWER + "}",
        r"\boxed{1+x}",
    ]
    grades = grader.grade(completions, ["1+x", "5", "7", "1+x", "5", "x+1"])
    verdicts = [(grade.correct, grade.status) for grade in grades]
    assert verdicts == [
        (True, "graded"),
        (False, "no_answer"),
        (True, "graded"),
        (False, "graded"),
        (False, "timeout"),
        (True, "graded"),
    ]


def test_boxed_answers_and_golds_are_unwrapped(grader: MathGrader) -> None:
    grades = grader.grade_answers([r"2 + 2 = \boxed{4}", "", "5"], ["4", "5", r"\boxed{5}"])
    assert grades == [
        Grade(True, "graded", "4", 0.0),
        Grade(False, "no_answer", None, 0.0),
        Grade(True, "graded", "5", 0.0),
    ]


def test_hanging_answer_times_out_and_the_next_is_graded(grader: MathGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_GRACE_S", 60.0)  # the worker's own alarm ends it long before the client does
    grader.grade_answers(["x+1"], ["1+x"])
    (grade,) = grader.grade_answers([HANGING_ANSWER], ["5"])
    assert grade[:3] == (False, "timeout", HANGING_ANSWER)
    assert 1.0 <= grade.seconds < 30.0
    assert grader.grade_answers(["x+1"], ["1+x"])[0].correct


def test_stopped_worker_is_killed(grader: MathGrader) -> None:
    grader.grade_answers(["x+1"] * 4, ["1+x"] * 4)
    pids = grader.worker_pids()[1:]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # its own alarm is stopped too
    grades = grader.grade_answers(["x+1"] * len(pids), ["1+x"] * len(pids))
    assert {grade.status for grade in grades} == {"timeout"}
    assert max(grade.seconds for grade in grades) < 2.0
    assert grader.grade_answers(["x+1"], ["1+x"])[0].correct


def test_deeply_nested_answer_does_not_crash_the_grader(grader: MathGrader) -> None:
    nested = r"\sqrt{" * 25 + "1" + "}" * 25
    (deep, next_one) = grader.grade_answers([nested, "x+1"], ["2", "1+x"])
    assert not deep.correct
    assert next_one.correct


def test_lenient_extraction_reads_several_plain_values_at_the_end() -> None:
    with MathGrader(num_workers=1, deadline_s=20.0, extraction="lenient") as grader:
        texts = ["x = 1 or x = -1.", "So x=1 and y=2", "x=1, x=2", "If x=1 or x=2 then it is 3"]
        golds = ["1, -1", "(1,2)", "2", "3"]
        assert [it.correct for it in grader.grade(texts, golds)] == [True, True, False, True]


def test_lenient_extraction_reads_free_text() -> None:
    with MathGrader(extraction="lenient") as grader:
        grades = grader.grade(
            [
                r"Therefore $\frac{1}{2}$ is the answer.",
                "the number is 1,000.99",
                "no idea",
                "<think>5</think> so 6",
            ],
            ["0.5", "1000.99", "5", "5"],
        )
    assert [(grade.correct, grade.status) for grade in grades] == [
        (True, "graded"),
        (True, "graded"),
        (False, "no_answer"),
        (False, "graded"),
    ]


def test_grader_can_be_used_from_several_threads(grader: MathGrader) -> None:
    results: dict[int, list[Grade]] = {}

    def grade(thread: int) -> None:
        results[thread] = grader.grade_answers([f"x+{thread}", "x+9"], [f"{thread}+x", "x+8"])

    threads = [threading.Thread(target=grade, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[grade.correct for grade in results[thread]] for thread in range(4)] == [[True, False]] * 4


def test_memory_limit_below_minimum_is_refused() -> None:
    with pytest.raises(UserError, match="memory_limit_mb must be at least 256, which math-verify needs, got 255"):
        MathGrader(memory_limit_mb=255)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_workers", "0"), ("deadline_s", "0.0"), ("deadline_s", "inf"), ("extraction", "latex")],
)
def test_parser_refuses_out_of_range_grader_arguments(
    argument: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(MathGrader, "grader")
    parser.add_class_arguments(CorrectnessReward, "reward")
    if argument != "extraction":
        with pytest.raises(SystemExit):
            parser.parse_args([f"--reward.{argument}={value}"])
        assert f'"reward.{argument}"' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args([f"--grader.{argument}={value}"])
    assert f'"grader.{argument}"' in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"deadline_s": 5.0}, {"memory_limit_mb": 2048}, {"extraction": "lenient"}])
def test_settings_contain_everything_that_verdicts_depend_on(changed: dict) -> None:
    settings, others = MathGrader().settings(), MathGrader(**changed).settings()
    assert {name: value for name, value in others.items() if value != settings[name]} == changed
    assert settings["grading"].endswith(f"math-verify {version('math-verify')}")
    assert MathGrader(num_workers=2).settings() == settings


def test_unequal_lengths_are_refused(grader: MathGrader) -> None:
    with pytest.raises(ValueError, match="shorter"):
        grader.grade(["a", "b"], ["5"])
    with pytest.raises(ValueError, match="longer"):
        grader.grade_answers([], ["5"])
    assert grader.grade([], []) == []
