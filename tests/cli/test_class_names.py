"""Class names in configs and flags: short names of shipped parts, dotted paths of user classes."""

import json
import re
import sys

import pytest
from lightning_utilities.core.imports import RequirementCache

from egspo_lightning import EGSPOModule, PolicyConfig, UserError
from egspo_lightning.cli.main import main
from egspo_lightning.cli.parser import PARTS, class_names, missing_package
from smallest_config import put

QUICKSTART = "--config=configs/quickstart.yaml"
JSONL = {"class_path": "DatasetProblems", "init_args": {"path": "problems.jsonl"}}


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
        "data.engine": ("VLLMServerEngine", {"address": "http://127.0.0.1:8001"}),
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
    {
        "model.gate": ("RandomGate", {"seed": 3}),
        "model.token_weights": ("EntropyGate", {"width": 0.1}),
        "model.surrogate": ("CISPO", {"ratio_max": 4.0}),
        "model.advantage": ("GTPO", {"alpha2": 0.2}),
    },
    {
        "model.gate": ("InverseGate", {}),
        "model.token_weights": ("STEER", {"mapping": "linear"}),
        "model.surrogate": ("GSPO", {"level": "token"}),
        "model.advantage": ("GRPOS", {"beta2": 0.2}),
    },
    {
        "model.gate": ("PositionGate", {"end": "last"}),
        "model.token_weights": ("AdvantageReweighting", {"alpha": 0.3}),
        "model.surrogate": ("SAPO", {"tau_neg": 1.1}),
        "model.advantage": ("HPT", {"gate": 1}),
    },
    {
        "model.token_weights": ("ClipCov", {"lower": 2.0}),
        "model.surrogate": ("CEGPPO", {"beta_low": 0.25}),
        "model.advantage": ("TokenGroupRelative", {}),
    },
    {"model.surrogate": ("KLCov", {"coefficient": 0.5})},
    {"model.surrogate": ("HAPO", {"pivot": 0.7})},
    {"model.surrogate": ("SRFT", {})},
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
    "kind",
    [
        *("Gate", "Attenuation", "TokenWeights", "Surrogate", "Advantage"),
        *("RolloutEngine", "Reward", "DemonstrationSource", "ProblemSource"),
    ],
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


GATES = "AbsoluteGate, InverseGate, OpenGate, PositionGate, QuantileGate"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.gate", "QuantilGate", ["Did you mean QuantileGate?", GATES, "dotted path"]),
        ("model.gate", "Entropic", [GATES]),
        ("model.gate", "egspo_lightning.ops.gate.QuantilGate", ["Did you mean QuantileGate?", GATES]),
        ("model.gate", "egspo_lightning.gates.AbsoluteGate", ["Did you mean AbsoluteGate?", GATES]),
        ("model.advantage", "egspo_lightning.ops.gate.OpenGate", ["GAE, GRPOS, GTPO, GroupRelative, HPT, LeaveOneOut"]),
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


