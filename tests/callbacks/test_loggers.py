"""Runs with every kind of logger. Loggers without histograms or text get numbers, and one note says so."""

import json
import logging
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from egspo_lightning import Dashboard, EntropyHistogram, RolloutSamples, StageTransition
from egspo_lightning.callbacks.logger_displays import summary
from egspo_lightning.cli.main import run

HISTOGRAMS = "has no histograms; mean and quantiles of token entropy are logged as metrics, entropy/*."
TEXT = "keeps no text; completions are in the token records, see egspo report."


@pytest.fixture
def notes(caplog):
    """Returns the notes that callbacks have logged so far."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return lambda: [r.message for r in caplog.records if r.message.startswith(("entropy_", "rollout_samples"))]


def fit(tiny_run, *loggers, **options):
    dashboard = Dashboard()
    dashboard.hyperparameters = {"model.gate.top_fraction": 0.2, "model.gate": "QuantileGate"}
    callbacks = [EntropyHistogram(), RolloutSamples(1, num_samples=2), StageTransition(), dashboard]
    return tiny_run(*callbacks, trainer={"logger": list(loggers)} | options).fit()


def test_summary_matches_pandas_quantiles():
    values = torch.tensor([4.0, 1.0, 3.0, 2.0, 10.0, 7.0, 8.0, 9.0, 5.0, 6.0, 11.0])
    expected = pd.Series(values.numpy()).quantile([0.1, 0.5, 0.9], interpolation="lower").tolist()
    found = summary(values)
    assert found["mean"] == pytest.approx(6.0)
    assert [found["p10"], found["p50"], found["p90"]] == pytest.approx([2.0, 6.0, 10.0])
    assert expected == [2.0, 6.0, 10.0]
    assert summary(torch.tensor([3.0])) == {"mean": 3.0, "p10": 3.0, "p50": 3.0, "p90": 3.0}


def test_csv_logger_gets_quantiles_for_histograms_and_one_note(tiny_run, tmp_path, notes):
    found = fit(tiny_run, CSVLogger(tmp_path, version="csv"))
    assert notes() == [f"entropy_histogram: CSVLogger {HISTOGRAMS}", f"rollout_samples: CSVLogger {TEXT}"]
    rows = pd.read_csv(Path(found.trainer.log_dir) / "metrics.csv").groupby("step").first()
    assert rows["entropy/all/mean"].dropna().index.tolist() == [3, 5]  # two rollout batches
    rollout = found.data.phases.rollouts.batch
    entropies = rollout.entropies[rollout.completion_mask]
    assert rows["entropy/all/mean"][5] == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert rows["entropy/high/p10"][5] >= rollout.threshold[0].item() - 1e-6 > rows["entropy/low/p90"][5]
    assert (rows["entropy/all/p10"][5], rows["entropy/all/p90"][5]) == pytest.approx(
        entropies.sort().values[[-(-len(entropies) // 10) - 1, -(-9 * len(entropies) // 10) - 1]].tolist()
    )


def test_tensorboard_gets_histograms_and_no_note(tiny_run, tmp_path, notes, events):
    tags = events(fit(tiny_run, TensorBoardLogger(tmp_path)).trainer).Tags()
    assert notes() == []
    assert {"entropy/all", "entropy/high", "entropy/low"} <= set(tags["histograms"])
    assert not [tag for tag in tags["scalars"] if tag.startswith("entropy/")]


def test_each_of_two_loggers_gets_what_it_supports(tiny_run, tmp_path, notes, events):
    found = fit(tiny_run, TensorBoardLogger(tmp_path), CSVLogger(tmp_path, version="csv"))
    assert "entropy/all" in events(found.trainer).Tags()["histograms"]
    assert "entropy/all/p50" in pd.read_csv(tmp_path / "lightning_logs" / "csv" / "metrics.csv").columns
    assert [note.split(" ")[1] for note in notes()] == ["CSVLogger", "CSVLogger"]


def test_disabled_callbacks_log_no_notes(tiny_run, tmp_path, notes):
    tiny_run(EntropyHistogram(0), RolloutSamples(0), trainer={"logger": CSVLogger(tmp_path), "max_epochs": 1}).fit()
    assert notes() == []


@pytest.fixture
def mlflow(tmp_path) -> MLFlowLogger:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    return MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=str(tmp_path / "kept"))


def test_mlflow_gets_numbers_text_and_hyperparameters(tiny_run, tmp_path, notes, mlflow):
    fit(tiny_run, mlflow)
    assert notes() == [f"entropy_histogram: MLFlowLogger {HISTOGRAMS}"]
    with sqlite3.connect(tmp_path / "mlflow.db") as kept:  # read directly, not through MLflow
        metrics = dict(kept.execute("select key, value from latest_metrics"))
        parameters = dict(kept.execute("select key, value from params"))
        (status,) = kept.execute("select status from runs").fetchone()
    assert {"rollout/reward_mean", "gate/threshold", "entropy/high/mean", "stage"} <= set(metrics)
    assert metrics["entropy/low/p90"] < metrics["gate/threshold"] <= metrics["entropy/high/p10"] + 1e-6
    assert parameters == {"model.gate": "QuantileGate", "model.gate.top_fraction": "0.2"}
    assert status == "FINISHED"
    texts = {path.relative_to(tmp_path / "kept").parts[2:]: path.read_text() for path in tmp_path.rglob("*.md")}
    assert set(texts) == {
        ("rollout", "samples", "step-00000003.md"),
        ("rollout", "samples", "step-00000005.md"),
        ("stage", "step-00000000.md"),
        ("stage", "step-00000002.md"),
    }
    assert "<pre>" in texts["rollout", "samples", "step-00000005.md"]


SHORT = [
    "fit",
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=1",
    "--data.demonstrations.init_args.num_demonstrations=16",
    "--data.benchmarks.init_args.num_problems=4",
    "--data.num_problems=2",
    "--data.max_completion_length=40",
]


def test_each_mlflow_run_of_the_command_line_has_its_own_folder(repository, small_model, tmp_path, monkeypatch, mlflow):
    monkeypatch.chdir(repository)
    flags = [f"--model.policy.name_or_path={small_model}", f"--trainer.default_root_dir={tmp_path}"]
    logger = {"tracking_uri": mlflow._tracking_uri, "artifact_location": str(tmp_path / "kept")}
    flags.append(
        f"--trainer.logger={json.dumps({'class_path': 'lightning.pytorch.loggers.MLFlowLogger', 'init_args': logger})}"
    )
    folders = [Path(run([*SHORT, *flags]).trainer.log_dir) for _ in range(2)]
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder.is_relative_to(tmp_path)
        for name in ("config.yaml", "sft.ckpt", "benchmarks.jsonl", "hf/model.safetensors", "checkpoints/last.ckpt"):
            assert (folder / name).is_file(), name
        assert len(list((folder / "token_records").iterdir())) == 2


def test_hyperparameters_of_a_command_line_run_come_from_the_config(repository, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    flags = [f"--model.policy.name_or_path={small_model}", f"--trainer.default_root_dir={tmp_path}"]
    cli = run([*SHORT, *flags, "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"])
    (dashboard,) = [c for c in cli.trainer.callbacks if isinstance(c, Dashboard)]
    values = dashboard.hyperparameters
    expected = {
        "seed_everything": 1,
        "model.gate": "QuantileGate",
        "model.gate.top_fraction": 0.2,
        "model.attenuation": "ConfidenceAttenuation",
        "model.objective.mu": 0.1,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-3,
        "data.num_problems": 2,
        "stage_transition.learning_rate": 1e-4,
        "trainer.max_epochs": 2,
        "trainer.gradient_clip_val": 1.0,
    }
    assert {name: values.get(name) for name in expected} == expected
    assert not [name for name in values if "benchmark" in name or "evaluation" in name]
    assert "model.gate.top_fraction: 0.2" in (Path(cli.trainer.log_dir) / "hparams.yaml").read_text()


def test_wandb_keeps_histograms_offline(tiny_run, tmp_path, monkeypatch, notes):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    found = fit(tiny_run, logger)
    shown = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert notes() == []
    assert shown["entropy/all"]["_type"] == "histogram"
    rollout = found.data.phases.rollouts.batch
    assert shown["rollout/reward_mean"] == pytest.approx(found.trainer.callback_metrics["rollout/reward_mean"].item())
    assert (
        sum(shown["entropy/all"].get("values", [int(rollout.completion_mask.sum())])) == rollout.completion_mask.sum()
    )
