"""Shipped configs: all parse and build, and shortened recipes run with the tiny model and local data."""

import json
import math

import pytest
import yaml

from egspo_lightning import StageTransition
from egspo_lightning.cli.main import EgspoCLI, run
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.expressions import ExpressionTask
from egspo_lightning.data.tasks.word_problems import WordProblemTask
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation
from egspo_lightning.ops.control_gates import InverseGate, PositionGate, RandomGate
from egspo_lightning.ops.entropy_estimators import GRPOS, GTPO, TokenGroupRelative
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import GAE, GroupRelative, LeaveOneOut, ReinforcePlusPlus
from egspo_lightning.ops.expert_methods import HPT, SRFT
from egspo_lightning.ops.gate import OpenGate, QuantileGate
from egspo_lightning.ops.hapo import HAPO
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.schedules import ChordMu
from egspo_lightning.ops.surrogates import CEGPPO, CISPO, GSPO, SAPO, KLCov
from egspo_lightning.ops.token_weight_methods import STEER, AdvantageReweighting, ClipCov
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward

RECIPES = [
    "quickstart",
    "expressions",
    "long_expressions",
    "smollm2_135m",
    "smollm2_135m_gsm8k",
    "own_data",
    "qwen2.5_1.5b_math",
    "qwen2.5_7b_math",
]


def gated(gate=QuantileGate(0.2), attenuation=ConfidenceAttenuation(), width=0.0):  # noqa: B008
    return EntropyGate(gate, attenuation, width)


EGSPO = {
    "objective": Objective(mu=0.1),
    "token_weights": gated(),
    "surrogate": None,
    "advantage": GroupRelative(),
    "kl_reward": None,
    "entropy_bonus": None,
    "critic": None,
    "has_reference": False,
    "mixes_expert_data": True,
    "expert_fraction": 0.0,
    "max_resampling": 0,
    "reward_weights": {"correctness": 1.0},
    "ends_sft": True,
}
UNGATED = {"token_weights": gated(OpenGate())}
PURE_RL = UNGATED | {"objective": Objective(mu=0.0), "mixes_expert_data": False}
PER_SEQUENCE = PURE_RL | {"objective": Objective(mu=0.0, aggregation="seq-mean-token-mean")}
NO_MIXING = {"objective": Objective(mu=0.0), "mixes_expert_data": False}

