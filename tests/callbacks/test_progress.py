import pickle
import re

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from egspo_lightning import PhaseProgress, StageTransition
from egspo_lightning.callbacks import progress

BAR = {"trainer": {"max_epochs": 3, "enable_progress_bar": True}}


@pytest.fixture
def every_line(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)


@pytest.mark.usefixtures("every_line")
def test_progress_prints_plain_lines_without_a_terminal(tiny_run, capsys):
    run = tiny_run(StageTransition(), PhaseProgress(), **BAR).fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("phase ")]
    assert len(lines) == 3
    assert re.fullmatch(r"phase 1/3 \[sft\] · sft loss \d\.\d+", lines[0])
    reward = float(run.trainer.callback_metrics["rollout/reward_mean"])
    assert lines[2].startswith("phase 3/3 [egspo] · ")
    assert f"reward {reward:.3g}" in lines[2]
    assert "entropy" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_progress_lines_are_seconds_apart(tiny_run, capsys):
    tiny_run(PhaseProgress(), **BAR).fit()
    assert capsys.readouterr().err.count("phase ") == 1  # three epochs take less than ten seconds


@pytest.mark.usefixtures("every_line")
def test_disabled_progress_prints_nothing(tiny_run, capsys):
    bar = PhaseProgress()
    bar.disable()
    assert not bar.is_enabled
    run = tiny_run(bar, **BAR)
    run.fit()
    bar.print("hello")
    output = capsys.readouterr()
    assert "phase " not in output.err + output.out
    assert "hello" not in output.err + output.out
    bar.enable()
    bar.print("hello")
    assert capsys.readouterr().err == "hello\n"


def test_progress_prints_markup_literally(capsys):
    PhaseProgress().print("[bold]x[/bold] [/nothing] [sft]")
    assert capsys.readouterr().err == "[bold]x[/bold] [/nothing] [sft]\n"


class Says(Callback):
    """Logs a message as Lightning does, while the bar is open."""

    def on_train_batch_end(self, *args):
        rank_zero_info("a message")


@pytest.mark.parametrize("method", ["egspo", "reinforce_plus_plus"])
def test_progress_bar_on_a_terminal_shows_phase_and_method(tiny_run, tmp_path, method):
    """At 100 columns the times are whole, and each message has a line of its own."""
    bar = PhaseProgress()
    with (tmp_path / "screen").open("w") as screen:
        bar._console = Console(file=screen, force_terminal=True, width=100)
        tiny_run(bar, Says(), StageTransition(), module={"method": method}, **BAR).fit()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", (tmp_path / "screen").read_text())
    lines = re.split(r"[\r\n]+", text)
    assert re.fullmatch(rf"\[{method}\] · .* phase 3/3 0:\d\d:\d\d 0:00:00 *", lines[-2])  # not parsed as markup
    assert f"Stage sft -> {method} after phase 1: 1 epochs done." in [line.rstrip() for line in lines]
    assert [line.rstrip() for line in lines].count("a message") == sum("a message" in line for line in lines) == 6
    assert bar._progress is None


def test_progress_bar_is_closed_when_training_fails(tiny_run, tmp_path):
    bar = PhaseProgress()
    with (tmp_path / "screen").open("w") as screen:
        bar._console = Console(file=screen, force_terminal=True, width=120)
        run = tiny_run(bar, StageTransition(monitor="nothing", target=1.0), **BAR)
        with pytest.raises(ValueError, match="no metric 'nothing'"):
            run.fit()
    assert bar._progress is None


def test_progress_can_be_pickled_for_spawned_ranks(capsys):
    pickle.loads(pickle.dumps(PhaseProgress())).print("still there")
    assert capsys.readouterr().err == "still there\n"
