import pytest

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.functions import CorrectnessReward, Details, Reward
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.types import Problem


def test_correctness_reward_of_right_and_wrong_answers() -> None:
    reward: Reward = CorrectnessReward(correct=2.0, incorrect=-1.0)
    assert reward([r"\boxed{72}", r"\boxed{71}", "none"], ["72"] * 3) == [2.0, -1.0, -1.0]


def test_correctness_reward_uses_known_verdicts() -> None:
    grades = [Grade(False, "timeout", "72", 10.0), Grade(True, "graded", "72", 0.0)]
    details = [Details(Problem("1", "q", "72"), "", 5, 9, False, grade) for grade in grades]
    assert CorrectnessReward()([r"\boxed{72}", "none"], ["72"] * 2, details) == [0.0, 1.0]


def test_correctness_reward_grades_algebra_and_closes_workers() -> None:
    reward = CorrectnessReward(deadline_s=5.0)
    assert reward([r"\boxed{x+1}", r"\boxed{x}"], ["1+x", "1+x"]) == [1.0, 0.0]
    assert len(reward.grader.worker_pids()) == 2
    reward.close()
    assert reward.grader.worker_pids() == []
    reward.close()


def test_correctness_reward_can_take_answers_from_free_text() -> None:
    reward = CorrectnessReward(deadline_s=20.0, extraction="lenient")
    assert reward(["So it is $18.90$.", r"\boxed{18.90}", "So it is 19."], [r"\$18.90"] * 3) == [1.0, 1.0, 0.0]
    assert CorrectnessReward().grader.extraction == "boxed"
    reward.close()


def test_invalid_correctness_reward_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="memory_limit_mb must be at least 256"):
        CorrectnessReward(memory_limit_mb=1)
    with pytest.raises(UserError, match=r"data\.reward\.incorrect must be a finite number, got inf"):
        CorrectnessReward(incorrect=float("inf"))
