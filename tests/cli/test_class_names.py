"""Class names in configs and flags: short names of shipped parts, dotted paths of user classes."""

import json

import pytest

from egspo_lightning.cli.main import EgspoCLI
from egspo_lightning.cli.parser import PARTS, class_names
from smallest_config import put

QUICKSTART = "--config=configs/quickstart.yaml"
JSONL = {"class_path": "DatasetProblems", "init_args": {"path": "problems.jsonl"}}


class BuiltError(Exception):
    """Raised in place of parsing, after the parser has been built."""


@pytest.fixture(scope="module")
def parser():
    """The parser of the command line."""
    built = []

    def stop(self, parser, args):
        built.append(parser)
        raise BuiltError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EgspoCLI, "parse_arguments", stop)
        with pytest.raises(BuiltError):
            EgspoCLI([])
    return built[0]


@pytest.fixture
def parse(parser, repository, monkeypatch):
    """Parses a fit of the quickstart and returns the config as plain dictionaries."""
    monkeypatch.chdir(repository)
    return lambda *arguments: parser.parse_args(["fit", QUICKSTART, *arguments]).fit.as_dict()


def is_class(spec, name):
    """Whether a parsed part has the class of this name."""
    return spec["class_path"] == f"egspo_lightning.{name}"


CONFIGS = [
    {
        "model.gate": ("AbsoluteGate", {"nats": 0.3}),
        "model.attenuation": ("ConstantAttenuation", {"value": 0.1}),
        "model.advantage": ("GroupRelative", {"scale_by_std": False}),
        "data.engine": ("TransformersEngine", {"max_batch_size": 4}),
        "data.reward": ("CorrectnessReward", {"num_workers": 2}),
        "data.demonstrations": ("DatasetDemonstrations", {"path": "rows.jsonl"}),
        "data.problems": ("DatasetProblems", {"path": "rows.jsonl"}),
        "trainer.strategy": ("FSDP2Strategy", {"cpu_offload": True}),
    },
    {
        "model.gate": ("OpenGate", {}),
        "model.attenuation": ("EntropyRatioAttenuation", {}),
        "model.advantage": ("GAE", {"lam": 0.9}),
        "data.engine": ("VLLMEngine", {"max_model_len": 128}),
        "data.reward": ("FormatReward", {}),
    },
    {
        "model.gate": ("QuantileGate", {"top_fraction": 0.5}),
        "model.attenuation": ("ConfidenceAttenuation", {}),
        "model.advantage": ("LeaveOneOut", {}),
        "data.reward": ("SoftLengthPenalty", {"buffer": 4}),
        "data.demonstrations": ("GeneratedDemonstrations", {"num_demonstrations": 3}),
        "data.problems": ("GeneratedProblems", {}),
        "data.problems.init_args.task": ("ExpressionTask", {}),
    },
    {
        "model.advantage": ("ReinforcePlusPlus", {"gamma": 0.9}),
        "data.reward": ("WeightedReward", {"terms": {"form": {"class_path": "egspo_lightning.FormatReward"}}}),
        "data.problems": ("GeneratedProblems", {}),
        "data.problems.init_args.task": ("ArithmeticTask", {"num_digits": 3}),
    },
]
"""Every shipped part once, in as few configs as possible."""


