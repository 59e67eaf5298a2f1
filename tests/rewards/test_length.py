import pytest
from jsonargparse import ArgumentParser

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.functions import Details
from egspo_lightning.rewards.length import SoftLengthPenalty
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.types import Problem


def details(length, limit=20):
    return [Details(Problem("1", "q", "2"), "", length, limit, False, Grade(True, "graded", "2", 0.0))]


@pytest.mark.parametrize(
    ("length", "reward"),
    [(1, 0.0), (15, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (21, -1.0)],
)
def test_soft_length_penalty_by_hand(length, reward):
    """Limit 20, buffer 4: no penalty up to 16 tokens, then 1/4 per token."""
    assert SoftLengthPenalty(4)(["text"], ["2"], details(length)) == [reward]


def test_buffer_equal_to_the_limit_penalizes_from_the_first_token():
    penalty = SoftLengthPenalty(20)
    penalty.require_fit(20)
    assert penalty(["text"], ["2"], details(1)) == [-0.05]


@pytest.mark.parametrize("buffer", [0, -1])
def test_parser_refuses_a_buffer_below_one(buffer, capsys):
    parser = ArgumentParser()
    parser.add_class_arguments(SoftLengthPenalty, "penalty")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--penalty.buffer={buffer}"])
    message = capsys.readouterr().err
    assert '"penalty.buffer"' in message
    assert f"Not of type Count: {buffer} does not conform" in message


def test_buffer_above_the_limit_is_refused():
    message = r"SoftLengthPenalty\.buffer = 21 is more than data\.max_completion_length = 20"
    with pytest.raises(UserError, match=message):
        SoftLengthPenalty(21).require_fit(20)


def test_length_penalty_requires_details():
    with pytest.raises(ValueError, match="zip"):
        SoftLengthPenalty(4)(["text"], ["2"])
