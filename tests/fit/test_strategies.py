"""One process, DDP and FSDP2 compute the same optimizer steps and resume from each other's checkpoints."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from architectures import tiny_config
from egspo_lightning.models.lora import is_adapter
from egspo_lightning.training.fsdp2_strategy import AnyCheckpointIO
from processes import SHORT_QUICKSTART, compare_metrics

DDP = ["--trainer.strategy=ddp", "--trainer.devices=2"]
FSDP2 = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]
TO_FILE = [
    "--trainer.strategy=egspo_lightning.training.fsdp2_strategy.FSDP2Strategy",
    "--trainer.strategy.save_distributed_checkpoint=false",
    "--trainer.devices=2",
]
OFFLOADED = [
    "--trainer.strategy=egspo_lightning.training.fsdp2_strategy.FSDP2Strategy",
    "--trainer.strategy.cpu_offload=true",
    "--trainer.devices=2",
]
TEN = ["--trainer.max_epochs=11"]


def norms_of(folder, kind):
    lines = [json.loads(line) for line in (folder / "norms.jsonl").read_text().splitlines()]
    return [line["norm"] for line in lines if line["kind"] == kind]


pytestmark = pytest.mark.slow  # tests/fit/test_ranks.py has the fast tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def alone(run_ranks, folder):
    return run_ranks(folder, {"alone": TEN}, num_ranks=1)["alone"]


@pytest.fixture(scope="module")
def ranks(run_ranks, folder):
    runs = {"ddp": [*TEN, *DDP], "fsdp2": [*TEN, *FSDP2], "to_file": [*TEN, *TO_FILE]}
    runs["fsdp"] = [*TEN, "--trainer.strategy=fsdp", "--trainer.devices=2"]
    return run_ranks(folder, runs)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_first_optimizer_step_equals_that_of_one_process(alone, ranks, folder, strategy):
    """Loss, and gradient norm before and after clipping."""
    first, other = (next(row for row in rows if row["loss/total"]) for rows in (alone, ranks[strategy]))
    assert float(other["loss/total"]) == pytest.approx(float(first["loss/total"]), rel=1e-5)
    for kind in ("norm", "clipped"):
        mine, theirs = norms_of(folder / strategy, kind), norms_of(folder / "alone", kind)
        assert len(mine) == len(theirs) == 2 + 10 * 4
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert norms_of(folder / strategy, "norm")[0] > 1.1 > norms_of(folder / strategy, "clipped")[0]


def test_the_name_fsdp_trains_as_fsdp2(ranks):
    losses = [[row["loss/total"] for row in ranks[name] if row["loss/total"]] for name in ("fsdp", "fsdp2")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1 + 10


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rewards_of_ten_rollout_batches_equal_those_of_one_process(alone, ranks, strategy):
    rewards = [
        [row["rollout/reward_mean"] for row in rows if row.get("rollout/reward_mean")]
        for rows in (alone, ranks[strategy])
    ]
    assert len(rewards[0]) == 10
    assert len(set(rewards[0])) > 5
    assert [float(value) for value in rewards[1]] == pytest.approx([float(value) for value in rewards[0]], abs=1e-6)


# Checkpoints

ON = ["--trainer.max_epochs=5"]
"""Resume after the third phase, which has rollouts, so that the optimizer has moments."""


def at(folder, name, checkpoint="checkpoints/epoch=2.ckpt"):
    return f"--ckpt_path={folder / name / 'lightning_logs' / 'version_0' / checkpoint}"


@pytest.fixture(scope="module")
def resumed(run_ranks, ranks, alone, folder):
    """Rows of runs that resume from checkpoints of another strategy."""
    sharded = {
        "ddp_to_fsdp2": [*ON, *FSDP2, at(folder, "ddp")],
        "alone_to_fsdp2": [*ON, *FSDP2, at(folder, "alone")],
        "file_to_fsdp2": [*ON, *FSDP2, at(folder, "to_file")],
        "fsdp2_to_fsdp2": [*ON, *FSDP2, at(folder, "fsdp2")],
        "entry_to_fsdp2": [*ON, *FSDP2, at(folder, "ddp", "sft.ckpt")],
        "own_entry_to_fsdp2": [*ON, *FSDP2, at(folder, "fsdp2", "sft.ckpt")],
        "phase_to_fsdp2": [*ON, *FSDP2, at(folder, "fsdp2", "checkpoints/epoch=0.ckpt")],
    }
    whole = {
        "fsdp2_to_ddp": [*ON, *DDP, at(folder, "fsdp2")],
        "file_to_ddp": [*ON, *DDP, at(folder, "to_file")],
        "entry_to_ddp": [*ON, *DDP, at(folder, "fsdp2", "sft.ckpt")],
    }
    return run_ranks(folder, sharded) | run_ranks(folder, whole)


RESUMED = ["ddp_to_fsdp2", "alone_to_fsdp2", "file_to_fsdp2", "fsdp2_to_fsdp2", "fsdp2_to_ddp", "file_to_ddp"]
ENTERED = ["entry_to_fsdp2", "own_entry_to_fsdp2", "phase_to_fsdp2", "entry_to_ddp"]


@pytest.mark.parametrize(("name", "done"), [(n, 3) for n in RESUMED] + [(n, 1) for n in ENTERED])
def test_resuming_under_another_strategy_equals_one_process(alone, resumed, name, done):
    assert compare_metrics(resumed[name], alone[done:5]) > 30


def test_cpu_offload_does_not_change_losses(ranks, run_ranks, folder):
    """Without a GPU this covers the code path only; the runs resume from shards and from a file."""
    begun = run_ranks(folder, {"offloaded": [*ON, *OFFLOADED]})["offloaded"]
    file = [*OFFLOADED, "--trainer.strategy.save_distributed_checkpoint=false"]
    on = {
        "offloaded_to_file": [*ON, *file, at(folder, "offloaded")],
        "file_to_offloaded": [*ON, *OFFLOADED, at(folder, "to_file")],
        "offloaded_to_ddp": [*ON, *DDP, at(folder, "offloaded_to_file", "checkpoints/epoch=3.ckpt")],
    }
    rows, losses = run_ranks(folder, on), [float(row["loss/total"]) for row in ranks["fsdp2"][:5]]
    assert [float(row["loss/total"]) for row in begun] == pytest.approx(losses, abs=1e-6)
    for name, done in (("offloaded_to_file", 3), ("file_to_offloaded", 3), ("offloaded_to_ddp", 4)):
        assert [float(row["loss/total"]) for row in rows[name]] == pytest.approx(losses[done:], abs=1e-6), name


def test_checkpoints_are_files_or_folders_as_configured(ranks, folder):
    for name, is_folder in (("ddp", False), ("fsdp2", True), ("to_file", False)):
        path = folder / name / "lightning_logs" / "version_0" / "checkpoints" / "epoch=2.ckpt"
        assert path.exists()
        assert path.is_dir() == is_folder


WHOLE_METHOD = [
    "--trainer.max_epochs=5",
    "--config=configs/methods/ppo.yaml",
    "--model.critic.warmup_steps=1",
    "--model.objective.beta=0.01",
    "--trainer.accumulate_grad_batches=2",
]
"""Flags of a run with reference policy and value head."""


def test_reference_and_value_head_are_sharded_and_resumed(run_ranks, folder):
    one = run_ranks(folder, {"ppo_alone": WHOLE_METHOD}, num_ranks=1)["ppo_alone"]
    assert any(float(row.get("loss/kl") or 0) > 0 for row in one)
    began = {"ppo_fsdp2": [*WHOLE_METHOD, *FSDP2], "ppo_to_file": [*WHOLE_METHOD, *TO_FILE]}
    for rows in run_ranks(folder, began).values():
        assert compare_metrics(rows, one) > 50
    on = {f"{name}_on": [*WHOLE_METHOD, *DDP, at(folder, name)] for name in began}
    on |= {"ppo_alone_on": [*WHOLE_METHOD, *FSDP2, at(folder, "ppo_alone")]}
    for rows in run_ranks(folder, on).values():
        assert compare_metrics(rows, one[3:]) > 30


@pytest.fixture(scope="module")
def with_adapters(folder, repository):
    """Arguments of runs with adapters, for a tied model and for one with fused experts, both with saved weights."""
    tiny_model = repository / "configs" / "tiny_model"
    common = ["--model.policy.from_scratch=false", "--model.policy.lora.rank=4", "--model.objective.beta=0.01", *ON]
    common += ["--model.gate=egspo_lightning.ops.gate.OpenGate"]  # rounding could move a token across a threshold
    common += ["--model.optimizer.init_args.eps=1e-3"]  # Adam would make a step of the learning rate of rounding alone
    configs = {"lm": AutoConfig.from_pretrained(tiny_model), "moe": tiny_config("qwen3_moe")}
    for name, config in configs.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / name)
    return {name: [f"--model.policy.name_or_path={folder / name}", *common] for name in configs}


def test_lora_trains_alike_and_checkpoints_hold_adapters_only(run_ranks, folder, with_adapters):
    """With a reference policy; also, a sharded sft.ckpt starts a run that adds the reference.

    Adapters of a tied embedding, of linear layers, and of fused experts.
    """
    lora = [*with_adapters["lm"], "--model.policy.lora.target_modules=[embed_tokens,q_proj,v_proj,down_proj]"]
    alone = run_ranks(folder, {"lora_alone": lora, "moe_alone": with_adapters["moe"]}, num_ranks=1)
    one = alone["lora_alone"]
    on = {
        "moe_fsdp2": [*with_adapters["moe"], *FSDP2],
        "lora_fsdp2": [*lora, *FSDP2],
        "lora_fsdp2_on": [*lora, *FSDP2, at(folder, "lora_fsdp2")],
        "lora_alone_on": [*lora, *FSDP2, at(folder, "lora_alone")],
        "lora_fsdp2_without": [*lora, "--model.objective.beta=0", *FSDP2],
        "lora_with_again": [*lora, *FSDP2, at(folder, "lora_fsdp2_without", "sft.ckpt")],
    }
    rows = run_ranks(folder, on)
    assert compare_metrics(rows["moe_fsdp2"], alone["moe_alone"]) > 50
    assert compare_metrics(rows["lora_fsdp2"], one) > 50
    for name in ("lora_fsdp2_on", "lora_alone_on"):
        assert compare_metrics(rows[name], one[3:]) > 30
    assert compare_metrics(rows["lora_with_again"], one[1:]) > 30
    weights = AnyCheckpointIO().load_checkpoint(at(folder, "lora_fsdp2").split("=", 1)[1])["state_dict"]
    assert weights
    assert all(is_adapter(name) for name in weights)
    _check_without_sft(run_ranks, folder, [*lora, "--model.initial_stage=egspo"])


def _check_without_sft(run_ranks, folder, base):
    """The reference is the base model."""
    one = run_ranks(folder, {"base_alone": base}, num_ranks=1)["base_alone"]
    assert float(one[-1]["loss/kl"]) > 0
    on = {
        "base_fsdp2": [*base, *FSDP2],
        "base_fsdp2_on": [*base, *FSDP2, at(folder, "base_fsdp2")],
        "base_alone_on": [*base, *FSDP2, at(folder, "base_alone")],
    }
    rows = run_ranks(folder, on)
    assert compare_metrics(rows["base_fsdp2"], one) > 50
    for name in ("base_fsdp2_on", "base_alone_on"):
        assert compare_metrics(rows[name], one[3:]) > 30


def test_mixed_precision_keeps_float32_weights(run_ranks, folder):
    """The loss equals that of autocast up to rounding."""
    mixed = ["--trainer.max_epochs=3", "--trainer.precision=bf16-mixed"]
    half = ["--trainer.max_epochs=3", "--model.policy.dtype=bfloat16", "--model.optimizer.init_args.lr=1e-6"]
    half += ["--stage_transition.learning_rate=1e-6"]
    rows = run_ranks(folder, {"mixed_ddp": [*mixed, *DDP], "mixed": [*mixed, *FSDP2], "half": [*half, *FSDP2]})
    del rows["half"]
    _check_unmoved_weights(*(at(folder, name).split("=", 1)[1] for name in ("half", "mixed")))
    mine, theirs = (next(float(row["loss/sft"]) for row in rows[run] if row.get("loss/sft")) for run in rows)
    assert mine == pytest.approx(theirs, rel=0.01)
    assert mine != theirs
    weights = AnyCheckpointIO().load_checkpoint(folder / "mixed/lightning_logs/version_0/checkpoints/epoch=1.ckpt")
    assert {value.dtype for value in weights["state_dict"].values()} == {torch.float32}


def _check_unmoved_weights(half, mixed):
    """The guard measures this rank's shards of bfloat16 weights, and no float32 weights."""
    guards, others = (AnyCheckpointIO().load_checkpoint(path)["callbacks"]["Guards"] for path in (half, mixed))
    assert guards["moved_fractions"].keys() == {"sft", "egspo"}
    assert all(0 < share < 0.1 for share in guards["moved_fractions"].values())
    assert "unmoved_weights" in guards["spoken"]
    assert others["moved_fractions"] == {}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_equal_one_process(run_ranks, alone, folder, strategy):
    """Two torchrun agents with one process each."""
    nodes = ["--trainer.max_epochs=3", "--trainer.num_nodes=2", "--trainer.devices=1", f"--trainer.strategy={strategy}"]
    name = f"nodes_{strategy}"
    rows = run_ranks(folder, {name: nodes}, num_nodes=2)[name]
    assert compare_metrics(rows, alone[:3]) > 40


def test_a_short_quickstart_learns_under_fsdp2(run_ranks, folder):
    """The exported model equals the last checkpoint."""
    quickstart = [*SHORT_QUICKSTART, "--trainer.accumulate_grad_batches=1", "--hf_export.enabled=true"]
    rows = run_ranks(folder, {"quickstart": [*quickstart, *FSDP2]})["quickstart"]
    accuracy = [float(row["eval/arithmetic/avg@1"]) for row in rows if row.get("eval/arithmetic/avg@1")]
    assert accuracy[0] < 0.05 < accuracy[1] + 0.08 < accuracy[2]
    log = folder / "quickstart" / "lightning_logs" / "version_0"
    exported = AutoModelForCausalLM.from_pretrained(log / "hf").state_dict()
    weights = AnyCheckpointIO().load_checkpoint(log / "checkpoints" / "last.ckpt")["state_dict"]
    assert torch.equal(exported["model.norm.weight"], weights["policy.lm.model.norm.weight"])
    for name, value in exported.items():
        assert torch.equal(value, weights[f"policy.lm.{name}"]), name
