"""Configs that cannot be compared are refused without training."""

import pytest

from egspo_lightning.cli.comparison.compared_runs import AFTER_SFT, Run, Settings
from egspo_lightning.cli.comparison.run_check import check
from egspo_lightning.errors import UserError, cause_of


@pytest.fixture
def checked(repository, tmp_path, monkeypatch):
    """Message of a check of the quickstart with further flags; None if it may be trained."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, method=None):
        shared = Settings((str(repository / "configs" / "quickstart.yaml"),), flags, 4, 2, 1, tmp_path / "out")
        try:
            check(Run(method or AFTER_SFT, method, 1), shared)
        except Exception as error:
            return str(cause_of(error, UserError))
        assert not list((tmp_path / "out" / "unfinished").glob("*/*"))
        return None

    return run


def test_what_can_be_compared_is_built_and_leaves_nothing(checked):
    assert checked() is None
    assert checked(method="sft") is None
    assert checked(method="ppo_critic") is None


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.benchmarks=[]", "data.benchmarks is empty"),
        ("--math_benchmark.enabled=false", "math_benchmark.enabled is false"),
        ("--trainer.devices=2", "each run of a comparison trains on one device, got 2"),
        ("--model.initial_stage=egspo", "a comparison starts every method from an SFT checkpoint"),
        ("--stage_transition.enabled=false", "a comparison starts every method from an SFT checkpoint"),
    ],
)
def test_what_cannot_be_compared_is_refused(checked, flag, message):
    assert message in checked(flag)


def test_an_early_end_of_training_is_refused(checked):
    late = ["--stage_transition.monitor=null", "--stage_transition.target=null", "--stage_transition.after_epochs=9"]
    late += ["--trainer.max_epochs=5"]
    assert "trainer.max_epochs = 5 ends before SFT, which has stage_transition.after_epochs = 9" in checked(*late)
