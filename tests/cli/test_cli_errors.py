"""User errors in the command line: one message with field, value and allowed values; exit code 2, no traceback."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from egspo_lightning.cli.main import main, run
from smallest_config import Config, put, smallest_config, source

Run = Callable[..., str]


def benchmark(**arguments: Any) -> Config:
    return source("evaluation.benchmarks.GeneratedBenchmark", num_problems=2, **arguments)


@pytest.fixture
def config(small_model: str, tmp_path: Path) -> Config:
    """A valid config, which each case makes invalid."""
    return put(smallest_config(tmp_path, small_model), "trainer.max_epochs", 1)


@pytest.fixture
def error_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line, requires exit code 2, and returns the error message."""
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(config: Config, *arguments: str, subcommand: str = "fit") -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as stop:
            main([subcommand, "--config", str(path), *arguments])
        output = capsys.readouterr()
        assert stop.value.code == 2
        assert "Traceback" not in output.err + output.out
        return output.err

    return run


GAE = {"class_path": "egspo_lightning.ops.estimators.GAE"}
REINFORCE = {"class_path": "egspo_lightning.ops.estimators.ReinforcePlusPlus"}


FORMAT = source("rewards.format.FormatReward")


def weighted(terms: Config, weights: Config | None = None) -> Config:
    return source("rewards.composition.WeightedReward", terms=terms, weights=weights)


def chord_mu(**arguments: Any) -> Config:
    return source("ops.schedules.ChordMu", **arguments)


