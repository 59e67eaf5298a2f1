"""Configs in checkpoints are plain data, and a resumed run lists the changed settings."""

import io

import torch
from jsonargparse import ArgumentParser

from egspo_lightning import Guards, StageTransition
from egspo_lightning.callbacks.run_config import differences, plain


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
