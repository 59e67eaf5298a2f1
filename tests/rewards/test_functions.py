import pytest

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.functions import CorrectnessReward, Reward, Scored
from egspo_lightning.rewards.grading import Grade


def test_right_and_wrong_get_their_rewards() -> None:
    reward: Reward = CorrectnessReward(correct=2.0, incorrect=-1.0)
    assert reward([r"\boxed{72}", r"\boxed{71}", "none"], ["72"] * 3) == [
        Scored(2.0, Grade(True, "graded", "72", 0.0)),
        Scored(-1.0, Grade(False, "graded", "71", 0.0)),
        Scored(-1.0, Grade(False, "no_answer", None, 0.0)),
    ]


def test_algebra_and_close() -> None:
    reward = CorrectnessReward(deadline_s=5.0)
    assert [scored.reward for scored in reward([r"\boxed{x+1}", r"\boxed{x}"], ["1+x", "1+x"])] == [1.0, 0.0]
    reward.close()
    reward.close()


def test_arguments_are_checked_when_built() -> None:
    with pytest.raises(UserError, match="deadline_s"):
        CorrectnessReward(deadline_s=-1.0)
