"""Memory plan of a run: ``egspo plan --config FILE``."""

from dataclasses import replace
from typing import Any

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError, require
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.scoring import TOKENS_PER_SCORING_BATCH
from egspo_lightning.training.memory_plan import Memory, Workload, plan
from egspo_lightning.training.setup_rules import require_token_budget
from egspo_lightning.types import Stage

GIB = 2**30


def plan_run(
    model: EGSPOModule,
    data: HybridDataModule,
    flags: Any,
    num_devices: int | None = None,
    device_gib: float = 80.0,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> str:
    """Estimate the memory that a run needs on each device, and whether it fits, from shapes alone.

    Args:
        model: The module that fit would train.
        data: The data that fit would train it on.
        flags: The Trainer's flags.
        num_devices: Number of devices; by default the number in the Trainer's flags.
        device_gib: Memory of each device, GiB.
        ckpt_path: Accepted because configs of fit may hold it; nothing is loaded.
        weights_only: Accepted for the same reason.

    Raises:
        UserError: there is no device, no memory, or the flags do not name a number of devices.
    """
    require(device_gib > 0, "plan.device_gib", device_gib, "above 0")
    devices = num_devices if num_devices is not None else _devices(flags)
    require(devices >= 1, "plan.num_devices", devices, "at least 1")
    work = workload(model, data, flags, devices)
    return report(work, plan(work, devices), devices, device_gib)


def workload(model: EGSPOModule, data: HybridDataModule, flags: Any, num_devices: int) -> Workload:
    """Workload of one device in a run with these flags."""
    precision = str(flags.precision or "32-true")
    is_bfloat16 = precision == "bf16-mixed"
    parts, max_tokens = int(flags.accumulate_grad_batches), data.max_tokens_per_micro_batch
    require_token_budget(data, parts, is_mixed=model.mixes_expert_data)
    shares = num_devices * parts
    completions = data.num_problems * data.num_generations
    is_told = not is_bfloat16 and model.policy_config.dtype == "float32"
    scores = not is_told or model.has_reference or model.critic_config is not None or data.expert_fraction > 0
    starts_with_sft = model.stage == Stage.SFT
    work = Workload(
        policy=model.policy_config,
        critic=model.critic_config,
        holds_reference=model.has_reference and not model.base_is_reference,
        optimizer=model._optimizer,
        is_sharded=_is_sharded(flags.strategy),
        is_bfloat16=is_bfloat16,
        prompt_length=data.max_prompt_length,
        completion_length=data.max_completion_length,
        sampled_rows=min(getattr(data.engine, "max_batch_size", completions), -(-completions // num_devices)),
        scored_tokens=TOKENS_PER_SCORING_BATCH if scores else 0,
        update_rows=-(-completions // (data.num_minibatches * shares)),
        expert_rows=-(-data.expert_batch_size // shares) if model.mixes_expert_data else 0,
        sft_rows=-(-data.sft_batch_size // shares) if starts_with_sft else 0,
        num_parts=parts,
        looks_ahead=data.max_staleness > 0,
        max_tokens=max_tokens,
        cpu_offload=_is_sharded(flags.strategy) and _offloads(flags.strategy),
    )
    if max_tokens is None:
        return work
    num_tokens = max(work.update_rows + work.expert_rows, work.sft_rows) * work.length
    return replace(work, num_parts=-(-num_tokens // max_tokens))


def report(work: Workload, memory: Memory, num_devices: int, device_gib: float) -> str:
    """The plan as a table, and whether it fits."""
    parts = [(name, size) for name, size in memory._asdict().items() if size and name not in ("update", "host")]
    width = max(len(name) for name, _ in parts)
    rows = [f"  {name.replace('_', ' '):<{width}}  {size / GIB:10.3f}" for name, size in parts]
    phases = [f"  {name:<{width}}  {size / GIB:10.3f}" for name, size in memory.phases.items() if size]
    fits = memory.peak <= device_gib * GIB
    verdict = "fits" if fits else "does not fit"
    bound = "" if work.max_tokens is None else f", in micro-batches of at most {work.max_tokens} tokens"
    return "\n".join(
        [
            f"Memory of one device of {num_devices}, GiB, were every sequence {work.length} tokens long{bound}:",
            *rows,
            "Peaks:",
            *phases,
            *([f"In the host's memory, for each device: {memory.host / GIB:.3f} GiB."] if memory.host else []),
            f"The peak of {memory.peak / GIB:.3f} GiB {verdict} in {device_gib:g} GiB. What the allocator, kernels and "
            "communication need comes on top.",
        ]
    )


def _devices(flags: Any) -> int:
    devices, nodes = flags.devices, int(flags.num_nodes or 1)
    if isinstance(devices, list):
        return len(devices) * nodes
    text = str(devices)
    if text in ("auto", "-1", "None"):
        return 1
    if not text.isdigit():
        raise UserError(f"plan.num_devices must be given: trainer.devices is {devices!r}, which names no number.")
    return int(text) * nodes


def _is_sharded(strategy: Any) -> bool:
    name = str(getattr(strategy, "class_path", strategy))
    return name == "fsdp2" or name.endswith("FSDP2Strategy")


def _offloads(strategy: Any) -> bool:
    return bool(getattr(getattr(strategy, "init_args", None), "cpu_offload", False))
