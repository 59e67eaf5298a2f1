import re

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from browser import ALL_TEXT, tensorboard
from egspo_lightning import Dashboard, MathBenchmark, RolloutSamples, StageTransition, TokenRecords
from egspo_lightning.analysis.record_reading import load
from egspo_lightning.callbacks.dashboard import BENCHMARKS, CHARTS, HPARAMS
from egspo_lightning.callbacks.run_config import flatten_by_class
from egspo_lightning.cli.known_keys import find
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark

HYPERPARAMETERS = {"seed_everything": 1, "model.gate": "QuantileGate", "model.gate.top_fraction": 0.2}
BENCHMARK = GeneratedBenchmark("greedy", num_problems=3, task=ArithmeticTask(num_digits=1))
FIT = {"data": {"benchmarks": [BENCHMARK]}, "logger": True}


def dashboard() -> Dashboard:
    made = Dashboard()
    made.hyperparameters = HYPERPARAMETERS
    return made


def callbacks():
    return MathBenchmark(), StageTransition(), dashboard()


def layout(log) -> dict[str, list[str]]:
    """Tag patterns of each chart, read as TensorBoard's plugin does."""
    (event,) = log.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def test_layout_has_all_charts_and_every_pattern_matches_a_metric(tiny_run, events):
    log = events(tiny_run(*callbacks(), **FIT).fit().trainer)
    charts = layout(log)
    assert list(charts) == ["reward", "accuracy", "entropy (nats)", "gate", "loss"]
    logged = log.Tags()["scalars"]
    drawn = {title: {t for p in patterns for t in logged if re.match(p, t)} for title, patterns in charts.items()}
    for title, patterns in charts.items():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in logged), pattern
        assert drawn[title] >= set(CHARTS[title])
    assert drawn["accuracy"] == {"rollout/accuracy", "eval/greedy/avg@1", "stage_mark/accuracy"}
    assert drawn["entropy (nats)"] == {
        "policy/entropy", "policy/entropy_high", "policy/entropy_low", "stage_mark/entropy"
    }  # fmt: skip
    assert drawn["gate"] == {"gate/threshold", "gate/high_fraction", "gate/weight_mean", "stage_mark/gate"}
    assert re.match(BENCHMARKS, "eval/aime24/avg@16")
    assert not re.match(BENCHMARKS, "eval/aime24/avg@16_se")


def test_stage_transition_is_a_vertical_line_in_each_chart_and_a_text(tiny_run, events):
    log = events(tiny_run(*callbacks(), **FIT).fit().trainer)
    entered = 2  # 32 demonstrations in batches of 16
    first = {tag: log.Scalars(tag)[0].value for tag in log.Tags()["scalars"]}
    assert len([tag for tag in first if tag.startswith("stage_mark/")]) == len(CHARTS)
    for title in ("reward", "entropy (nats)", "gate"):
        top, bottom = log.Scalars(f"stage_mark/{title.split()[0]}")
        assert (top.step, bottom.step, bottom.value) == (entered, entered + 1, 0.0)
        values = [first[name] for name in CHARTS[title]]
        assert top.value == pytest.approx(sum(values) / len(values), rel=1e-6)
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in log.Tensors("stage/text_summary")]
    assert texts == [
        (0, "Stage **sft** from phase 1, step 0."),
        (entered, "Stage **egspo** from phase 2, step 2: 1 epochs done."),
    ]


def test_run_that_starts_in_egspo_has_no_transition_mark(tiny_run, events):
    log = events(tiny_run(dashboard(), module={"initial_stage": "egspo"}, **FIT).fit().trainer)
    assert not [tag for tag in log.Tags()["scalars"] if tag.startswith("stage_mark/")]
    assert len(log.Tensors("stage/text_summary")) == 1


def hparams(log, part: str):
    content = log.summary_metadata[f"_hparams_/{part}"].plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), part)


def test_hparams_plugin_gets_hyperparameters_and_metrics(tiny_run, events):
    log = events(tiny_run(*callbacks(), **FIT).fit().trainer)
    start = hparams(log, "session_start_info").hparams
    found = {name: value.string_value or value.number_value for name, value in start.items()}
    assert found == HYPERPARAMETERS
    judged = [metric.name.tag for metric in hparams(log, "experiment").metric_infos]
    assert judged == ["eval/greedy/avg@1", "rollout/reward_mean", "policy/entropy"]
    assert set(judged) <= set(log.Tags()["scalars"])
    assert "hp_metric" not in log.Tags()["scalars"]
    assert "_hparams_/session_end_info" in log.summary_metadata
    first = log.Scalars("rollout/accuracy")[0]
    assert first.step > 0  # no placeholder value at step 0


