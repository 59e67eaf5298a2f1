"""Warnings at the start of a run, for settings that are a mistake more often than not."""

import shutil
import warnings

import pytest
import torch

from egspo_lightning import LoraConfig, PolicyConfig, StageTransition
from egspo_lightning.training import start_warnings
from egspo_lightning.training.start_warnings import (
    cpu_quota,
    idle_cores,
    random_weights_warning,
    rate_warning,
    threads_warning,
    transition_warning,
)
from egspo_lightning.types import Stage


@pytest.fixture
def with_weights(small_model, tmp_path) -> str:
    folder = shutil.copytree(small_model, tmp_path / "hf")
    (folder / "model.safetensors").touch()
    return str(folder)


def test_random_weights_are_told_where_weights_are_at_hand_or_evaluated(small_model, with_weights):
    assert random_weights_warning(PolicyConfig(small_model, from_scratch=True), is_fit=True) is None
    assert random_weights_warning(PolicyConfig(with_weights), is_fit=True) is None
    assert random_weights_warning(PolicyConfig(with_weights), is_fit=False) is None
    for name in (with_weights, "org/model"):  # on the hub
        text = random_weights_warning(PolicyConfig(name, from_scratch=True), is_fit=True)
        assert "from_scratch: true" in text
        assert "RANDOM WEIGHTS" in text
        assert repr(name) in text
    text = random_weights_warning(PolicyConfig(small_model, from_scratch=True), is_fit=False)
    assert "RANDOM WEIGHTS are evaluated" in text
    assert "--ckpt_path" in text


@pytest.mark.parametrize(
    ("stage", "rate", "optimizer", "lora", "warns"),
    [
        (Stage.SFT, 5e-5, "AdamW", None, False),
        (Stage.SFT, 1e-4, "AdamW", None, True),
        (Stage.SFT, 1e-3, "AdamW", None, True),  # the quickstart's
        (Stage.EGSPO, 1e-5, "AdamW", None, False),
        (Stage.EGSPO, 1e-4, "AdamW8bit", None, True),  # the quickstart's
        (Stage.EGSPO, 1e-4, "SGD", None, False),
        (Stage.SFT, 2e-4, "AdamW", LoraConfig(), False),
        (Stage.EGSPO, 1e-4, "AdamW", LoraConfig(), False),
        (Stage.EGSPO, 1e-3, "AdamW", LoraConfig(), True),
    ],
)
def test_high_rates_for_pretrained_weights_are_told(stage, rate, optimizer, lora, warns):
    text = rate_warning(PolicyConfig("org/model", lora=lora), optimizer, stage, rate)
    assert (text is not None) == warns
    if warns:
        assert f"{rate:g}" in text
    assert rate_warning(PolicyConfig("org/model", from_scratch=True), optimizer, stage, rate) is None


@pytest.mark.parametrize(
    ("threads", "quota", "idle", "words"),
    [
        (2, None, None, None),
        (2, 2.0, 1.9, None),
        (1, 0.5, 0.0, None),  # there is nothing to lower
        (4, 2.0, 3.9, ["4 threads", "CPU quota is 2 cores", "num_threads: 2"]),
        (2, None, 0.9, ["2 threads", "about 0.9 cores are idle", "num_threads: 1"]),
        (8, 2.5, 64.0, ["quota is 2.5 cores", "num_threads: 2"]),
    ],
)
def test_more_threads_than_cores_are_told(threads, quota, idle, words):
    text = threads_warning(threads, quota, idle)
    assert (text is None) == (words is None)
    assert all(word in text for word in words or [])


def test_cpu_quota_reads_both_versions_of_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for text, quota in (("-1\n", None), ("150000\n", 1.5)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(text)
        assert cpu_quota(tmp_path) == quota
    for text, quota in (("max 100000\n", 1.5), ("50000 100000\n", 0.5)):
        (tmp_path / "cpu.max").write_text(text)
        assert cpu_quota(tmp_path) == quota


def test_idle_cores_counts_ticks_of_all_cores(tmp_path):
    stat = tmp_path / "stat"
    assert idle_cores(0.0, stat) is None
    stat.write_text("cpu  1 2 3 4 5 6\n")
    assert idle_cores(0.001, stat) == 0.0  # the file stays the same


def test_a_run_warns_once_of_each(tiny_run, with_weights, monkeypatch):
    monkeypatch.setattr(start_warnings, "HIGH_RATES", dict.fromkeys(Stage, 1e-3))
    assert transition_warning([], Stage.EGSPO) is None
    run = tiny_run(module={"policy": PolicyConfig(with_weights, from_scratch=True)}, trainer={"max_epochs": 1})
    assert told(run) == ["RANDOM WEIGHTS", "no callback StageTransition"]
    run.module.policy.lm.save_pretrained(with_weights)
    run = tiny_run(StageTransition(), module={"policy": PolicyConfig(with_weights)}, trainer={"max_epochs": 1})
    assert told(run) == ["in stage sft", "in stage egspo"]


def told(run) -> list[str]:
    """The words of this module's warnings in the warnings of a fit."""
    words = ("RANDOM WEIGHTS", "no callback StageTransition", "in stage sft", "in stage egspo")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit()
    return [word for message in caught for word in words if word in str(message.message)]


def test_a_resumed_run_says_that_the_number_of_threads_has_changed(tiny_run, tmp_path, caplog, monkeypatch):
    run = tiny_run(StageTransition(save_checkpoint=False), trainer={"max_epochs": 1}).fit()
    run.trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    written = torch.get_num_threads()
    again = tiny_run(StageTransition(), trainer={"max_epochs": 2})
    monkeypatch.setattr(torch, "get_num_threads", lambda: written + 1)
    with caplog.at_level("INFO"):
        again.fit(ckpt_path=tmp_path / "one.ckpt")
    assert f"written with {written} torch threads, and this run has {written + 1}" in caplog.text
    assert f"num_threads: {written}" in caplog.text
