import pytest

from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward


def test_kl_coefficient_follows_its_target_by_hand():
    # errors 0.1 and 100 %, the second clipped at 20 %; 500 completions of 1000: factors 1.05 and 1.1
    control = KLReward(coefficient=0.2, target=0.1, horizon=1000)
    control.update(0.11, 500)
    assert control.current == pytest.approx(0.2 * 1.05, rel=1e-12)
    control.update(0.2, 500)
    assert control.current == pytest.approx(0.2 * 1.05 * 1.1, rel=1e-12)
    control.update(0.0, 1000)  # KL of 0: an error of -100 %, clipped at -20 %
    assert control.current == pytest.approx(0.2 * 1.05 * 1.1 * 0.8, rel=1e-12)
    control.update(0.1, 1000)
    control.update(5.0, 0)  # no completions, no change
    assert control.current == pytest.approx(0.2 * 1.05 * 1.1 * 0.8, rel=1e-12)


def test_kl_coefficient_stays_positive_if_a_rollout_batch_exceeds_the_horizon():
    control = KLReward(coefficient=0.2, target=0.1, horizon=1)
    for _ in range(3):
        control.update(0.0, 64)
        assert 0 < control.current < 0.2


def test_coefficients_without_target_are_constant():
    kl, bonus = KLReward(coefficient=0.2), EntropyBonus(coefficient=0.2)
    kl.update(5.0, 100)
    bonus.update(5.0)
    assert (kl.current, bonus.current) == (0.2, 0.2)


def test_entropy_bonus_follows_its_target_and_is_never_negative():
    bonus = EntropyBonus(coefficient=0.0, target=1.0, step=0.25)
    seen = []
    for entropy in (0.5, 0.9, 1.1, 1.2, 2.0, 2.0, 0.1):
        bonus.update(entropy)
        seen.append(bonus.current)
    assert seen == pytest.approx([0.25, 0.5, 0.25, 0.0, 0.0, 0.0, 0.25], abs=1e-12)
    small = EntropyBonus(coefficient=0.1, target=1.0, step=0.25)
    small.update(2.0)
    assert small.current == 0.0


@pytest.mark.parametrize(
    ("make", "move"),
    [
        (lambda: KLReward(coefficient=0.2, target=0.1, horizon=10), lambda control: control.update(0.2, 5)),
        (lambda: EntropyBonus(coefficient=0.2, target=0.1, step=0.01), lambda control: control.update(0.2)),
    ],
)
def test_adaptive_coefficient_resumes_from_its_state(make, move):
    moved, resumed, fresh = make(), make(), make()
    move(moved)
    resumed.load_state_dict(moved.state_dict())
    assert resumed.current == moved.current != fresh.current == 0.2
    for control in (moved, resumed):
        move(control)
    assert resumed.current == moved.current


def test_resumed_coefficient_without_target_comes_from_the_config():
    kl, bonus = KLReward(coefficient=0.2), EntropyBonus(coefficient=0.2)
    for control in (kl, bonus):
        control.load_state_dict({"current": 0.7})
        assert control.current == 0.2
