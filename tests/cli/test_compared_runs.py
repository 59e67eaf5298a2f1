"""Runs are validated before training, and results with other settings are refused."""

import json
from pathlib import Path

import pytest

from egspo_lightning.cli.comparison.compared_runs import (
    Run,
    Settings,
    method_file,
    method_label,
    method_names,
    read_learning_rates,
    require_methods,
    steps_per_phase,
)
from egspo_lightning.cli.comparison.run_scheduler import read_progress, run_all
from egspo_lightning.cli.comparison.stored_results import differences, read_result, require_same_comparison
from egspo_lightning.cli.comparison.worker_pool import attempt, ready
from egspo_lightning.errors import UserError


@pytest.fixture
def shared(repository, tmp_path):
    return Settings((str(repository / "configs" / "quickstart.yaml"),), (), 4, 2, 1, tmp_path)


def finish(run, shared, **values):
    path = run.result_file(shared.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": run.settings(shared)} | values))


def test_differences_name_the_key():
    old = {"a": {"b": [1, {"c": 2}]}, "d": 1}
    assert differences(old, {"a": {"b": [1, {"c": 3}]}, "e": 1}) == [
        "a.b[1].c: stored 2, now 3",
        "d: stored 1, now null",
        "e: stored null, now 1",
    ]
    assert differences(old, json.loads(json.dumps(old))) == []


def test_the_result_of_a_finished_run_is_read(shared):
    run = Run("grpo", "grpo", 1, 1e-4)
    assert read_result(run, shared) is None
    finish(run, shared, accuracy=0.5)
    assert read_result(run, shared)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"phases": 5}, "phases: stored 4, now 5"),
        ({"threads": 2}, "threads: stored 1, now 2"),
        ({"evaluate_every": 3}, "evaluate_every: stored 2, now 3"),
        ({"flags": ("--data.num_problems", "4")}, r"flags: stored \[\], now \[.--data.num_problems., .4.\]"),
    ],
)
def test_results_with_other_settings_are_refused(shared, other, message):
    finish(Run("grpo", "grpo", 1), shared)
    with pytest.raises(UserError, match=message):
        read_result(Run("grpo", "grpo", 1), Settings(**(vars(shared) | other)))


def test_results_with_other_configs_and_rates_are_refused(shared, tmp_path):
    finish(Run("grpo", "grpo", 1), shared)
    with pytest.raises(UserError, match=r"learning_rate: stored null, now 0.001"):
        read_result(Run("grpo", "grpo", 1, 1e-3), shared)
    config = tmp_path / "other.yaml"
    config.write_text(Path(shared.configs[0]).read_text().replace("max_epochs: 180", "max_epochs: 7"))
    with pytest.raises(UserError, match=r"config\[0\].trainer.max_epochs: stored 180, now 7"):
        read_result(Run("grpo", "grpo", 1), Settings(**(vars(shared) | {"configs": (str(config),)})))


def test_finished_runs_do_not_start_again(shared):
    runs = [Run("grpo", "grpo", seed) for seed in (1, 2)]
    for run in (*runs, Run("after_sft", None, 1), Run("after_sft", None, 2)):
        finish(run, shared)
    results, failures = run_all(runs, shared, jobs=1)
    assert [(run.label, run.seed) for run in results] == [("after_sft", 1), ("grpo", 1), ("after_sft", 2), ("grpo", 2)]
    assert failures == {}


def test_a_method_waits_for_the_checkpoint_of_its_seed():
    waiting = [Run("grpo", "grpo", 1), Run("egspo", "egspo", 2), Run("after_sft", None, 3)]
    assert ready(waiting, {2}.__contains__) == waiting[1]
    assert ready(waiting, set().__contains__) == waiting[2]
    assert ready(waiting[:1], set().__contains__) is None


def test_is_sft_reads_the_overlay():
    assert Run("sft", "sft", 1).is_sft
    assert not Run("grpo", "grpo", 1).is_sft