METHODS = {
    "sft": {"ends_sft": False},
    "grpo": PURE_RL,
    "ppo": PURE_RL | {"advantage": GAE(), "critic": CriticConfig("shared", warmup_steps=20)},
    "ppo_critic": PURE_RL | {"advantage": GAE(), "critic": CriticConfig("own", warmup_steps=20)},
    "rloo": PURE_RL | {"advantage": LeaveOneOut()},
    "reinforce_plus_plus": PURE_RL
    | {"advantage": ReinforcePlusPlus(), "kl_reward": KLReward(1e-3), "has_reference": True},
    "top_entropy": NO_MIXING | {"token_weights": gated(attenuation=ConstantAttenuation(0.0))},
    "chord_mu": UNGATED | {"objective": Objective(mu=ChordMu(warmup_steps=0, decay_steps=200, peak=0.9, valley=0.05))},
    "chord_phi": UNGATED | {"objective": Objective(mu=0.1, expert_weighting="confidence")},
    "luffy": PURE_RL
    | {
        "objective": Objective(mu=0.0, expert_shaping=0.1),
        "advantage": GroupRelative(scale_by_std=False),
        "expert_fraction": 1.0,
    },
    "dapo": PURE_RL
    | {
        "objective": Objective(mu=0.0, epsilon_low=0.2, epsilon_high=0.28, aggregation="token-mean"),
        "max_resampling": 10,
        "reward_weights": {"correctness": 1.0, "overlong": 0.5},
    },
    "dr_grpo": PURE_RL
    | {
        "objective": Objective(mu=0.0, aggregation="seq-mean-token-sum-norm"),
        "advantage": GroupRelative(scale_by_std=False),
    },
    "cispo": PURE_RL | {"surrogate": CISPO(ratio_max=5.0, ratio_min=0.0)},
    "gspo": PER_SEQUENCE | {"surrogate": GSPO(3e-4, 4e-4, level="sequence")},
    "gspo_token": PER_SEQUENCE | {"surrogate": GSPO(3e-4, 4e-4, level="token")},
    "sapo": PER_SEQUENCE | {"surrogate": SAPO(tau_pos=1.0, tau_neg=1.05)},
    "ce_gppo": PURE_RL | {"surrogate": CEGPPO(0.2, 0.28, beta_low=0.5, beta_high=1.0, dual_clip=10.0)},
    "kl_cov": PURE_RL | {"surrogate": KLCov(fraction=2e-4, coefficient=1.0)},
    "hapo": PURE_RL
    | {"surrogate": HAPO(pivot=0.8, clip_alpha=1.0, advantage_beta=1.0), "advantage": TokenGroupRelative()},
    "clip_cov": NO_MIXING | {"token_weights": ClipCov(fraction=2e-4, lower=1.0, upper=5.0)},
    "steer": NO_MIXING
    | {
        "objective": Objective(mu=0.0, epsilon_high=0.28, dual_clip=10.0),
        "token_weights": STEER(mapping="exponential", weight_min=0.8),
    },
    "ar": NO_MIXING | {"token_weights": AdvantageReweighting(alpha=0.2, negative_weight=1.0)},
    "gtpo": PURE_RL | {"advantage": GTPO(alpha1=1.0, alpha2=0.1)},
    "grpo_s": PER_SEQUENCE | {"advantage": GRPOS(beta1=1.0, beta2=0.1)},
    "dft": {"objective": Objective(mu=0.1, sft_weighting="dft"), "ends_sft": False},
    "srft": UNGATED
    | {
        "objective": Objective(mu=0.5, expert_weighting="srft", expert_shaping=0.1),
        "surrogate": SRFT(),
        "expert_fraction": 1.0,
    },
    "hpt": PURE_RL
    | {
        "objective": Objective(mu=0.0, expert_surrogate="nll"),
        "advantage": HPT(scale_by_std=True, gate=0),
        "expert_fraction": 1.0,
    },
    "egspo": {},
    "egspo_constant_phi": {"token_weights": gated(attenuation=ConstantAttenuation(0.1))},
    "egspo_no_mixing": NO_MIXING,
    "egspo_soft_gate": {"token_weights": gated(width=0.1)},
    "random_gate": {"token_weights": gated(RandomGate())},
    "inverse_gate": {"token_weights": gated(InverseGate())},
    "position_gate": {"token_weights": gated(PositionGate())},
    "egspo_low_branch_nll": {"objective": Objective(mu=0.1, low_branch="nll")},
}
"""For each method overlay, the settings that differ from EGSPO."""

SMALL = [
    "--trainer.max_epochs=3",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--data.demonstrations.init_args.num_demonstrations=16",
    "--data.benchmarks=null",
    "--data.sft_batch_size=8",
    "--data.expert_batch_size=4",
    "--data.num_problems=2",
    "--data.num_generations=4",
    "--data.max_completion_length=40",
    "--stage_transition.after_epochs=1",
    "--hf_export.enabled=false",
    "--token_records.every_n_rollout_batches=0",
]

ON_THIS_MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]


class BuiltError(Exception):
    """Raised in place of running, after everything has been built."""


@pytest.fixture
def build(repository, monkeypatch):
    """Parses arguments and builds trainer, module and datamodule without running them."""
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


