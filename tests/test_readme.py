"""README: every command and the Python example run; length, tree, table and picture are correct.

Installation and tests run in `.ci/run`.
"""

import re
import shlex
import subprocess
import sys

import pytest

from egspo_lightning.cli.example_data import write_example_data
from egspo_lightning.cli.main import main
from egspo_lightning.cli.report_command import write_report
from make_diagram import FILE, drawing

FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
SHORT = {
    "fit": [
        "--trainer.max_epochs=3",
        "--stage_transition.after_epochs=2",
        "--data.num_problems=2",
        "--data.benchmarks.init_args.limit=4",
    ],
    "test": [],
}
OWN_DATA = [
    "--trainer.max_epochs=2",
    "--stage_transition.after_epochs=1",
    "--data.num_problems=1",
    "--data.demonstrations.init_args.limit=16",
    "--data.max_completion_length=300",
    "--math_benchmark.at_start=false",
    "--data.eval_batch_size=16",
    "--data.benchmarks.init_args.limit=4",
    "--data.benchmarks.init_args.max_completion_length=4",
]


def commands(repository):
    text = (repository / "README.md").read_text()
    return [line for block in FENCE.findall(text) for line in block.strip().splitlines()]


def parts(repository):
    """Single commands, split at ``&&``."""
    return [part.strip() for line in commands(repository) for part in line.split("&&")]


def test_install_and_test_commands_match_ci(repository):
    ci = (repository / ".ci" / "run").read_text()
    ours = [part for part in parts(repository) if "egspo_lightning" not in part]
    assert ours == ['pip install -e ".[notebooks]" -c constraints.txt']
    tests = 'pip install -e ".[dev]" -c constraints.txt && pytest'
    assert f"`{tests}`" in (repository / "README.md").read_text()
    assert f"{tests}\n" in ci


def test_readme_has_at_most_1500_words(repository):
    assert len((repository / "README.md").read_text().split()) <= 1500


def test_diagram_equals_output_of_its_script():
    assert FILE.read_text(encoding="utf-8") == drawing()


def test_readme_and_configs_have_no_placeholders(repository):
    for path in (repository / "README.md", *(repository / "configs").glob("*.yaml")):
        assert not re.search(r"\b(TABLE|WHEN|TIME|TODO|TBD)\b", path.read_text()), path


def test_readme_tree_matches_the_package(repository):
    text = (repository / "README.md").read_text()
    tree = text.split("## Repository layout")[1].split("## Limitations")[0]
    package = {p.name for p in (repository / "egspo_lightning").iterdir() if not p.name.startswith(("_", "py.typed"))}
    named = set(re.findall(r"[\w.]+\.py|\w+/", tree))
    for name in package:
        assert (f"{name}/" if (repository / "egspo_lightning" / name).is_dir() else name) in named, name
    elsewhere = {"configs/", "methods/", "tiny_model/", "docs/", "notebooks/", "benchmarks/", "tests/", "fit/"}
    for name in named - elsewhere - {"egspo_lightning/"}:
        assert list((repository / "egspo_lightning").rglob(name.rstrip("/"))), f"{name} is not there"


def test_readme_equation_matches_the_objective(repository):
    text = (repository / "README.md").read_text()
    assert "g_t min( r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t )" in text
    assert (
        "g_t min( r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t )"
        in (repository / "egspo_lightning" / "ops" / "objective.py").read_text()
    )


@pytest.mark.slow
def test_readme_commands_run_in_order(repository, tmp_path, monkeypatch, capsys):
    """In the README's order, since later commands read the logs of the first."""
    ours = [part for part in parts(repository) if part.startswith("python -m egspo_lightning")]
    assert len(ours) == 7
    (tmp_path / "configs").symlink_to(repository / "configs")  # a clone has no data files
    monkeypatch.chdir(tmp_path)
    for command in ours:
        command = command.replace("logs/lightning_logs/version_0", f"{tmp_path}/logs/lightning_logs/version_0")
        arguments = shlex.split(command)[3:]
        if arguments[0] == "report":
            write_report([*arguments[1:-1], str(tmp_path / arguments[-1])], "")
            continue
        if arguments[0] == "example_data":
            write_example_data(arguments[1:])
            continue
        short = OWN_DATA if "own_data" in command else SHORT[arguments[0]]
        main([*arguments, *short, f"--trainer.default_root_dir={tmp_path / 'logs'}"])
    out = capsys.readouterr().out
    assert (out.count("after EGSPO"), out.count("after GRPO")) == (3, 1)
    assert "after SFT" in (tmp_path / "report.html").read_text()
    assert "avg@1" in out


@pytest.mark.slow
def test_readme_python_example_runs(repository, tmp_path):
    """In a new process with the repository as working folder."""
    (example,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 12
    example = example.replace("Trainer(", f"Trainer(default_root_dir={str(tmp_path)!r}, enable_progress_bar=False, ")
    command = [sys.executable, "-c", example]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "rollout/reward_mean" in ended.stdout
    assert "Stage sft -> egspo" in ended.stdout
    for word in ("Tip", "across ranks is zero", "logging interval", "weights_only", "UserWarning"):
        assert word not in ended.stderr


@pytest.mark.parametrize("overlay", ["egspo", "egspo_constant_phi", "egspo_no_mixing", "top_entropy", "grpo", "sft"])
def test_methods_guide_names_each_overlay(repository, overlay):
    assert f"`{overlay}`" in (repository / "docs" / "guides" / "methods.md").read_text()
    assert (repository / "configs" / "methods" / f"{overlay}.yaml").is_file()
