"""Memory plan compared with the allocations of real runs on the CPU, measured by PyTorch's profiler."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from allocations import peak_bytes

from architectures import tiny_config
from egspo_lightning.cli.main import main
from egspo_lightning.cli.plan import workload
from egspo_lightning.models import batched_forward
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.ops.objective import Objective
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.training.memory_plan import Workload, plan

PROMPT, COMPLETION = 5, 43  # "3+4=?", and the limit that a random policy always reaches


@pytest.fixture(scope="session")
def wide_model(repository, tmp_path_factory) -> str:
    """A model of 5 M parameters with a vocabulary so large that EOS is almost never sampled."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    shutil.copytree(repository / "configs" / "tiny_model", folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 8192}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    return str(folder)


CASES = {
    "plain": ({}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "lora": ({"lora": LoraConfig(rank=8)}, {}),
    "lora and its base": ({"lora": LoraConfig(rank=8)}, {"objective": Objective(beta=0.01)}),
    "reference": ({}, {"objective": Objective(beta=0.01)}),
    "critic": ({}, {"critic": CriticConfig("own"), "advantage": GAE()}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "accumulate", "max_tokens"),
    [
        ("plain", 1, None),
        ("plain", 4, None),
        ("checkpointing", 4, None),
        ("lora", 1, None),
        ("lora and its base", 1, None),
        ("reference", 4, None),
        ("critic", 1, None),
        ("plain", 1, 500),
        ("critic", 1, 870),  # two micro-batches, the larger of 864 tokens
    ],
)
def test_planned_peak_is_within_15_percent_of_a_run(tiny_run, wide_model, monkeypatch, case, accumulate, max_tokens):
    """The plan counts the prompt of each completion; passes in which prompts stand once need less."""
    monkeypatch.setattr(batched_forward, "keeps_states_with_shared_prompts", lambda lm: False)
    policy_arguments, module_arguments = CASES[case]
    policy = PolicyConfig(wide_model, from_scratch=True, **policy_arguments)
    data = {"num_generations": 8, "max_prompt_length": PROMPT, "max_completion_length": COMPLETION}
    data |= {"num_minibatches": 1, "num_ppo_epochs": 2, "expert_batch_size": 8}  # the second optimizer step has moments
    data["max_tokens_per_micro_batch"] = max_tokens
    run = tiny_run(
        module={"policy": policy, "initial_stage": "egspo"} | module_arguments,
        data=data,
        trainer={"max_epochs": 1, "accumulate_grad_batches": accumulate},
    )
    measured = peak_bytes(run.fit)
    scores = not run.module.takes_sampled_statistics
    work = Workload(
        policy=policy,
        critic=module_arguments.get("critic"),
        holds_reference=run.module.has_reference,
        optimizer=torch.optim.AdamW,
        is_sharded=False,
        is_bfloat16=False,
        prompt_length=PROMPT,
        completion_length=COMPLETION,
        sampled_rows=32,
        scored_tokens=32 * (PROMPT + COMPLETION) if scores else 0,
        update_rows=32 // accumulate,
        expert_rows=8 // accumulate,
        sft_rows=0,
        num_parts=accumulate if max_tokens is None else 2,
        max_tokens=max_tokens,
    )
    memory = plan(work, 1)
    assert memory.peak == pytest.approx(measured, rel=0.15)


def test_plan_command_reads_fit_config_and_reports_whether_it_fits(repository, monkeypatch, capsys):
    """With devices that this machine lacks."""
    monkeypatch.chdir(repository)
    config = ["--config=configs/quickstart.yaml", "--trainer.accelerator=gpu", "--trainer.strategy=fsdp2"]
    main(["plan", *config, "--trainer.devices=8", "--device_gib=0.001"])
    out = capsys.readouterr().out
    assert "one device of 8" in out
    assert "does not fit in 0.001 GiB" in out
    main(["plan", *config, "--num_devices=2"])
    out = capsys.readouterr().out
    assert "fits in 80 GiB" in out
    assert "host" not in out
    strategy = "--trainer.strategy=egspo_lightning.training.fsdp2_strategy.FSDP2Strategy"
    main(["plan", *config[:2], strategy, "--trainer.strategy.cpu_offload=true", "--num_devices=2"])
    assert "In the host's memory, for each device: 0.002 GiB" in capsys.readouterr().out  # 16 bytes a weight / 2


def sharded(model: str) -> Workload:
    """A small workload on several devices."""
    return Workload(
        policy=PolicyConfig(model, from_scratch=True),
        critic=None,
        holds_reference=False,
        optimizer=torch.optim.AdamW,
        is_sharded=True,
        is_bfloat16=False,
        prompt_length=PROMPT,
        completion_length=COMPLETION,
        sampled_rows=4,
        scored_tokens=0,
        update_rows=4,
        expert_rows=0,
        sft_rows=0,
        num_parts=1,
    )


def test_plan_divides_sharded_memory_and_counts_gathered_weights(wide_model):
    work = replace(sharded(wide_model), holds_reference=True)
    whole, half = plan(replace(work, is_sharded=False), 2), plan(work, 2)
    size = 4 * sum(p.numel() for p in PolicyConfig(wide_model, from_scratch=True).build().parameters())
    assert whole.weights == whole.reference == whole.gradients == size
    assert whole.optimizer == pytest.approx(2 * size, rel=1e-4)  # plus a step count per parameter
    assert [2 * half.weights, 2 * half.reference, 2 * half.gradients] == [size] * 3
    assert (whole.gathered, half.gathered) == (0, 2 * size)
    kv_bytes = 4 * (PROMPT + COMPLETION - 1) * 2 * 192 * 4 * 4  # rows, tokens, keys and values, heads, layers, bytes
    assert half.cache == kv_bytes
    offloaded = plan(replace(work, cpu_offload=True), 2)
    assert (half.host, offloaded.host) == (0, half.held + half.gradients)
    assert (offloaded.held, offloaded.gradients) == (0, 0)
    length = PROMPT + COMPLETION
    assert replace(work, update_rows=3, expert_rows=1, sft_rows=2).rows == (4, length)  # they share one pass
    assert replace(work, max_tokens=2 * length + 1).rows == (3, -(-(2 * length + 1) // 3))
    for phase in ("sampling", "update"):
        assert half.held <= half.phases[phase] - offloaded.phases[phase] <= half.held + half.gradients


def test_plan_counts_the_weights_and_the_cache_of_vllm(wide_model):
    work = replace(sharded(wide_model), engine=VLLMEngine(gpu_memory_utilization=0.5), device_bytes=2**30)
    weights = dict(work.policy.build().lm.named_parameters())
    size = sum(weight.numel() for weight in weights.values())
    memory = plan(work, 2)
    assert (memory.engine_weights, memory.cache, memory.logits) == (4 * size, 2**29 - 4 * size, 0)
    assert memory.copied == 4 * weights["model.embed_tokens.weight"].numel() < memory.gathered
    assert memory.completion_cache == 4 * (PROMPT + COMPLETION - 1) * 2 * 192 * 4
    assert memory.phases["sampling"] == memory.held + memory.copied + 2**29
    assert memory.phases["update"] == plan(replace(work, engine=None), 2).phases["update"]
    ahead = replace(work, engine=VLLMEngine(gpu_memory_utilization=0.5, enable_sleep=False), looks_ahead=True)
    beside = plan(ahead, 2).phases["update"] - memory.phases["update"]
    assert beside == plan(ahead, 2).snapshot + 2**29  # which is there beside scoring, too
    awake = plan(replace(work, engine=VLLMEngine(kv_cache_gib=0.25, dtype="bfloat16", enable_sleep=False)), 2)
    assert (awake.engine_weights, awake.cache) == (2 * size, 2**28)
    assert awake.completion_cache == memory.completion_cache // 2
    assert awake.phases["update"] - memory.phases["update"] == 2 * size + 2**28
    assert plan(replace(work, engine=VLLMEngine(), device_bytes=size), 2).cache == 0
    halves = plan(replace(work, engine=VLLMEngine(gpu_memory_utilization=0.5, tensor_parallel_size=2)), 2)
    assert (halves.engine_weights, halves.cache) == (2 * size, 2**29 - 2 * size)
    assert halves.completion_cache == memory.completion_cache // 2
    crowded = plan(replace(work, engine=VLLMEngine(tensor_parallel_size=12)), 2)
    assert crowded.completion_cache == memory.completion_cache // 3  # there are three heads


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_plan_tells_how_many_completions_fit_into_the_cache_of_vllm(repository, monkeypatch, capsys, strategy):
    """A completion keeps 127 tokens in 2 layers, each with 2 * 96 numbers in float32: 190.5 KiB."""
    monkeypatch.chdir(repository)
    arguments = ["plan", "--config=configs/quickstart.yaml", "--num_devices=2", f"--trainer.strategy={strategy}"]
    main([*arguments, "--data.engine=VLLMEngine", "--data.engine.kv_cache_gib=0.5"])
    output = capsys.readouterr().out
    assert "The engine's cache holds 2752 completions of 128 tokens at a time." in output
    assert "gathered blocks" in output
    main([*arguments, "--data.engine=VLLMEngine", "--data.engine.kv_cache_gib=0.0001"])
    assert "holds no completion of 128 tokens, so it will not start. Raise data.engine" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "egspo"])
def test_plan_counts_a_reference_adapter(tiny_run, wide_model, stage):
    """Compared with the parameters of a run."""
    adapters = LoraConfig(rank=2, target_modules=["embed_tokens", "q_proj"])
    policy = PolicyConfig(wide_model, from_scratch=True, lora=adapters)
    run = tiny_run(module={"policy": policy, "initial_stage": stage, "objective": Objective(beta=0.01)})
    flags = SimpleNamespace(precision="32-true", accumulate_grad_batches=1, strategy="auto")
    memory = plan(workload(run.module, run.data, flags, 1), 1)
    run.module.configure_model()
    plain = PolicyConfig(wide_model, from_scratch=True).build()
    size, plain_size = (sum(4 * p.numel() for p in policy.parameters()) for policy in (run.module.policy, plain))
    assert (memory.weights, memory.reference) == (size, 0)
    assert size - plain_size == 2 * memory.gradients > 0
    assert memory.scoring > 0


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_plan_counts_snapshot_and_concurrent_sampling(tiny_run, wide_model, lora):
    """Compared with the policy snapshot of a run."""
    policy = PolicyConfig(wide_model, from_scratch=True, lora=lora)
    data = {"max_staleness": 1, "max_prompt_length": PROMPT, "max_completion_length": 18}
    run = tiny_run(module={"policy": policy, "initial_stage": "egspo"}, data=data, trainer={"max_epochs": 2}).fit()
    trained = {id(p) for p in run.module.policy.parameters()}
    copied = [p for p in run.module._snapshot._networks.policy.parameters() if id(p) not in trained]
    flags = SimpleNamespace(precision="32-true", accumulate_grad_batches=1, strategy="auto")
    work = workload(run.module, run.data, flags, 1)
    ahead, base = plan(work, 1), plan(replace(work, looks_ahead=False), 1)
    assert ahead.snapshot == sum(p.numel() * p.element_size() for p in copied) > 0
    assert base.snapshot == 0
    assert ahead.phases["update"] - base.phases["update"] == ahead.snapshot + ahead.cache + ahead.logits
    assert ahead.phases["sampling"] - base.phases["sampling"] == ahead.snapshot


def test_token_budget_bounds_planned_activations_for_any_step_size(repository, monkeypatch, capsys):
    """Without a budget, planned activations grow with the optimizer step."""
    monkeypatch.chdir(repository)

    def planned(*arguments):
        main(["plan", "--config=configs/quickstart.yaml", "--data.engine.max_batch_size=8", *arguments])
        lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        return {name.strip(): float(value) for name, value in lines}

    small, large = ["--data.num_minibatches=8"], ["--data.num_minibatches=1"]
    budget = ["--data.max_tokens_per_micro_batch=600", "--data.sft_batch_size=8"]
    grows = [planned("--data.sft_batch_size=8", *size)["activations"] for size in (small, large)]
    assert grows[1] > 2 * grows[0]
    bounded = [planned(*budget, *size) for size in (small, large)]
    assert bounded[0] == bounded[1]
    assert bounded[0]["activations"] < grows[0]


def test_plan_refuses_a_token_budget_below_one_row(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config=configs/quickstart.yaml", "--data.max_tokens_per_micro_batch=129"])
    assert ended.value.code == 2
    assert "data.max_tokens_per_micro_batch must be at least 130" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["mamba", "lfm2"])
def test_plan_refuses_a_model_without_a_plain_cache(repository, tmp_path, monkeypatch, capsys, model_type):
    monkeypatch.chdir(repository)
    folder = shutil.copytree(repository / "configs" / "tiny_model", tmp_path / "model")
    tiny_config(model_type).save_pretrained(folder)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config=configs/quickstart.yaml", f"--model.policy.name_or_path={folder}"])
    assert ended.value.code == 2
    assert f"'{model_type}'" in capsys.readouterr().err
