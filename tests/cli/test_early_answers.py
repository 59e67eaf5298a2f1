"""Answers before torch is imported: help, lists and typos. They are never stricter than the parser."""

import importlib.util
import json
import subprocess
import sys
import tomllib

import pytest
import yaml

import egspo_lightning
from egspo_lightning.__main__ import main
from egspo_lightning.cli.early_answers import COMMANDS, answer_early
from egspo_lightning.cli.known_keys import CALLBACKS, SECTIONS, classes_of, find, known_keys
from egspo_lightning.cli.methods import shipped_methods
from egspo_lightning.cli.parser import PARTS, class_names
from egspo_lightning.errors import UserError

QUICKSTART = "--config=configs/quickstart.yaml"


@pytest.fixture
def answer(repository, monkeypatch, capsys):
    """Answers a command line; returns the message of a mistake, or what was printed, or None for a run."""
    monkeypatch.chdir(repository)

    def run(*arguments):
        try:
            answer_early(arguments)
        except UserError as error:
            return str(error)
        except SystemExit:
            return "".join(capsys.readouterr())
        return None

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train"],
            ["no command 'train'", "Did you mean fit?", "methods, plan, predict, replay, report, test, validate"],
        ),
        (["fitt"], ["Did you mean fit?"]),
        (["fit", QUICKSTART, "--trainer.max_epoch", "3"], ["Did you mean --trainer.max_epochs?", "accumulate_grad"]),
        (["fit", QUICKSTART, "--lr=1e-3"], ["--lr: no such key", "Did you mean --model.optimizer.lr?", "data, "]),
        (["fit", "--learning_rate", "1"], ["Did you mean --model.optimizer.lr, ", "--stage_transition.learning_rate?"]),
        (["fit", "--beta", "1"], ["Did you mean --model.objective.beta?"]),
        (["fit", "--model.objective.bta=1"], ["Did you mean --model.objective.beta?", "Known in model.objective: "]),
        (["fit", "--model.critic.trunks=own"], ["Did you mean --model.critic.trunk?"]),
        (["fit", "--checkpoint.save_topk=1"], ["Did you mean --checkpoint.save_top_k?"]),
        (["fit", QUICKSTART, "--model.gate", "QuantilGate"], ["no class QuantilGate", "Did you mean QuantileGate?"]),
        (["fit", "--model.gate.help=QuantilGate"], ["Did you mean QuantileGate?", "AbsoluteGate, InverseGate"]),
        (["plan", "--config=configs/methods/ppoo.yaml"], ["no file configs/methods/ppoo.yaml", "Did you mean ppo?"]),
        (["fit", "-c", "quikstart.yaml"], ["no file quikstart.yaml", "Did you mean quickstart?", "expressions"]),
        (["fit", '--config={"trainer": {"max_epoch": 1}}'], ["Did you mean trainer.max_epochs?"]),
    ],
)
def test_typo_is_answered_with_a_guess_and_the_known_names(answer, arguments, words):
    message = answer(*arguments)
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"trainer": {"max_epoch": 3}}, ["trainer.max_epoch: no such key", "Did you mean trainer.max_epochs?"]),
        ({"modle": {}}, ["modle: no such key", "Did you mean model?"]),
        ({"model.objective.bta": 1}, ["Did you mean model.objective.beta?"]),
        ({"model": {"gate": {"class_path": "QuantilGate"}}}, ["model.gate: no class QuantilGate", "QuantileGate?"]),
        ({"data": {"benchmarks": [{"class_path": "Known"}]}}, ["data.benchmarks: no class Known", "KnownBenchmark"]),
    ],
)
def test_typo_in_a_config_is_answered_with_the_file(answer, tmp_path, config, words):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    message = answer("fit", QUICKSTART, "--config", str(path))
    for word in [f"{path}: ", *words]:
        assert word in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", QUICKSTART, "--model.gate.nats", "0.3", "--data.benchmarks+", "KnownBenchmark"],
        ["fit", "--model.gate=null", "--model.objective.mu=0.5", "--trainer.logger.anything=1", "--print_config"],
        ["fit", "--model.attenuation=smallest_config.Mine", "--model.gate=Mine"],  # imported with the first
        ["fit", "--data.reward=__main__.reward", "--model.gate=Mine"],
        ["fit", "--data.prompt.plain", "--a text: {problem}", "--", "--lr"],
        ["fit", "--config=s3://bucket/run.yaml", "--data.reward.init_args.terms", "{}"],
        ["fit", "--model.gate", "configs/quickstart.yaml", "--model.gate.help", "QuantileGate", "-c", "configs"],
        ["fit", '--config={"$schema": "x", "model": {"gate": {"class_path": "a.B", "init_args": {"c": 1}}}}'],
        ["test", "--ckpt_path", "last", "--verbose=false", "--model.critic.model.lora.rank=4"],
        ["fit", "--help", "--lr=1"],
        ["replay", "nonfinite.ckpt"],
        ["-c", "all.yaml", "fit"],
    ],
)
def test_what_the_parser_may_accept_is_left_to_it(answer, arguments):
    assert answer(*arguments) is None


