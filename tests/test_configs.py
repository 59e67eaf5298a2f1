"""Every shipped YAML parses and builds; the recipes run in short form with the tiny model and local data."""

import json

import pytest
import yaml

from egspo_lightning.cli import EgspoCLI, run
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.gate import ConstantAttenuation, OpenGate
from egspo_lightning.tasks.arithmetic import ArithmeticTask
from egspo_lightning.tasks.expressions import ExpressionTask

RECIPES = ["quickstart", "expressions", "gsm8k_tiny", "qwen2.5_1.5b_math", "qwen2.5_7b_math"]
METHODS = ["sft", "grpo", "top_entropy", "egspo", "egspo_constant_phi", "egspo_no_mixing"]

ON_THIS_MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]


class BuiltError(Exception):
    """Everything was built; nothing is run."""


@pytest.fixture
def build(repository, monkeypatch):
    """Parses arguments and builds trainer, module and data, without running them."""
    monkeypatch.chdir(repository)

    def stop(self, subcommand):
        raise BuiltError

    def from_arguments(*arguments):
        built = []
        monkeypatch.setattr(EgspoCLI, "_run_subcommand", stop)
        monkeypatch.setattr(EgspoCLI, "before_instantiate_classes", lambda self: built.append(self))
        with pytest.raises(BuiltError):
            EgspoCLI(["fit", *arguments])
        return built[0]

    return from_arguments


def test_every_file_is_listed_here(repository):
    found = {path.stem for path in (repository / "configs").glob("*.yaml")}
    methods = {path.stem for path in (repository / "configs" / "methods").glob("*.yaml")}
    assert found == set(RECIPES)
    assert methods == set(METHODS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build(build, name):
    cli = build(f"--config=configs/{name}.yaml", *ON_THIS_MACHINE)
    assert isinstance(cli.model, EGSPOModule)
    assert isinstance(cli.datamodule, HybridDataModule)


@pytest.mark.parametrize(("name", "family"), [("quickstart", ArithmeticTask), ("expressions", ExpressionTask)])
def test_recipes_of_generated_tasks_name_one_task_throughout(build, name, family):
    data = build(f"--config=configs/{name}.yaml").datamodule
    assert data.demonstrations.task == data.problems.task == data.benchmarks[0].task == family()
    assert data.benchmarks[0].split == "test"
    longest = max(len(d.solution) for d in data.demonstrations.load())
    assert longest < data.max_completion_length  # and its EOS


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_thin_overlays(build, repository, method):
    cli = build("--config=configs/quickstart.yaml", f"--config=configs/methods/{method}.yaml")
    overlay = yaml.safe_load((repository / "configs" / "methods" / f"{method}.yaml").read_text())
    assert set(overlay) <= {"model", "data", "stage_transition"}
    assert cli.datamodule.num_ppo_epochs == 2  # what the overlay does not name is the quickstart's


def test_overlays_say_what_their_names_say(build):
    def method(name):
        return build("--config=configs/quickstart.yaml", f"--config=configs/methods/{name}.yaml").model

    assert method("grpo").gate == OpenGate()
    assert method("grpo").objective.mu == 0.0
    assert method("top_entropy").attenuation == ConstantAttenuation(0.0)
    assert method("egspo_constant_phi").attenuation == ConstantAttenuation(0.1)
    plain = method("egspo")
    assert (plain.gate.top_fraction, plain.objective.mu) == (0.2, 0.1)


@pytest.mark.parametrize("name", ["qwen2.5_1.5b_math", "qwen2.5_7b_math"])
def test_real_recipes_run_with_the_tiny_model(repository, tmp_path, monkeypatch, name):
    """The hub's files are replaced by local ones of the same columns, read by the same source classes."""
    monkeypatch.chdir(repository)
    rows = [{"problem": f"{i}+1=?", "solution": f"\\boxed{{{i + 1}}}", "answer": str(i + 1)} for i in range(10, 30)]
    for folder, part in (("train", rows[:16]), ("held_out", rows[16:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text("\n".join(map(json.dumps, part)))
    benchmark = tmp_path / "held_out" / "train.jsonl"
    benchmarks = [
        {
            "class_path": "egspo_lightning.evaluation.benchmarks.JsonlBenchmark",
            "init_args": {"name": "local", "path": str(benchmark), "num_samples": 2, "temperature": 1.0, "top_p": 0.95},
        }
    ]
    cli = run(
        [
            "fit",
            f"--config=configs/{name}.yaml",
            *ON_THIS_MACHINE,
            "--trainer.precision=32-true",
            "--trainer.max_epochs=2",
            f"--trainer.default_root_dir={tmp_path}",
            "--model.policy.name_or_path=configs/tiny_model",
            "--model.policy.from_scratch=true",
            f"--data.demonstrations.init_args.name={tmp_path / 'train'}",
            f"--data.problems.init_args.name={tmp_path / 'train'}",
            f"--data.benchmarks={json.dumps(benchmarks)}",
            "--data.num_problems=2",
            "--data.max_completion_length=16",
        ]
    )
    assert cli.datamodule.num_collections == 1
    assert cli.trainer.callback_metrics["eval/local/avg@2"] == 0.0