def at(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def flag(value):
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def assert_holds(config, parts):
    for key, (name, arguments) in parts.items():
        assert is_class(at(config, key), name)
        assert {argument: at(config, key)["init_args"][argument] for argument in arguments} == arguments


@pytest.mark.parametrize("parts", CONFIGS)
def test_short_names_in_a_config_file(parse, overlay, parts):
    config = {}
    for key, (name, arguments) in parts.items():
        put(config, key, {"class_path": name, "init_args": dict(arguments)} if arguments or key in NESTED else name)
    assert_holds(parse(overlay(config)), parts)


NESTED = ("data.problems",)  # a later key sets one of its arguments


@pytest.mark.parametrize("parts", CONFIGS)
def test_short_names_on_the_command_line(parse, parts):
    flags = []
    for key, (name, arguments) in parts.items():
        values = {
            argument: json.dumps(value) if isinstance(value, dict) else value for argument, value in arguments.items()
        }
        flags += [f"--{key}={name}", *(f"--{key}.{argument}={value}" for argument, value in values.items())]
    assert_holds(parse(*flags), parts)


@pytest.mark.parametrize(
    "kind", ["Gate", "Attenuation", "Advantage", "RolloutEngine", "Reward", "DemonstrationSource", "ProblemSource"]
)
def test_every_short_name_is_tested(kind):
    tested = {name for parts in CONFIGS for name, _ in parts.values()}
    assert set(class_names(PARTS[kind])) <= tested


TERMS = {"right": {"class_path": "CorrectnessReward"}, "form": "FormatReward"}


def test_short_names_in_nested_parts(parse, overlay):
    """In the terms of a reward, in a list of benchmarks, and in the tasks inside them."""
    generated = {"class_path": "GeneratedBenchmark", "init_args": {"task": "ExpressionTask"}}
    known = {"class_path": "KnownBenchmark", "init_args": {"name": "math500"}}
    config = {
        "data": {
            "reward": {"class_path": "WeightedReward", "init_args": {"terms": TERMS, "weights": {"form": 0.1}}},
            "benchmarks": [generated, known],
            "problems": {"class_path": "GeneratedProblems", "init_args": {"task": "ExpressionTask"}},
        },
        "trainer": {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "loss/sft"}}]},
    }
    data = parse(overlay(config))["data"]
    terms = data["reward"]["init_args"]["terms"]
    assert is_class(data["reward"], "WeightedReward")
    assert is_class(terms["right"], "CorrectnessReward")
    assert is_class(terms["form"], "FormatReward")
    assert [is_class(b, n) for b, n in zip(data["benchmarks"], ["GeneratedBenchmark", "KnownBenchmark"], strict=True)]
    assert is_class(data["benchmarks"][0]["init_args"]["task"], "ExpressionTask")
    assert is_class(data["problems"]["init_args"]["task"], "ExpressionTask")


OWN_GATE = """
from torch import Tensor
from egspo_lightning import Entropies

class Half:
    def threshold(self, entropies: Entropies) -> Tensor:
        return entropies.pooled.new_tensor(0.5)
"""


def test_dotted_path_names_a_class_of_package_or_user(parse, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(OWN_GATE)
    monkeypatch.syspath_prepend(tmp_path)
    model = parse("--model.gate=my_parts.Half", "--model.advantage=egspo_lightning.ops.estimators.GAE")["model"]
    assert model["gate"]["class_path"] == "my_parts.Half"
    assert model["advantage"]["class_path"] == "egspo_lightning.ops.estimators.GAE"
    assert model["advantage"]["init_args"]["lam"] == 0.95


def test_printed_config_parses_to_the_same_config(parse, overlay, tmp_path, capsys):
    reward = {"class_path": "WeightedReward", "init_args": {"terms": TERMS}}
    arguments = [overlay({"data": {"reward": reward, "problems": JSONL}}), "--model.gate=AbsoluteGate"]
    arguments += ["--model.gate.nats=0.3", "--model.objective.mu=ChordMu"]
    with pytest.raises(SystemExit) as stop:
        parse(*arguments, "--print_config")
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config, reparsed = parse(*arguments), parse(f"--config={tmp_path / 'printed.yaml'}")
    del config["config"], reparsed["config"]
    assert reparsed == config


GATES = "AbsoluteGate, OpenGate, QuantileGate"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.gate", "QuantilGate", ["Did you mean QuantileGate?", GATES, "dotted path"]),
        ("model.gate", "Entropic", [GATES]),
        ("model.gate", "egspo_lightning.ops.gate.QuantilGate", ["Did you mean QuantileGate?", GATES]),
        ("model.gate", "egspo_lightning.gates.AbsoluteGate", ["Did you mean AbsoluteGate?", GATES]),
        ("model.advantage", "egspo_lightning.ops.gate.OpenGate", ["GAE, GroupRelative, LeaveOneOut"]),
        ("model.objective.mu", "ChordMy", ["Did you mean ChordMu?"]),
        ("data.engine", "VllmEngine", ["Did you mean VLLMEngine?", "TransformersEngine"]),
        ("data.problems", {"class_path": "GeneratedProblem"}, ["Did you mean GeneratedProblems?", "DatasetProblems"]),
        (
            "data.problems",
            {"class_path": "GeneratedProblems", "init_args": {"task": "ExpressionsTask"}},
            ["Did you mean ExpressionTask?", "ArithmeticTask"],
        ),
        ("data.benchmarks", [{"class_path": "Known"}], ["KnownBenchmark", "GeneratedBenchmark"]),
        (
            "data.reward",
            {"class_path": "WeightedReward", "init_args": {"terms": {"form": {"class_path": "FormatRewar"}}}},
            ["Did you mean FormatReward?", "SoftLengthPenalty"],
        ),
    ],
)
def test_unknown_class_name_error_lists_known_names(parser, monkeypatch, capsys, key, value, words):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["fit", f"--{key}={flag(value)}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert message.count("Known here") == 1