def test_run_disables_tokenizers_parallelism(monkeypatch):
    """The tokenizers library reads this variable. Its threads would break forked graders."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with pytest.raises(SystemExit):
        run(["--help"])
    assert os.environ.pop("TOKENIZERS_PARALLELISM") == "false"


def test_valid_config_runs(config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    assert "Logs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.num_generation", 4, ["data.num_generation"]),
        ("model.objective.epsilon", 0.2, ["epsilon"]),
        ("trainer.max_epoch", 4, ["trainer.max_epoch"]),
        ("trainers", {"max_epochs": 1}, ["trainers"]),
        ("data.num_problems", "many", ["data.num_problems", "many", "int"]),
        ("data.num_problems", 2.5, ["data.num_problems", "2.5", "int"]),
        ("model.objective.kl_estimator", "k4", ["kl_estimator", "k4", "k3+"]),
        ("model.initial_stage", "rl", ["initial_stage", "rl", "egspo"]),
        ("model.policy.dtype", "int8", ["dtype", "int8", "bfloat16"]),
        ("data.num_generations", 1, ["data.num_generations", "got 1", "at least 2", "model.advantage"]),
        ("data.num_problems", 0, ["data.num_problems", "Count", "0 does not", "v>=1"]),
        ("data.num_minibatches", 5, ["data.num_minibatches", "got 5", "at most 4"]),
        ("data.max_prompt_length", 3, ["max_prompt_length = 3", "none of 8", "shortest prompt has 7"]),
        ("data.max_completion_length", 4, ["max_completion_length = 4", "none of 8", "shortest solution"]),
        ("model.objective.mu", 1.5, ["model.objective.mu", "1.5", "v>=0 and v<=1"]),
        ("model.objective.epsilon_low", 1.0, ["model.objective.epsilon_low", "1.0", "v>=0 and v<1"]),
        ("model.objective.epsilon_high", -0.2, ["model.objective.epsilon_high", "-0.2", "v>=0"]),
        ("model.objective.dual_clip", 1.0, ["model.objective.dual_clip", "1.0", "v>1"]),
        ("model.temperature", 0.0, ["model.temperature", "0.0 does not", "v>0"]),
        (
            "model.gate",
            source("ops.gate.QuantileGate", top_fraction=0.0),
            ["model.gate", "top_fraction", "0.0", "v>0 and v<=1"],
        ),
        ("model.gate", source("ops.gate.QuantilGate"), ["QuantilGate"]),
        ("data.problems", source("data.nothing.Problems"), ["data.problems", "egspo_lightning.data.nothing.Problems"]),
        ("data.engine", source("rollout.transformers_engine.TransformersEngine", max_batch_size=0), ["max_batch_size"]),
        ("model.policy.name_or_path", "./nowhere", ["model.policy.name_or_path", "./nowhere", "not a folder"]),
        ("model.policy.from_scratch", False, ["cannot load the weights", "model.policy.from_scratch: true"]),
        ("data.benchmarks", [benchmark(name="b"), benchmark(name="b")], ["data.benchmarks", "two are named 'b'"]),
        ("data.benchmarks", [benchmark(name="a b")], ["a b", "spaces"]),
        ("trainer.strategy", "ddpp", ["trainer", "ddpp", "ddp_spawn"]),
        ("trainer.accelerator", "abacus", ["trainer", "abacus", "cpu"]),
        ("stage_transition.monitor", "loss/sft", ["stage_transition.monitor", "stage_transition.target", ".patience"]),
        ("stage_transition.target", 0.5, ["stage_transition.target", "stage_transition.monitor"]),
        ("data.prompt.plain", "no place", ["no place", "{problem}", "exactly once"]),
        # Methods
        ("model.advantage", GAE, ["model.advantage GAE needs model.critic", "model.critic.trunk", "shared", "own"]),
        ("model.critic", {"trunk": "own"}, ["model.critic is set", "model.advantage GroupRelative uses no values"]),
        ("model.critic", {"trunk": "mine"}, ["trunk", "mine", "shared", "own"]),
        ("model.critic", {"coefficient": 0.0}, ["model.critic", "coefficient", "0.0", "v>0"]),
        ("model.critic", {"clip": 0.0}, ["model.critic", "clip", "0.0", "v>0"]),
        ("model.critic", {"warmup_steps": -1}, ["model.critic", "warmup_steps", "-1", "v>=0"]),
        ("model.critic", {"learning_rate": 0.0}, ["model.critic", "learning_rate", "0.0", "v>0"]),
        ("model.policy.lora", {"rank": 0}, ["model.policy.lora", "rank", "v>0"]),
        ("model.policy.lora", {"alpha": math.inf}, ["model.policy.lora", "alpha", "v<inf"]),
        (
            "model.critic",
            {"model": {"name_or_path": "other"}},
            ["model.critic.model", "model.critic.trunk is shared", "own"],
        ),
        ("model.advantage", source("ops.estimators.GEA"), ["model.advantage", "GEA"]),
        ("model.advantage", source("ops.gate.OpenGate"), ["model.advantage", "OpenGate"]),
        ("model.attenuation", source("ops.attenuation.ConfidentAttenuation"), ["ConfidentAttenuation"]),
        (
            "model.gate",
            source("ops.gate.QuantileGate", top_fraction=1.01),
            ["model.gate", "top_fraction", "1.01", "v>0 and v<=1"],
        ),
        (
            "model.gate",
            source("ops.gate.QuantileGate", running_decay=0.9, over="sequence"),
            ["QuantileGate.running_decay = 0.9", "QuantileGate.over = sequence", "null", "batch"],
        ),
        ("model.gate", source("ops.gate.AbsoluteGate", nats=math.inf), ["model.gate", "nats", "inf", "v>=0"]),
        ("model.objective.beta", math.inf, ["model.objective.beta", "inf", "v>=0"]),
        (
            "data.reward",
            source("rewards.functions.CorrectnessReward", correct=math.nan),
            ["data.reward.correct", "finite", "got nan"],
        ),
        ("model.objective.mu", -0.1, ["model.objective.mu", "-0.1", "v>=0 and v<=1"]),
        ("model.objective.mu", chord_mu(peak=1.5), ["model.objective.mu", "peak", "1.5", "v>=0 and v<=1"]),
        ("model.objective.mu", chord_mu(warmup_steps=-3), ["model.objective.mu", "warmup_steps", "-3", "v>=0"]),
        ("model.objective.mu", source("ops.schedules.ChordMy"), ["model.objective.mu", "ChordMy"]),
        ("model.objective.low_branch", "sft", ["low_branch", "sft", "ppo", "nll"]),
        (
            "model.objective",
            {"low_branch": "nll", "low_branch_epsilon_low": 0.1},
            ["model.objective.low_branch_epsilon_low", "model.objective.low_branch: nll"],
        ),
        ("model.kl_reward", {"coefficient": 0.0}, ["model.kl_reward", "coefficient", "0.0", "v>0"]),
        ("model.kl_reward", {"estimator": "k3+"}, ["model.kl_reward.estimator", "k3+", "k3"]),
        ("model.kl_reward", {"coeficient": 0.1}, ["coeficient"]),
        ("model.entropy_bonus", {"coefficient": 0.0}, ["model.entropy_bonus.coefficient is 0", ".target is null"]),
        (
            "data.reward",
            source("rewards.length.SoftLengthPenalty", buffer=41),
            ["SoftLengthPenalty.buffer = 41", "data.max_completion_length = 40"],
        ),
        ("data.reward", weighted({}), ["data.reward.terms", "at least one reward"]),
        (
            "data.reward",
            weighted({"format": FORMAT}, {"form": 1.0}),
            ["data.reward.weights: 'form' is no term", "format"],
        ),
        ("data.reward", weighted({"format": FORMAT}, {"format": math.nan}), ["data.reward.weights.format", "got nan"]),
        ("data.reward", weighted({"format": FORMAT}, {"format": "much"}), ["weights", "much", "float"]),
        ("data.reward", weighted({"format": source("ops.gate.OpenGate")}), ["data.reward", "OpenGate", "Reward"]),
        ("data.reward", weighted({"format": source("rewards.format.Format")}), ["rewards.format.Format"]),
        ("data.length_penalty", {"buffer": 4}, ["data.length_penalty"]),  # removed
        ("data.expert_fraction", 1.5, ["data.expert_fraction", "1.5 does not", "v>=0 and v<=1"]),
        ("data.advantage", source("ops.estimators.GroupRelative"), ["data.advantage"]),  # removed
    ],
)
def test_wrong_config_value_is_refused(config, error_of, key, value, words):
    message = error_of(put(config, key, value))
    for word in words:
        assert word in message
    assert len(message) < 3000


def test_a_command_without_arguments_names_the_subcommands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert "\n  fit " in output.err
    assert "\n  plan " in output.err
    assert "Traceback" not in output.err + output.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.num_generation", "4"], ["data.num_generation"]),
        (["--trainer.max_epoch", "4"], ["trainer.max_epoch"]),  # an abbreviation
        (["--data.num_problems", "many"], ["data.num_problems", "many"]),
        (["--model.objective.mu", "2"], ["model.objective.mu", "Given value: 2", "v>=0 and v<=1"]),
        (["stray"], ["stray"]),
    ],
)
def test_wrong_flag_is_refused(config, error_of, arguments, words):
    message = error_of(config, *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"data.max_resampling": 2, "data.num_generations": 1, "model.advantage": REINFORCE},
            ["data.max_resampling = 2", "data.num_generations = 1", "max_resampling to 0"],
        ),
        (
            {"data.expert_fraction": 0.5, "model.advantage": GAE, "model.critic": {"trunk": "shared"}},
            ["data.expert_fraction = 0.5", "model.advantage", "GroupRelative"],
        ),
        (
            {"data.expert_fraction": 1.0, "model.advantage": REINFORCE},
            ["data.expert_fraction = 1.0", "model.advantage", "expert_fraction to 0"],
        ),
        (
            {"data.expert_fraction": 1.0, "data.max_resampling": 1},
            ["data.max_resampling = 1", "data.expert_fraction", "max_resampling to 0"],
        ),
        (
            {"data.expert_fraction": 0.2, "data.num_problems": 2},
            ["data.expert_fraction", "got 0.2", "data.num_problems"],
        ),
        (
            {
                "model.token_weights": source("ops.entropy_gate.EntropyGate", width=0.1),
                "model.gate": source("ops.gate.OpenGate"),
            },
            ["model.token_weights.width", "model.gate OpenGate"],
        ),
        (
            {
                "model.token_weights": source("ops.token_weight_methods.STEER"),
                "model.gate": source("ops.gate.AbsoluteGate", nats=0.1),
            },
            ["model.gate has no effect", "model.token_weights STEER", "to EntropyGate"],
        ),
        (
            {"model.token_weights": source("ops.token_weight_methods.STEER"), "model.objective.low_branch": "nll"},
            ["model.objective.low_branch has no effect", "model.token_weights STEER"],
        ),
        (
            {"model.surrogate": source("ops.surrogates.CISPO"), "model.objective.epsilon_high": 0.28},
            ["model.objective.epsilon_high belongs to PPO's surrogate", "model.surrogate CISPO"],
        ),
        (
            {
                "model.gate": source("ops.gate.AbsoluteGate", nats=0.1),
                "model.token_weights": source(
                    "ops.entropy_gate.EntropyGate", gate=source("ops.gate.QuantileGate", top_fraction=0.1)
                ),
            },
            ["model.gate AbsoluteGate has no effect", "model.token_weights.gate is set"],
        ),
        (
            {
                "model.advantage": source("ops.entropy_estimators.GTPO"),
                "model.kl_reward": {"coefficient": 0.1},
            },
            ["model.kl_reward with model.advantage GTPO", "model.objective.beta"],
        ),
        (
            {
                "model.token_weights": source("ops.entropy_gate.EntropyGate", entropy="current"),
                "model.gate": source("ops.control_gates.RandomGate"),
            },
            ["EntropyGate.entropy = current", "RandomGate", "QuantileGate or AbsoluteGate"],
        ),
        (
            {"model.objective.rescale_weights": True, "model.gate": source("ops.gate.OpenGate")},
            ["model.objective.rescale_weights", "model.gate OpenGate"],
        ),
        (
            {
                "model.objective.low_branch": "nll",
                "model.attenuation": source("ops.attenuation.ConstantAttenuation", value=0.0),
            },
            ["model.objective.low_branch", "model.attenuation ConstantAttenuation", "Raise value"],
        ),
        (
            {"model.objective.expert_weighting": "confidence", "model.objective.mu": 0.0},
            ["model.objective.expert_weighting", "model.objective.mu = 0"],
        ),
        (
            {"model.kl_reward": {"coefficient": 0.1}},
            ["model.kl_reward", "GroupRelative", "model.advantage.scale_by_std", "model.objective.beta"],
        ),
        (
            {"model.initial_stage": "egspo", "stage_transition.enabled": False},
            ["stage_transition.enabled: false", "model.initial_stage: egspo"],
        ),
        (
            {"model.advantage": GAE, "model.critic": {"trunk": "own", "model": {"name_or_path": "./nowhere"}}},
            ["model.critic.model.name_or_path", "./nowhere", "not a folder"],
        ),
        (
            {"data.num_generations": 1, "model.advantage": source("ops.estimators.LeaveOneOut")},
            ["data.num_generations", "got 1", "at least 2", "model.advantage"],
        ),
    ],
)
def test_contradictory_values_are_refused(config, error_of, values, words):
    for key, value in values.items():
        put(config, key, value)
    message = error_of(config)
    for word in words:
        assert word in message


def test_reinforce_runs_with_one_completion_per_problem(config, tmp_path, capsys):
    put(config, "data.num_generations", 1)
    put(config, "model.advantage", REINFORCE)
    put(config, "model.initial_stage", "egspo")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert "Logs:" in capsys.readouterr().out


# Data files


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        (
            "demonstrations",
            ['{"problem": "1+1", "solution": "\\\\boxed{2}"}', '{"problem": '],
            [":2", "not valid JSON"],
        ),
        ("demonstrations", ["[1, 2]"], [":1", "JSON object", "list"]),
        ("demonstrations", ['{"problem": "1+1"}'], [":1", "'solution'", "is missing", "problem"]),
        ("problems", ['{"problem": "1+1", "answer": "2"}', "", '{"problem": "1+2"}'], [":3", "'answer'", "is missing"]),
        ("problems", ['{"problem": "1+1", "answer": ""}'], [":1", "'answer'", "''"]),
        ("benchmarks", ['{"problem": "1+1", "answer": "2"}', '{"problem": "", "answer": 3}'], [":2", "'problem'"]),
    ],
)
def test_invalid_row_is_refused_with_line_number(config, error_of, tmp_path, kind, rows, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    message = error_of(put(config, f"data.{kind}", jsonl(kind, path)))
    for word in [str(path), *words]:
        assert word in message


@pytest.mark.parametrize("kind", ["demonstrations", "problems", "benchmarks"])
def test_missing_data_file_is_refused(config, error_of, tmp_path, kind):
    message = error_of(put(config, f"data.{kind}", jsonl(kind, tmp_path / "nowhere.jsonl")))
    assert f"{tmp_path / 'nowhere.jsonl'}: no such file" in message


def jsonl(kind: str, path: Path) -> Any:
    if kind == "benchmarks":
        return [source("evaluation.benchmarks.DatasetBenchmark", name="rows", path=str(path))]
    return source(f"data.dataset_sources.Dataset{kind.capitalize()}", path=str(path))


@pytest.mark.parametrize("kind", ["problems", "benchmarks"])
def test_too_long_prompt_is_refused_with_its_length(config, error_of, tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "long-one", "problem": "x" * 25, "answer": "2"}) + "\n")
    config = put(config, f"data.{kind}", jsonl(kind, path))
    message = error_of(put(config, "model.initial_stage", "egspo"))
    for word in ("data.max_prompt_length = 16", "'long-one'", "25 tokens"):
        assert word in message


# Models


def test_tokenizer_without_eos_is_refused(config, error_of, small_model, tmp_path):
    folder = tmp_path / "no_eos"
    shutil.copytree(small_model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    message = error_of(put(config, "model.policy.name_or_path", str(folder)))
    for word in ("model.policy.name_or_path", str(folder), "no EOS token", "eos_token"):
        assert word in message


def test_folder_without_a_model_is_refused(config, error_of, tmp_path):
    (tmp_path / "empty").mkdir()
    message = error_of(put(config, "model.policy.name_or_path", str(tmp_path / "empty")))
    assert "model.policy.name_or_path" in message
    assert str(tmp_path / "empty") in message


# Other subcommands and checkpoints


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_validate_and_test_without_benchmarks_are_refused(config, error_of, subcommand):
    message = error_of(config, subcommand=subcommand)
    assert "data.benchmarks must be at least one" in message


def test_unknown_monitored_metric_is_refused(config, error_of):
    config = put(config, "stage_transition", {"monitor": "loss/stf", "target": 0.1})
    message = error_of(config)
    for word in ("stage_transition.monitor", "'loss/stf'", "loss/sft"):
        assert word in message


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_missing_checkpoint_is_refused(config, error_of, subcommand):
    message = error_of(
        put(config, "data.benchmarks", [benchmark()]), "--ckpt_path", "nowhere.ckpt", subcommand=subcommand
    )
    assert "ckpt_path: no such file or folder: nowhere.ckpt" in message


# In a new process


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "egspo_lightning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_process_exits_with_code_2_and_one_message(config, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(put(config, "model.objective.mu", 1.5)))
    done = process("fit", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 2
    for word in ('Parser key "model.objective.mu"', "v>=0 and v<=1", "Given value: 1.5"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_devices=0"], ['Parser key "num_devices"', "PositiveInt", "v>0"]),
        (["--device_gib=0"], ['Parser key "device_gib"', "FinitePositiveFloat", "v>0"]),
        (["--trainer.devices=0"], ["plan.num_devices must be given", "trainer.devices is '0'"]),
    ],
)
def test_plan_without_device_or_memory_is_refused(config, error_of, arguments, words):
    message = error_of(config, *arguments, subcommand="plan")
    for word in words:
        assert word in message


def test_two_method_overlays_are_refused(config, error_of):
    methods = [f"--config=configs/methods/{name}.yaml" for name in ("ppo", "egspo")]
    message = error_of(config, *methods)
    for word in ("configs/methods/ppo.yaml", "configs/methods/egspo.yaml", "are both method overlays", "Give one"):
        assert word in message