def test_hparams_tab_has_fewer_than_fifteen_columns_in_a_useful_order(tiny_run, events):
    names = [f"b{i}" for i in range(4)]
    benchmarks = [GeneratedBenchmark(name, num_problems=1, task=BENCHMARK.task) for name in names]
    shown = dashboard()
    shown.hyperparameters = {f"other.{i}": i for i in range(80)} | dict.fromkeys(reversed(HPARAMS), 0.5)
    run = tiny_run(MathBenchmark(), StageTransition(), shown, data={"benchmarks": benchmarks}, logger=True).fit()
    tab = hparams(events(run.trainer), "experiment")
    columns = [info.name for info in tab.hparam_infos], [info.name.tag for info in tab.metric_infos]
    assert columns == (list(HPARAMS), ["eval/b0/avg@1", "eval/b1/avg@1", "rollout/reward_mean", "policy/entropy"])
    assert len(columns[0]) + len(columns[1]) < 15
    assert columns[0][0] == "model.method"


def test_columns_of_hparams_are_known_keys():
    assert [name for name in HPARAMS if find(name)[0] is None] == []


def test_failed_run_has_no_session_end(tiny_run, events, monkeypatch):
    run = tiny_run(*callbacks(), **FIT)
    monkeypatch.setattr(run.module, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    log = events(run.trainer)
    assert "_hparams_/session_start_info" in log.summary_metadata
    assert "_hparams_/session_end_info" not in log.summary_metadata


def test_dashboard_can_be_disabled(tiny_run, events):
    run = tiny_run(StageTransition(), Dashboard(enabled=False), logger=True).fit()
    tags = events(run.trainer).Tags()
    assert "custom_scalars__config__" not in tags["tensors"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("stage_mark/")]


def test_loaded_metrics_exclude_stage_marks(tiny_run):
    """Stage marks are drawings, not measurements."""
    run = tiny_run(StageTransition(), dashboard(), TokenRecords(), data={"num_ppo_epochs": 2}, logger=True).fit()
    metrics = load(run.trainer.log_dir).metrics
    assert not [name for name in metrics.columns if name.startswith("stage_mark/")]
    assert metrics["step"].tolist() == [1, 5, 9]  # the last optimizer step of each epoch; the marks are at 2 and 3
    assert metrics["stage"].dropna().tolist() == [0.0, 1.0, 1.0]


def test_flatten_by_class_gives_values_by_dotted_path():
    config = {
        "seed": 1,
        "gate": {"class_path": "a.b.QuantileGate", "init_args": {"top_fraction": 0.2, "running_decay": None}},
        "attenuation": {"class_path": "a.b.ConfidenceAttenuation"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": (0.9, 0.95)}},
        "terms": [{"class_path": "a.One", "init_args": {"x": True}}, {"class_path": "a.Two"}],
        "empty": None,
    }
    assert flatten_by_class(config) == {
        "seed": 1,
        "gate": "QuantileGate",
        "gate.top_fraction": 0.2,
        "attenuation": "ConfidenceAttenuation",
        "optimizer": "AdamW",
        "optimizer.betas": "(0.9, 0.95)",
        "terms.0": "One",
        "terms.0.x": True,
        "terms.1": "Two",
    }


def test_csv_logger_gets_the_hyperparameters(tiny_run, tmp_path):
    tiny_run(*callbacks(), **FIT | {"trainer": {"logger": CSVLogger(tmp_path, version="csv")}}).fit()
    (written,) = tmp_path.rglob("csv/hparams.yaml")
    assert "model.gate: QuantileGate" in written.read_text()


@pytest.mark.slow
def test_tensorboard_in_a_browser_shows_charts_text_and_hparams(tiny_run, tmp_path, browser):
    run = tiny_run(*callbacks(), RolloutSamples(1), TokenRecords(), **FIT).fit()
    for logger in run.trainer.loggers:
        logger.experiment.flush()
    with tensorboard(tmp_path / "logs") as address:
        browser.open(f"{address}/#custom_scalars")
        browser.wait_for(*(f" {title} " for title in CHARTS), "Matches (4)")  # three metrics and the stage mark
        browser.open("about:blank")
        browser.open(f"{address}/#text")
        text = browser.wait_for("rollout/samples", "from phase 2, step 2: 1 epochs done.")
        assert "reward" in text
        browser.open("about:blank")
        browser.open(f"{address}/#hparams")
        browser.wait_for("model.gate.top_fraction", "QuantileGate", "rollout/reward_mean")
        assert "<script" not in browser.run(ALL_TEXT).split("JavaScript")[-1]
