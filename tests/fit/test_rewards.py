"""Rewards from YAML and flags, also user-defined ones, up to the logged metrics."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from egspo_lightning.cli.main import run
from smallest_config import smallest_config

MINE = '''
class EvenBytes:
    """Share of even bytes, of at least some length."""

    def __init__(self, at_least: int = 0):
        self.at_least = at_least

    def __call__(self, completions, golds):
        return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1, self.at_least) for text in completions]


def num_digits(texts: list[str], answers: list[str]) -> list[int]:
    return [sum(c.isdigit() for c in text) for text in texts]


def broken(completions, golds):
    return [1.0 / 0 for _ in completions]
'''


def source(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


@pytest.fixture
def config(small_model, tmp_path, monkeypatch):
    """Config of two rollout batches of 4 problems x 4 completions; `my_rewards` is importable."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "10000")
    task = source("egspo_lightning.data.tasks.arithmetic.ArithmeticTask", num_digits=1)
    config = smallest_config(tmp_path, small_model)
    config["trainer"] |= {"logger": source("CSVLogger", save_dir=str(tmp_path / "logs")), "enable_checkpointing": False}
    config["model"]["initial_stage"] = "egspo"
    config["data"] |= {
        "problems": source("egspo_lightning.data.generated_sources.GeneratedProblems", task=task),
        "engine": source("egspo_lightning.rollout.transformers_engine.TransformersEngine", max_batch_size=5),
        "num_problems": 4,
        "num_generations": 4,
    }
    return config


@pytest.fixture
def fit(tmp_path):
    def start(config, *arguments, entry=run):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return entry(["fit", "--config", str(path), *arguments])

    return start


def logged(cli):
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["rollout/reward_mean"]]


def even_share(text, at_least=0):
    return sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1, at_least)


def test_user_rewards_and_built_in_rewards_are_weighted(config, fit):
    """Each term is recomputed from texts and tokens, up to the reward tensor and the metrics."""
    config["data"]["reward"] = source(
        "egspo_lightning.rewards.composition.WeightedReward",
        terms={
            "correctness": source("egspo_lightning.rewards.functions.CorrectnessReward", correct=2.0),
            "format": source("egspo_lightning.rewards.format.FormatReward"),
            "length": source("egspo_lightning.rewards.length.SoftLengthPenalty", buffer=10),
            "even": source("my_rewards.EvenBytes", at_least=7),
            "digits": "my_rewards.num_digits",
        },
        weights={"length": 0.5, "even": 3.0, "digits": 0.0, "format": 0.25},
    )
    cli = fit(config)
    rollouts = cli.datamodule.phases.rollouts
    columns = {"length": [], "even": [], "digits": []}
    for completion, reward in zip(rollouts.completions, rollouts.batch.rewards.tolist(), strict=True):
        length = -min(max((len(completion.token_ids) - 30) / 10, 0.0), 1.0)
        even, digits = even_share(completion.text, 7), sum(c.isdigit() for c in completion.text)
        assert completion.reward_terms == pytest.approx(
            {"correctness": 0.0, "format": 0.0, "length": length, "even": even, "digits": digits}
        )
        assert completion.reward == pytest.approx(0.5 * length + 3 * even)
        assert reward == pytest.approx(completion.reward, abs=1e-6)
        for name, value in (("length", length), ("even", even), ("digits", digits)):
            columns[name].append(value)
    row = logged(cli)[-1]
    for name, values in columns.items():
        assert len(set(values)) > 1
        assert float(row[f"rollout/reward/{name}"]) == pytest.approx(sum(values) / 16, abs=1e-6)
    assert float(row["rollout/reward/correctness"]) == float(row["rollout/reward/format"]) == 0.0
    rewards = [completion.reward for completion in rollouts.completions]
    assert float(row["rollout/reward_mean"]) == pytest.approx(sum(rewards) / 16, abs=1e-6)
    assert float(row["rollout/accuracy"]) == 0.0
    assert all(math.isfinite(float(row[name])) for name in ("time/sample", "time/grade"))
    assert float(row["time/sample"]) > 0


def test_a_flag_selects_a_user_reward(config, fit):
    cli = fit(config, "--data.reward=my_rewards.EvenBytes", "--data.reward.at_least=9")
    completions = cli.datamodule.phases.rollouts.completions
    assert [c.reward for c in completions] == pytest.approx([even_share(c.text, 9) for c in completions])
    row = logged(cli)[-1]
    assert float(row["rollout/reward/EvenBytes"]) == pytest.approx(float(row["rollout/reward_mean"]), abs=1e-6)
    assert float(row["rollout/accuracy"]) == 0.0
    saved = yaml.safe_load(Path(cli.trainer.log_dir, "config.yaml").read_text())
    assert saved["data"]["reward"] == source("my_rewards.EvenBytes", at_least=9)


def test_the_default_reward_is_correctness(config, fit):
    cli = fit(config)
    assert cli.datamodule.reward.weights == {"correctness": 1.0}
    row = logged(cli)[-1]
    assert float(row["rollout/reward/correctness"]) == float(row["rollout/reward_mean"]) == 0.0


def test_flags_set_terms_and_weights(config, fit):
    terms = {"format": "egspo_lightning.rewards.format.FormatReward", "even": {"class_path": "my_rewards.EvenBytes"}}
    cli = fit(
        config,
        "--data.reward=egspo_lightning.rewards.composition.WeightedReward",
        f"--data.reward.terms={json.dumps(terms)}",
        "--data.reward.weights.even=0.5",
    )
    assert cli.datamodule.reward.weights == {"format": 1.0, "even": 0.5}
    completions = cli.datamodule.phases.rollouts.completions
    assert [c.reward for c in completions] == pytest.approx([even_share(c.text) / 2 for c in completions])


def test_accuracy_is_independent_of_the_reward(config, fit):
    """A policy that has learned the sums gets a reward for even bytes."""
    config["data"]["demonstrations"]["init_args"]["task"] = config["data"]["problems"]["init_args"]["task"]
    config["data"]["sft_batch_size"] = 4
    config["model"] |= {"initial_stage": "sft", "optimizer": source("torch.optim.AdamW", lr=1e-2)}
    config["stage_transition"] = {"after_epochs": 120}
    config["trainer"]["max_epochs"] = 121
    cli = fit(config, "--data.reward=my_rewards.EvenBytes")
    completions = cli.datamodule.phases.rollouts.completions
    right = sum(completion.correct for completion in completions)
    assert 0 < right < 16
    assert float(logged(cli)[-1]["rollout/accuracy"]) == pytest.approx(right / 16)
    for completion in completions:
        assert completion.correct == (completion.extracted == completion.problem.answer)
        assert completion.reward == pytest.approx(even_share(completion.text))


def test_an_error_in_a_user_reward_names_the_reward(config, fit):
    with pytest.raises(RuntimeError, match=r"data\.reward: broken \(my_rewards\.broken\) raised ZeroDivisionError"):
        fit(config, "--data.reward=my_rewards.broken")