UNFIT = """
from torch import Tensor
from egspo_lightning import Benchmark, DemonstrationSource, Gate

class NoMethod:
    pass

class NoAnnotation:
    def threshold(self, entropies):
        return 0.0

class Misspelt(Gate):
    def treshold(self, entropies):
        return 0.0

class NoLoad(DemonstrationSource):
    pass

class NoRead(Benchmark):
    pass

def one_argument(completions):
    return []

def column_without_default(completions, golds, level):
    return []
"""
NEEDED = "def threshold(self, entropies: egspo_lightning.ops.gate.Entropies) -> torch.Tensor"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.gate", "unfit.NoMethod", ["unfit.NoMethod has no method threshold; it needs: ", NEEDED]),
        ("model.gate", "unfit.NoAnnotation", ["declares def threshold(self, entropies); it needs: ", NEEDED]),
        ("model.gate", "unfit.Misspelt", ["unfit.Misspelt lacks methods: threshold"]),
        ("model.advantage", "unfit.NoMethod", ["has no method estimate", "experience: "]),
        ("data.engine", "unfit.NoMethod", ["has no method stream", "requests: "]),
        ("data.reward", "unfit.one_argument", ["declares def __call__(completions)", "completions: Any, golds: Any"]),
        (
            "data.reward",
            "unfit.column_without_default",
            ["golds: Any, /) -> Any; its further parameters need a default"],
        ),
        ("data.demonstrations", "unfit.NoLoad", ["unfit.NoLoad lacks methods: load"]),
        ("data.benchmarks", [{"class_path": "unfit.NoRead"}], ["unfit.NoRead lacks methods: read"]),
        ("model.gate", {"class_path": "QuantileGate", "init_args": {"top_fractio": 1}}, ["Did you mean top_fraction?"]),
        ("data.problems", {"class_path": "GeneratedProblems", "init_args": {"tsk": 1}}, ["Did you mean task?"]),
        ("model.kl_reward", {"coeficient": 1}, ["Did you mean coefficient?", "estimator, horizon"]),
        ("trainer.logger", "TensorBoardLoger", ["Did you mean TensorBoardLogger?", "CSVLogger", "WandbLogger"]),
        ("trainer.callbacks", [{"class_path": "EarlyStoping"}], ["Did you mean EarlyStopping?", "StageTransition"]),
        ("model.optimizer", "AdmW", ["Did you mean AdamW?", "SGD"]),
    ],
)
def test_error_says_what_a_class_lacks(parser, tmp_path, monkeypatch, capsys, key, value, words):
    (tmp_path / "unfit.py").write_text(UNFIT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["fit", f"--{key}={flag(value)}"])
    sys.modules.pop("unfit", None)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_advantage_without_its_attributes_is_refused():
    class Bare:
        def estimate(self, experience):
            return None

    with pytest.raises(UserError, match=r"model\.advantage Bare has no min_generations and no needs_values"):
        EGSPOModule(PolicyConfig("configs/tiny_model", from_scratch=True), advantage=Bare())


def test_token_weights_and_surrogate_without_their_attributes_are_refused():
    class Bare:
        needs_every_rollout = False

    policy = PolicyConfig("configs/tiny_model", from_scratch=True)
    with pytest.raises(UserError, match=r"model\.token_weights Bare has no each_step and no needs_current_entropies"):
        EGSPOModule(policy, token_weights=Bare())
    with pytest.raises(UserError, match=r"Bare has no needs_current_entropies\. .* from egspo_lightning\.Surrogate"):
        EGSPOModule(policy, surrogate=Bare())


def test_missing_package_is_one_line_with_the_command(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=10000"))
    with pytest.raises(SystemExit):
        main(["fit", QUICKSTART, "--trainer.logger=WandbLogger", f"--trainer.default_root_dir={tmp_path}"])
    errors = [line for line in capsys.readouterr().err.splitlines() if "eed set" not in line]
    assert errors == ["error: the package wandb is missing or too old. Install it: pip install -U wandb"]
    assert "pip install -U mlflow" in missing_package("Requirement 'mlflow>=1.0.0' not met.")


PAGES = {"fit": 250, "validate": 250, "predict": 250, "plan": 25}


@pytest.mark.parametrize("command", PAGES)
def test_help_shows_own_flags_in_groups_on_few_lines(parser, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    subparser = parser._subcommands_action._name_parser_map[command]
    page = subparser.format_help()
    assert page.count("\n") <= PAGES[command]
    flags = re.findall(r"^  --(\w+)\.", page, re.MULTILINE)
    assert not {"trainer", "checkpoint"} & set(flags)
    assert "--help_all" in page
    if command == "plan":
        assert "--num_devices" in page
        assert "--device_gib (80.0)" in page
        assert flags == []
        return
    assert len(flags) > 85
    assert list(dict.fromkeys(flags))[:4] == ["model", "data", "math_benchmark", "stage_transition"]
    assert "  --model.gate (QuantileGate)\n    Gives the entropy threshold tau" in page
    assert "--data.demonstrations (required)" in page


def test_help_all_shows_every_flag(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["fit", "--help_all"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for text in ("--trainer.max_epochs", "--checkpoint.save_top_k", "--model.gate.help", "known subclasses"):
        assert text in page
