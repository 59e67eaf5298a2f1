"""Every command of the README runs: those of this package here, in short form; installation and tests in `.ci/run`."""

import json
import re
import shlex

import pytest

from egspo_lightning.analysis.__main__ import main as analyze
from egspo_lightning.cli.main import main

FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
SHORT = {
    "fit": [
        "--trainer.max_epochs=3",
        "--stage_transition.after_epochs=2",
        "--data.num_problems=2",
        "--data.benchmarks.init_args.limit=4",
    ],
    "plan": [],
    "test": [],
    "predict": [],
}


def commands(repository):
    text = (repository / "README.md").read_text()
    return [line for block in FENCE.findall(text) for line in block.strip().splitlines()]


def parts(repository):
    """Single commands: what stands on either side of ``&&``."""
    return [part.strip() for line in commands(repository) for part in line.split("&&")]


def test_install_and_test_commands_are_those_of_ci(repository):
    ci = (repository / ".ci" / "run").read_text()
    ours = [part for part in parts(repository) if "egspo_lightning" not in part]
    assert ours == [
        'pip install -e ".[notebooks]" -c constraints.txt',
        'pip install -e ".[dev]" -c constraints.txt',
        "pytest",
    ]
    assert 'pip install -e ".[dev]" -c constraints.txt && pytest\n' in ci


def test_nothing_is_left_to_be_filled_in(repository):
    for path in (repository / "README.md", *(repository / "configs").glob("*.yaml")):
        assert not re.search(r"\b(TABLE|WHEN|TIME|TODO|TBD)\b", path.read_text()), path


def test_the_tree_is_true(repository):
    text = (repository / "README.md").read_text()
    tree = text.split("## What is where")[1].split("Read `ops/objective.py`")[0]
    package = {p.name for p in (repository / "egspo_lightning").iterdir() if not p.name.startswith(("_", "py.typed"))}
    named = set(re.findall(r"[\w.]+\.py|\w+/", tree))
    for name in package:
        assert (f"{name}/" if (repository / "egspo_lightning" / name).is_dir() else name) in named, name
    elsewhere = {"configs/", "methods/", "tiny_model/", "docs/", "notebooks/", "benchmarks/", "tests/", "fit/"}
    for name in named - elsewhere - {"egspo_lightning/"}:
        assert list((repository / "egspo_lightning").rglob(name.rstrip("/"))), f"{name} is not there"


def test_the_equation_is_that_of_the_objective(repository):
    text = (repository / "README.md").read_text()
    assert "g_t min( r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t )" in text
    assert (
        "g_t min( r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t )"
        in (repository / "egspo_lightning" / "ops" / "objective.py").read_text()
    )


def test_commands_of_the_package_run(repository, tmp_path, monkeypatch, capsys, shared_data):
    """In the README's order, since later ones use what the first has written."""
    ours = [part for part in parts(repository) if part.startswith("python -m egspo_lightning")]
    assert len(ours) == 9
    monkeypatch.chdir(repository)
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"problem": "12+34=?", "answer": "46"}))
    for command in ours:
        if "--trainer.strategy ddp" in command:
            continue  # two processes: tests/fit/test_ranks.py runs these flags
        command = command.replace("logs/lightning_logs/version_0", f"{tmp_path}/logs/lightning_logs/version_0")
        module, *arguments = shlex.split(command.replace("problems.jsonl", str(problems)))[2:]
        if module == "egspo_lightning.analysis":
            analyze([*arguments[:-1], str(tmp_path / arguments[-1])])
            continue
        short = [] if "gsm8k" in command else SHORT[arguments[0]]
        if "gsm8k" in command:
            short = ["--trainer.max_epochs=2", "--stage_transition.after_epochs=1", "--data.num_problems=1"]
            short += ["--data.demonstrations.init_args.limit=16", "--data.max_completion_length=300"]
            short += ["--math_benchmark.at_start=false", "--data.eval_batch_size=16"]
            short += ["--data.benchmarks.init_args.limit=4", "--data.benchmarks.init_args.max_completion_length=4"]
        main([*arguments, *short, f"--trainer.default_root_dir={tmp_path / 'logs'}"])
    out = capsys.readouterr().out
    assert out.count("after EGSPO") == 4
    assert "<article" in (tmp_path / "completions.html").read_text()
    assert "avg@1" in out
    assert "Answers:" in out


@pytest.mark.parametrize("overlay", ["egspo", "egspo_constant_phi", "egspo_no_mixing", "top_entropy", "grpo", "sft"])
def test_the_table_of_methods_names_each_overlay(repository, overlay):
    assert f"`{overlay}`" in (repository / "README.md").read_text()
    assert (repository / "configs" / "methods" / f"{overlay}.yaml").is_file()
