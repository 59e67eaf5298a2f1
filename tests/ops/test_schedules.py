import math

import pytest

from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.schedules import ChordMu, chord_mu


def test_chord_mu_by_hand():
    # rises over 4 steps to 0.8, falls over 6 to 0.2: halfway down after 3 of them
    schedule = {"warmup_steps": 4, "decay_steps": 6, "peak": 0.8, "valley": 0.2}
    ours = [chord_mu(step, **schedule) for step in (0, 1, 2, 4, 5, 7, 9, 10, 1000)]
    cosine = math.cos(math.pi / 6)
    expected = [0.0, 0.2, 0.4, 0.8, 0.5 + 0.3 * cosine, 0.5, 0.5 - 0.3 * cosine, 0.2, 0.2]
    assert ours == pytest.approx(expected, abs=1e-12)
    assert [ChordMu(**schedule).at(step) for step in (0, 2, 4, 7, 10)] == pytest.approx([0.0, 0.4, 0.8, 0.5, 0.2])


def test_schedule_without_steps_is_its_valley():
    schedule = ChordMu(warmup_steps=0, decay_steps=0, peak=0.9, valley=0.05)
    assert [schedule.at(step) for step in (0, 1, 100)] == [0.05] * 3


def test_objective_mu_follows_schedule_or_constant():
    scheduled = Objective(mu=ChordMu(warmup_steps=2, decay_steps=2, peak=1.0, valley=0.0))
    assert [scheduled.mu_at(step) for step in range(5)] == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    assert [Objective(mu=0.3).mu_at(step) for step in (0, 100)] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("mu", "expected"),
    [(0.0, False), (0.1, True), (ChordMu(), True), (ChordMu(peak=0.0), True), (ChordMu(peak=0.0, valley=0.0), False)],
)
def test_objective_mixes_expert_data_if_mu_is_ever_positive(mu, expected):
    assert Objective(mu=mu).mixes_expert_data is expected
