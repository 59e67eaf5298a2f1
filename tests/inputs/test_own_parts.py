"""An exception in the user's own code, of any kind of part, ends in one message with the lines of that code."""

from pathlib import Path

import pytest

PARTS = {
    "reward": ("data.reward", "own_parts.reward"),
    "gate": ("model.gate", "own_parts.Gate"),
    "gate_when_built": ("model.gate", "own_parts.BuiltGate"),
    "advantage": ("model.advantage", "own_parts.Advantage"),
    "engine": ("data.engine", "own_parts.Engine"),
    "demonstrations": ("data.demonstrations", {"class_path": "own_parts.Demonstrations"}),
    "problems": ("data.problems", "own_parts.Problems"),
    "task": ("data.demonstrations.init_args.task", "own_parts.Task"),
    "benchmark": ("data.benchmarks", [{"class_path": "own_parts.Sums", "init_args": {"name": "sums"}}]),
    "callback": ("trainer.callbacks", ["own_parts.Watch"]),
    "optimizer": ("model.optimizer", "own_parts.FailsWhenBuilt"),
}
FAST = ("reward", "gate_when_built")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else [pytest.mark.slow]) for k in PARTS])
def test_an_error_in_a_users_part_shows_the_users_lines(start, smallest, small_model, tmp_path, kind):
    run = smallest(tmp_path, small_model)
    run.put("model.initial_stage", "sft" if kind in ("demonstrations", "task") else "egspo")
    run.put(*PARTS[kind])
    ended = start(tmp_path, *run.command, environment={"PYTHONPATH": str(Path(__file__).parent)})
    assert ended.code == 2, ended.output
    message = ended.output[ended.output.index("error: ") :]
    assert "bug in own_parts" in message.splitlines()[0]
    assert 'own_parts.py", line ' in message
    assert 'return {}["bug in own_parts"]' in message
    assert "egspo_lightning/" not in message
    assert "Traceback" not in ended.output
    assert "Report it" not in ended.output
    assert len(message.splitlines()) < 15