def test_steps_per_phase_follow_the_last_config(repository, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {num_minibatches: 3}")
    quickstart = str(repository / "configs" / "quickstart.yaml")
    assert steps_per_phase([quickstart, str(overlay)]) == 2 * 3
    assert steps_per_phase([str(overlay)]) == 3
    assert steps_per_phase([str(overlay)], ["--data.num_minibatches", "5", "--data.num_ppo_epochs=2"]) == 10


def test_unknown_methods_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--methods: no method 'grop'. Did you mean grpo\? Known here: ar, ce_gppo"):
        require_methods(["grpo", "grop"])
    with pytest.raises(UserError, match="grpo given twice"):
        require_methods(["grpo", "grpo"])
    with pytest.raises(UserError, match=r"no method '.*missing.yaml'"):
        require_methods(["grpo", str(tmp_path / "missing.yaml")])
    require_methods(method_names())
    assert len(method_names()) > 10


def test_own_overlays_are_methods(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("model: {gate: OpenGate}")
    require_methods(["grpo", str(own)])
    assert (method_label(str(own)), method_file(str(own))) == ("mine", str(own))
    for name, message in (("grpo", "grpo given twice"), ("after_sft", "after_sft is the name of the SFT checkpoints")):
        other = own.with_stem(name)
        other.write_text("model: {}")
        with pytest.raises(UserError, match=message):
            require_methods(["grpo", str(other)])
    own.write_text("- 1")
    with pytest.raises(UserError, match=r"mine.yaml: a config is a YAML mapping"):
        require_methods(["grpo", str(own)])


def test_a_folder_of_another_comparison_is_refused_whatever_its_methods(shared):
    require_same_comparison(shared)
    finish(Run("after_sft", None, 9), shared)
    finish(Run("rloo", "rloo", 9), shared)
    require_same_comparison(shared)
    with pytest.raises(UserError, match=r"was made with other settings: phases: stored 4, now 5"):
        require_same_comparison(Settings(**(vars(shared) | {"phases": 5})))


def test_progress_of_a_run(shared):
    run = Run("grpo", "grpo", 1)
    assert read_progress(run, shared) == (0, 1)
    run.workspace(shared.output).mkdir(parents=True)
    run.progress_file(shared.output).write_text("[3, 4]")
    assert read_progress(run, shared) == (3, 4)


@pytest.mark.parametrize("text", ["grpo: fast", "grpo: -1.0", "grpo: true", "other: 1.0e-4", "[1]"])
def test_invalid_learning_rates_are_refused(tmp_path, text):
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rates.yaml"):
        read_learning_rates(str(path), ["grpo"])


def test_learning_rates_are_read_from_yaml_and_json(tmp_path):
    for text in ("grpo: 2.0e-4", '{"grpo": 0.0002}'):
        path = tmp_path / "rates"
        path.write_text(text)
        assert read_learning_rates(str(path), ["grpo", "egspo"]) == {"grpo": 2e-4}
    assert read_learning_rates(None, ["grpo"]) == {}


def test_a_failure_has_a_short_message_and_its_traceback_is_printed(tmp_path, capsys):
    def mistaken():
        try:
            raise UserError("data.num_problems must be at least 1, got 0.")
        except UserError as error:
            raise ValueError("Parser key data: ...") from error

    def broken():
        return 1 / 0

    def refusing():
        log.write_text("before\nusage: egspo\nerror: no key\n  called x\n")
        raise SystemExit(2)

    log = tmp_path / "run.log"
    assert attempt(mistaken, log) == "data.num_problems must be at least 1, got 0."
    assert attempt(broken, log) == "ZeroDivisionError: division by zero"
    assert "return 1 / 0" in capsys.readouterr().err
    assert attempt(refusing, log) == "no key called x"
    assert attempt(lambda: None, log) is None