def test_recipes_and_methods_list_every_config_file(repository):
    found = {path.stem for path in (repository / "configs").glob("*.yaml")}
    methods = {path.stem for path in (repository / "configs" / "methods").glob("*.yaml")}
    assert found == set(RECIPES)
    assert methods == set(METHODS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build(build, name):
    cli = build(f"--config=configs/{name}.yaml", *ON_THIS_MACHINE)
    assert isinstance(cli.model, EGSPOModule)
    assert isinstance(cli.datamodule, HybridDataModule)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("quickstart", ArithmeticTask()),
        ("expressions", ExpressionTask()),
        ("long_expressions", ExpressionTask(5, names_operations=True)),
        ("smollm2_135m", WordProblemTask(2)),
    ],
)
def test_generated_recipes_use_one_task_for_training_and_benchmarks(build, name, task):
    data = build(f"--config=configs/{name}.yaml").datamodule
    assert data.demonstrations.task == data.problems.task == data.benchmarks[0].task == task
    assert data.benchmarks[0].split == "test"
    longest = max(len(d.solution) for d in data.demonstrations.load())
    assert longest < data.max_completion_length  # leaves room for EOS


@pytest.mark.parametrize("method", METHODS)
def test_method_overlays_set_exactly_the_documented_differences(build, repository, method):
    """Over a real recipe. All other settings equal those of EGSPO."""
    overlay = yaml.safe_load((repository / "configs" / "methods" / f"{method}.yaml").read_text())
    assert set(overlay) <= {"model", "data", "stage_transition"}
    cli = build("--config=configs/qwen2.5_1.5b_math.yaml", f"--config=configs/methods/{method}.yaml", *ON_THIS_MACHINE)
    assert settings(cli) == EGSPO | METHODS[method]
    assert cli.model.method == method
    assert cli.datamodule.num_minibatches == 4


def settings(cli):
    """The settings that define a method: loss, gate, advantage, critic and data mixing."""
    parts = cli.model.advantage_and_gate
    (transition,) = [c for c in cli.trainer.callbacks if isinstance(c, StageTransition)]
    return {
        "objective": parts.objective,
        "token_weights": parts.token_weights,
        "surrogate": cli.model.surrogate,
        "advantage": parts.advantage,
        "kl_reward": parts.kl_reward,
        "entropy_bonus": parts.entropy_bonus,
        "critic": cli.model.critic_config,
        "has_reference": cli.model.has_reference,
        "mixes_expert_data": cli.model.mixes_expert_data,
        "expert_fraction": cli.datamodule.expert_fraction,
        "max_resampling": cli.datamodule.max_resampling,
        "reward_weights": cli.datamodule.reward.weights,
        "ends_sft": transition.enabled,
    }


@pytest.mark.parametrize("method", METHODS)
def test_method_overlays_train_on_quickstart(repository, tmp_path, monkeypatch, small_model, method):
    """Two rollout batches after one epoch of SFT, or three epochs of SFT for method sft."""
    monkeypatch.chdir(repository)
    configs = ["--config=configs/quickstart.yaml", f"--config=configs/methods/{method}.yaml"]
    folders = [f"--trainer.default_root_dir={tmp_path}", f"--model.policy.name_or_path={small_model}"]
    cli = run(["fit", *configs, *SMALL, *folders])
    assert settings(cli) == EGSPO | METHODS[method]
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert all(map(math.isfinite, metrics.values())), metrics
    if method in ("sft", "dft"):
        assert (cli.datamodule.phases.num_passes, cli.datamodule.phases.num_rollout_batches) == (3, 0)
        assert (metrics["loss/sft"] < math.exp(-1)) == (method == "dft")  # -p log p is at most 1 / e
        return
    assert (cli.datamodule.phases.num_passes, cli.datamodule.phases.num_rollout_batches) == (1, 2)
    assert cli.trainer.global_step == 2 + 2 * 4
    assert ("loss/sft" in metrics and metrics["policy/mu"] > 0) == METHODS[method].get("mixes_expert_data", True)
    assert ("loss/value" in metrics) == ("critic" in METHODS[method])
    assert ("rollout/kl" in metrics) == (method == "reinforce_plus_plus")
    assert all(p.isfinite().all() for p in cli.model.parameters())


CHORD_MU = "--config=configs/methods/chord_mu.yaml"
OWN_CRITIC = ["--model.advantage=egspo_lightning.ops.estimators.GAE", "--model.critic.trunk=own"]