def test_shipped_configs_are_accepted(answer, repository):
    paths = sorted(repository.glob("configs/**/*.yaml"))
    assert len(paths) > 20
    assert [answer("fit", f"--config={path}") for path in paths] == [None] * len(paths)


def test_keys_and_commands_are_those_of_the_parser(parser):
    """Each key of the parser is known, and each known key is one of the parser."""
    parsers = parser._subcommands_action._name_parser_map
    assert {*parsers, "compare", "example_data", "methods", "report"} == set(COMMANDS)
    options = {flag for name in parsers for action in parsers[name]._actions for flag in action.option_strings}
    flags = {flag.lstrip("-").removesuffix("+") for flag in options if " " not in flag}
    assert {flag for flag in flags - {"c", "h"} if find(flag)[0] is None} == set()
    sections = known_keys().below
    for section in {*SECTIONS, *CALLBACKS} - {"progress"}:  # it has no arguments
        assert section in flags
        for key in sections[section].below or ():
            assert f"{section}.{key}" in flags | {"data.seed"}
    assert {"num_threads", "num_devices", "ckpt_path", "help_all"} <= flags & set(sections)


@pytest.mark.parametrize("key", ["model.gate", "model.attenuation", "model.advantage", "data.reward", "data.engine"])
def test_class_names_are_those_of_the_parser(key):
    kind = find(key)[0].kind
    assert set(classes_of(kind)) == set(class_names(PARTS[kind]))


@pytest.mark.parametrize("key", ["data.demonstrations", "data.problems", "data.benchmarks"])
def test_class_help_lists_the_classes_with_a_line_each(answer, key):
    page = answer("fit", f"--{key}.help", QUICKSTART)
    names = set(class_names(PARTS[find(key)[0].kind]))
    assert len(names) >= 2
    for name in names:
        assert any(line.split()[0] == name and len(line.split()) > 4 for line in page.splitlines())
    assert f"--{key}.help Dataset" in page


def test_methods_lists_each_overlay_with_formula_and_source(answer, repository):
    page = answer("methods")
    methods = shipped_methods()
    assert [method.name for method in methods] == sorted(
        p.stem for p in (repository / "configs/methods").glob("*.yaml")
    )
    for method in methods:
        assert all(method)
        assert all(text in page for text in method)
    assert "arXiv" in json.dumps(methods)


def test_version_help_and_an_empty_command_line(answer):
    assert answer("--version") == f"egspo_lightning {egspo_lightning.__version__}\n"
    assert answer("--help") == answer()
    for command in COMMANDS:
        assert f"\n  {command}" in answer("-h")


WITHOUT_TORCH = """
import sys
from egspo_lightning.__main__ import main
for line in open(0).read().splitlines():
    sys.argv = ["egspo", *line.split()]
    try:
        main()
    except SystemExit as stop:
        print(line, "->", stop.code)
assert not {"torch", "lightning", "jsonargparse"} & set(sys.modules)
"""


def test_typos_and_lists_do_not_import_torch(repository):
    lines = ["train", "fit --config=configs/quickstart.yaml --lr=1", "methods", "fit --model.gate.help", "--version"]
    lines += ["fit --model.gate=QuantilGate", "fit --config=configs/methods/ppoo.yaml"]
    lines += ["compare --help", "compare --config=configs/quickstart.yaml --methods grpo egspoo"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join(lines),
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = [line.rpartition("-> ")[2] for line in done.stdout.splitlines() if "-> " in line]
    assert codes == ["2", "2", "0", "0", "0", "2", "2", "0", "2"]
    assert done.stderr.count("error: ") == 5


def test_pages_of_a_run_are_ignored_by_git_and_notebooks_have_widgets(repository):
    assert {"completions.html", "report.html"} <= set((repository / ".gitignore").read_text().splitlines())
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("ipywidgets") for line in extras["notebooks"])
    assert "\nipywidgets==" in (repository / "constraints.txt").read_text()


def test_modules_in_the_working_folder_are_found(tmp_path, monkeypatch):
    """As with ``python -m``; the command's own folder is first in sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "argv", ["egspo", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert sys.path[0] == str(tmp_path)


def test_modules_beside_a_config_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_config.py").write_text("class Gate: ...\n")
    (tmp_path / "mine.yaml").write_text("model: {gate: beside_the_config.Gate}\n")
    answer_early(["fit", f"--config={tmp_path / 'mine.yaml'}"])
    assert importlib.util.find_spec("beside_the_config").origin == str(tmp_path / "beside_the_config.py")
