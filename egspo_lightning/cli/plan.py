"""Memory plan of a run: ``egspo plan --config FILE``."""

from typing import Any

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.engine import ReservingEngine
from egspo_lightning.rollout.scoring import TOKENS_PER_SCORING_BATCH
from egspo_lightning.training.memory_plan import Memory, Workload, plan
from egspo_lightning.training.setup_rules import require_token_budget
from egspo_lightning.training.strategies import TRAINED_AS
from egspo_lightning.types import PositiveFloat, PositiveInt, Stage

GIB = 2**30
UNLISTED = ("update", "host", "engine_stays", "completion_cache")
"""Quantities that are not parts of a device's memory."""


def plan_run(
    model: EGSPOModule,
    data: HybridDataModule,
    flags: Any,
    num_devices: PositiveInt | None = None,
    device_gib: PositiveFloat = 80.0,
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
        UserError: num_devices is left out, and the Trainer's flags do not name a number of devices.
    """
    devices = num_devices or _devices(flags)
    work = workload(model, data, flags, devices, int(device_gib * GIB))
    return report(work, plan(work, devices), devices, device_gib)


def workload(
    model: EGSPOModule, data: HybridDataModule, flags: Any, num_devices: int, device_bytes: int = 80 * GIB
) -> Workload:
    """Workload of one device in a run with these flags."""
    strategy = TRAINED_AS.get(str(flags.strategy), flags.strategy)
    is_bfloat16, is_sharded = flags.precision == "bf16-mixed", _is_sharded(strategy)
    num_parts, max_tokens = int(flags.accumulate_grad_batches), data.max_tokens_per_micro_batch
    require_token_budget(data, num_parts, is_mixed=model.mixes_expert_data)
    completions, length = data.num_problems * data.num_generations, data.max_prompt_length + data.max_completion_length
    has_exact_logprobs = not is_bfloat16 and model.policy_config.dtype == "float32"
    scores = not has_exact_logprobs or model.has_reference or model.critic_config or data.expert_fraction > 0
    shares = num_devices * num_parts
    update_rows = -(-completions // (data.num_minibatches * shares))
    expert_rows = -(-data.expert_batch_size // shares) if model.mixes_expert_data else 0
    sft_rows = -(-data.sft_batch_size // shares) if model.stage == Stage.SFT else 0
    if max_tokens is not None:
        num_parts = -(-max(update_rows + expert_rows, sft_rows) * length // max_tokens)
    return Workload(
        policy=model.policy_config,
        critic=model.critic_config,
        holds_reference=model.has_reference,
        optimizer=model._optimizer,
        is_sharded=is_sharded,
        is_bfloat16=is_bfloat16,
        prompt_length=data.max_prompt_length,
        completion_length=data.max_completion_length,
        sampled_rows=min(getattr(data.engine, "max_batch_size", completions), -(-completions // num_devices)),
        scored_tokens=TOKENS_PER_SCORING_BATCH if scores else 0,
        update_rows=update_rows,
        expert_rows=expert_rows,
        sft_rows=sft_rows,
        num_parts=num_parts,
        looks_ahead=data.max_staleness > 0,
        max_tokens=max_tokens,
        cpu_offload=is_sharded and _is_offloaded(strategy),
        engine=data.engine if isinstance(data.engine, ReservingEngine) else None,
        device_bytes=device_bytes,
    )


def report(work: Workload, memory: Memory, num_devices: int, device_gib: float) -> str:
    """The plan as a table, and whether it fits."""
    parts = [(name, size) for name, size in memory._asdict().items() if size and name not in UNLISTED]
    width = max(len(name) for name, _ in parts)
    rows = [f"  {name.replace('_', ' '):<{width}}  {size / GIB:10.3f}" for name, size in parts]
    phases = [f"  {name:<{width}}  {size / GIB:10.3f}" for name, size in memory.phases.items() if size]
    verdict = "fits" if memory.peak <= device_gib * GIB else "does not fit"
    bound = "" if work.max_tokens is None else f", in micro-batches of at most {work.max_tokens} tokens"
    return "\n".join(
        [
            f"Memory of one device of {num_devices}, GiB, if every sequence has {work.length} tokens{bound}:",
            *rows,
            "Peaks:",
            *phases,
            *([engine_line(memory, work.length)] if memory.completion_cache else []),
            *([f"In the host's memory, for each device: {memory.host / GIB:.3f} GiB."] if memory.host else []),
            f"The peak of {memory.peak / GIB:.3f} GiB {verdict} in {device_gib:g} GiB. Allocator, kernels and "
            "communication need more on top.",
        ]
    )


def engine_line(memory: Memory, length: int) -> str:
    """How many completions the cache of an engine with a copy of the weights holds."""
    number = memory.cache // memory.completion_cache
    if number:
        return f"The engine's cache holds {number} completions of {length} tokens at a time."
    fields = "data.engine.gpu_memory_utilization or data.engine.kv_cache_gib"
    return f"The engine's cache holds no completion of {length} tokens, so it will not start. Raise {fields}."


def _devices(flags: Any) -> int:
    devices, nodes = flags.devices, int(flags.num_nodes or 1)
    if str(devices) in ("auto", "-1", "None"):
        return 1
    number = str(len(devices) if isinstance(devices, list) else devices)
    if not number.isdigit() or int(number) == 0:
        raise UserError(f"plan.num_devices must be given: trainer.devices is {devices!r}, which names no number.")
    return int(number) * nodes


def _is_sharded(strategy: Any) -> bool:
    name = str(getattr(strategy, "class_path", strategy))
    return name in ("fsdp2", "fsdp2_cpu_offload") or name.endswith("FSDP2Strategy")


def _is_offloaded(strategy: Any) -> bool:
    arguments = getattr(strategy, "init_args", None)
    return strategy == "fsdp2_cpu_offload" or bool(getattr(arguments, "cpu_offload", False))