def mu_config(value):
    return {"model": {"objective": {"mu": value}}}


def test_mu_number_and_schedule_override_each_other(build, overlay):
    """In config files, in both orders, and on the command line."""
    schedule = METHODS["chord_mu"]["objective"].mu
    quickstart, number = "--config=configs/quickstart.yaml", overlay(mu_config(0.1))
    by_class = overlay(mu_config({"class_path": "egspo_lightning.ops.schedules.ChordMu", "init_args": {"peak": 0.5}}))
    cases = [
        ([CHORD_MU], schedule),
        ([CHORD_MU, number], 0.1),
        ([number, CHORD_MU], schedule),
        ([number, by_class], ChordMu(peak=0.5)),
        ([CHORD_MU, "--model.objective.mu=0.2"], 0.2),
        ([number, "--model.objective.mu=egspo_lightning.ops.schedules.ChordMu"], ChordMu()),
        ([CHORD_MU, "--model.objective.mu.peak=0.7"], ChordMu(0, 200, 0.7, 0.05)),
    ]
    for arguments, expected in cases:
        assert build(quickstart, *arguments).model.objective.mu == expected, arguments


def test_optional_parts_are_enabled_by_one_flag_each(build):
    cli = build(
        "--config=configs/quickstart.yaml",
        *OWN_CRITIC,
        "--model.kl_reward.coefficient=0.01",
        "--model.entropy_bonus.target=0.3",
    )
    assert cli.model.critic_config == CriticConfig("own")
    assert cli.model.advantage_and_gate.kl_reward == KLReward(0.01)
    assert cli.model.advantage_and_gate.entropy_bonus == EntropyBonus(target=0.3)
    assert cli.model.has_reference


def test_null_disables_optional_part_of_an_overlay(build):
    cli = build(
        "--config=configs/quickstart.yaml",
        "--config=configs/methods/reinforce_plus_plus.yaml",
        "--model.kl_reward=null",
    )
    assert cli.model.advantage_and_gate.kl_reward is None
    assert not cli.model.has_reference


@pytest.mark.parametrize(
    "arguments",
    [
        [CHORD_MU],
        [*OWN_CRITIC, "--model.kl_reward.coefficient=0.01", "--model.entropy_bonus.target=0.3"],
    ],
)
def test_printed_config_builds_the_same_settings(build, repository, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(repository)
    arguments = ["--config=configs/quickstart.yaml", *arguments]
    with pytest.raises(SystemExit) as stop:
        EgspoCLI(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = settings(build(f"--config={tmp_path / 'printed.yaml'}"))
    assert printed == settings(build(*arguments))


@pytest.mark.parametrize("name", ["qwen2.5_1.5b_math", "qwen2.5_7b_math"])
def test_real_recipes_run_with_tiny_model_and_local_files(repository, tmp_path, monkeypatch, name):
    """Local files with the same columns replace those of the Hub, read by the same source classes."""
    monkeypatch.chdir(repository)
    rows = [{"problem": f"{i}+1=?", "solution": f"\\boxed{{{i + 1}}}", "answer": str(i + 1)} for i in range(10, 30)]
    for folder, part in (("train", rows[:16]), ("held_out", rows[16:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text("\n".join(map(json.dumps, part)))
    benchmark = tmp_path / "held_out" / "train.jsonl"
    benchmarks = [
        {
            "class_path": "egspo_lightning.evaluation.benchmarks.DatasetBenchmark",
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
            f"--data.demonstrations.init_args.path={tmp_path / 'train'}",
            f"--data.problems.init_args.path={tmp_path / 'train'}",
            f"--data.benchmarks={json.dumps(benchmarks)}",
            "--data.num_problems=2",
            "--data.max_completion_length=16",
        ]
    )
    assert cli.datamodule.phases.num_rollout_batches == 1
    assert cli.trainer.callback_metrics["eval/local/avg@2"] == 0.0
