"""Mistakes in a comparison are answered at its start, and defaults follow the config. No run starts here."""

import json

import pytest
import yaml

from egspo_lightning.cli.comparison import provenance
from egspo_lightning.cli.comparison.compare import _parser, main
from egspo_lightning.cli.comparison.compare_flags import shared_settings
from egspo_lightning.cli.comparison.compared_runs import Run
from egspo_lightning.errors import UserError

CONFIG = ["--config", "configs/quickstart.yaml"]
TWO = [*CONFIG, "--methods", "grpo", "egspo"]


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Settings and number of jobs of a command line, on a machine with eight cores."""
    monkeypatch.setattr("egspo_lightning.cli.comparison.compare_flags.num_cores", lambda: 8)

    def read(*arguments):
        options, flags = _parser().parse_known_args([*arguments, "-o", str(tmp_path / "out")])
        return shared_settings(options, flags), options.jobs

    return read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*CONFIG, "--methods", "grpo"], "--methods: a comparison needs at least two methods, got grpo alone"),
        ([*CONFIG, "--methods", "grpo", "egspoo"], "--methods: no method 'egspoo'. Did you mean egspo[?]"),
        ([*TWO, "grpo"], "--methods: grpo given twice"),
        (["-c", "quikstart.yaml", "--methods", "grpo", "egspo"], "no file quikstart.yaml.*Did you mean quickstart[?]"),
        ([*TWO, "--seeds", "1", "1"], "--seeds: 1 given twice"),
        ([*TWO, "--seeds", "-1"], "--seeds: -1 must be from 0"),
        ([*TWO, "--phases", "0"], "--phases must be at least 1, got 0"),
        ([*TWO, "--seed", "1"], "--seed: no such flag. Did you mean seeds[?] Known here: baseline"),
        ([*TWO, "--trainer.max_epoch", "9"], "Did you mean --trainer.max_epochs[?]"),
        ([*TWO, "--model.gate", "QuantilGate"], "Did you mean QuantileGate[?]"),
        ([*TWO, "--seed_everything=3"], "--seed_everything cannot be given.*Give --seeds"),
        ([*TWO, "--trainer.logger.class_path", "x"], "--trainer.logger.class_path cannot be given"),
        (
            [*TWO, "--model.gate.top_fraction=0.5"],
            "top_fraction would override a value of the method grpo",
        ),
        ([*TWO, "--model.objective", "{}"], "--model.objective would override a value of the method grpo"),
        ([*TWO, "--baseline", "sft"], "--baseline: sft is not among the --methods grpo, egspo"),
        ([*TWO, "--trainer.max_epochs", "40"], "max_epochs = 40 leaves no rollout batch after 40 epochs of SFT"),
        ([*TWO, "-o", "pyproject.toml/out"], "--output: cannot write into pyproject.toml/out"),
    ],
)
def test_mistakes_are_answered_at_the_start(repository, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(repository)
    output = [] if "-o" in arguments else ["-o", str(tmp_path / "out")]
    with pytest.raises(UserError, match=message):
        main([*arguments, *output])
    assert not (tmp_path / "out" / "runs").exists()


def test_a_typo_in_an_own_overlay_names_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {objective: {bta: 1}}")
    with pytest.raises(UserError, match=r"mine.yaml: model.objective.bta: no such key. Did you mean .*beta"):
        main([*CONFIG, "--methods", "grpo", str(tmp_path / "mine.yaml"), "-o", str(tmp_path / "out")])


def test_a_folder_of_another_comparison_is_refused_by_the_names_of_the_settings(settings, tmp_path):
    shared, _ = settings(*TWO, "--num_threads=2")
    path = Run("rloo", "rloo", 7).result_file(shared.output)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"settings": Run("rloo", "rloo", 7).settings(shared)}))
    with pytest.raises(UserError, match=r"evaluate_every: .* flags: .*phases: stored 140, now 9; threads: stored 2"):
        main([*TWO, "--phases", "9", "-o", str(shared.output)])


def test_defaults_are_those_of_the_config(settings):
    shared, jobs = settings(*TWO, "--seeds", "1", "2", "3")
    assert (shared.phases, shared.evaluate_every) == (180 - 40, 14)
    assert (shared.threads, jobs) == (1, 6)  # num_threads of the config; no more jobs than runs
    shared, jobs = settings(*TWO, "--trainer.max_epochs", "45", "--num_threads", "4")
    assert (shared.phases, shared.evaluate_every) == (5, 1)
    assert (shared.threads, jobs) == (4, 2)
    assert shared.flags == ("--trainer.max_epochs", "45", "--num_threads", "4")
    shared, jobs = settings(*TWO, "--phases", "30", "--evaluate_every", "7", "--trainer.accelerator=gpu")
    assert (shared.phases, shared.evaluate_every, shared.threads, jobs) == (30, 7, 1, 1)


def test_phases_must_be_given_where_the_config_leaves_them_open(settings, repository, tmp_path, monkeypatch):
    config = yaml.safe_load((repository / "configs" / "quickstart.yaml").read_text())
    del config["stage_transition"]["after_epochs"], config["num_threads"]
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["--config", str(path), "--methods", "grpo", "egspo", "--jobs", "2"]
    with pytest.raises(UserError, match=r"--phases must be given.*sets no stage_transition.after_epochs"):
        settings(*arguments)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shared, jobs = settings(*arguments, "--phases", "5")
    assert (shared.phases, shared.threads, jobs) == (5, 4, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shared, _ = settings(*arguments, "--phases", "5")
    assert shared.threads == 3


def test_provenance_names_processor_versions_and_revision():
    found = provenance.machine()
    assert set(found) == {"processor", "versions", "revision", "load"}
    assert "torch" in found["versions"]
