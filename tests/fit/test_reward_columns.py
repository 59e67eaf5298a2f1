"""Columns of a data set reach the reward in real runs: rollouts, sampling ahead, expert solutions and resumption."""

import json
import re

import datasets
import pytest
import torch

from egspo_lightning import DatasetBenchmark, DatasetDemonstrations, DatasetProblems, PhaseCheckpoint, StageTransition
from egspo_lightning.errors import UserError

ROWS = [
    {
        "messages": [{"role": "user", "content": f"{n}+1=?"}, {"role": "assistant", "content": rf"\boxed{{{n + 1}}}"}],
        "level": n,
        "tests": [{"input": str(n), "weight": 0.5}],
        "day": f"2026-11-{n:02}",
    }
    for n in range(1, 9)
]


class ByColumns:
    """A reward of the level, as the gold answer and the tests of the same row confirm it."""

    def __init__(self):
        self.calls = []

    def __call__(self, completions, golds, level, tests=None, scale=1.0):
        assert [int(gold) - 1 for gold in golds] == level
        assert tests == [[{"input": str(n), "weight": 0.5}] for n in level]
        self.calls.append(level)
        return [scale * n + 0.1 * len(text) for n, text in zip(level, completions, strict=True)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS[:2]).to_parquet(tmp_path / "held_out.parquet")
    return tmp_path


def data_of(files, reward, name="a.parquet", **others):
    return {
        "demonstrations": DatasetDemonstrations(str(files / name)),
        "problems": DatasetProblems(str(files / name)),
        "benchmarks": [DatasetBenchmark("held_out", str(files / "held_out.parquet"))],
        "reward": reward,
        **others,
    }


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("others", [{}, {"expert_fraction": 0.5, "max_staleness": 1}])
def test_columns_reach_the_reward(tiny_run, files, caplog, name, others):
    reward = ByColumns()
    with caplog.at_level("INFO"):
        tiny_run(StageTransition(), data=data_of(files, reward, name, **others)).fit()
    assert sum(map(len, reward.calls)) == 2 * (4 * 4 + (2 if others else 0))
    assert {n for call in reward.calls for n in call} <= set(range(3, 9))  # benchmark problems are left out
    assert "receives the columns level, tests and has no column for scale, which keeps its default." in caplog.text


def test_resuming_within_a_phase_has_the_same_columns_and_weights(tiny_run, files):
    def run(folder, **trainer):
        save = PhaseCheckpoint(dirpath=files / folder, save_top_k=-1, every_n_train_steps=1)
        settings = {"enable_checkpointing": True} | trainer
        return tiny_run(StageTransition(), save, data=data_of(files, ByColumns(), max_staleness=1), trainer=settings)

    whole = run("whole").fit()
    within = sorted((files / "whole").glob("epoch*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))[1]
    rest = run("rest").fit(ckpt_path=within, weights_only=True)
    (state,) = [part for name, part in torch.load(within, weights_only=True).items() if "HybridDataModule" in name]
    assert "'tests': [{'input': '" in str(state)
    expected = whole.module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in rest.module.state_dict().items())


def needs_difficulty(completions, golds, difficulty):
    return [0.0 for _ in completions]


def takes_all(completions, messages, **columns):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            needs_difficulty,
            "needs the column 'difficulty', which the data lacks. Its columns are day, level, messages, tests.",
        ),
        (takes_all, "has the argument 'messages', and the data has a column of this name"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_training(tiny_run, files, reward, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny_run(StageTransition(), data=data_of(files, reward)).fit()
