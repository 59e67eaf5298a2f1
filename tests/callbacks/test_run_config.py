"""Configs in checkpoints are plain data, and a resumed run lists the changed settings."""

import io

import pytest
import torch
from jsonargparse import ArgumentParser

from egspo_lightning import Guards, HybridDataModule, StageTransition
from egspo_lightning.callbacks.run_config import differences, plain
from egspo_lightning.cli.parser import Parser


def test_plain_converts_restricted_types_to_plain_numbers():
    """A checkpoint with a subclass of int or float does not load with ``weights_only``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StageTransition, "transition")
    parser.add_class_arguments(Guards, "guards")
    given = ["--transition.after_epochs=3", "--transition.learning_rate=0.5", "--guards.max_kl=0.25"]
    values = plain(parser, parser.parse_args(given))
    expected = {"after_epochs": 3, "learning_rate": 0.5, "enabled": True, "mode": "min", "target": None}
    found = {name: values["transition"][name] for name in expected}
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    assert type(values["guards"]["max_kl"]) is float
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == values


def test_differences_lists_changed_fields_and_ignores_paths():
    before = {"data": {"num_problems": 16, "gone": 1}, "terms": [{"x": 1}, {"x": 2}], "ckpt_path": None}
    now = {"data": {"num_problems": 8}, "terms": [{"x": 1}, {"x": 3}], "ckpt_path": "last"}
    assert differences(before, now) == ["data.gone: 1 -> 'absent'", "data.num_problems: 16 -> 8", "terms.1.x: 2 -> 3"]


@pytest.mark.parametrize(
    "given", [["--data.reward=my_reward.f"], ["--data.reward=WeightedReward", "--data.reward.terms={f: my_reward.f}"]]
)
def test_function_reward_is_its_import_path_in_every_process(tmp_path, monkeypatch, given):
    """Its repr holds an address, so that a resumed run would list it as changed."""
    (tmp_path / "my_reward.py").write_text("def f(completions, golds):\n    return [0.5] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    parser = Parser(exit_on_error=False)
    parser.add_lightning_class_args(HybridDataModule, "data")
    sources = ["--data.demonstrations=GeneratedDemonstrations", "--data.problems=GeneratedProblems"]
    reward = plain(parser, parser.parse_args([*sources, *given]))["data"]["reward"]
    assert (reward if isinstance(reward, str) else reward["init_args"]["terms"]["f"]) == "my_reward.f"
