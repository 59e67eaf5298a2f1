"""Warnings at the start of a run: settings that are allowed, but are a mistake more often than not.

The functions named ``*_warning`` return the text of a warning, or None. ``warn`` prints it on the first rank.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.training.callback_rules import EndsSFT
from egspo_lightning.types import Stage

HIGH_RATES = {Stage.SFT: 1e-4, Stage.EGSPO: 2e-5}
"""Learning rate of Adam from which a warning is given where all weights of a pretrained model are trained, by stage."""
LORA_FACTOR = 10.0
"""How much higher the rates of LoRA's adapters usually are."""


def warn(text: str | None) -> None:
    """Print a warning, if there is one, on the first rank."""
    if text is not None:
        rank_zero_warn(text)


def random_weights_warning(policy: PolicyConfig, *, is_fit: bool) -> str | None:
    """For a run without a checkpoint whose policy starts from random weights."""
    if policy.from_scratch and not is_fit:
        return (
            "model.policy.from_scratch: true, and no --ckpt_path is given: RANDOM WEIGHTS are evaluated. Give the "
            "checkpoint of a run, or leave from_scratch out to evaluate a folder's weights."
        )
    if policy.from_scratch and policy.holds_weights:
        return (
            "model.policy.from_scratch: true: training starts from RANDOM WEIGHTS, and the weights of "
            f"{policy.name_or_path!r} are not read. Leave from_scratch out to start from them."
        )
    return None


def rate_warning(policy: PolicyConfig, optimizer: str, stage: Stage, rate: float) -> str | None:
    """For a learning rate that is far above what is usual for pretrained weights; ``optimizer`` is its class name."""
    high = HIGH_RATES[stage] * (1.0 if policy.lora is None else LORA_FACTOR)
    if policy.from_scratch or "Adam" not in optimizer or rate < high:
        return None
    field = "model.optimizer's lr" if stage == Stage.SFT else "stage_transition.learning_rate (or model.optimizer's lr)"
    kind = "the weights of a pretrained model" if policy.lora is None else "LoRA adapters"
    return (
        f"{field} is {rate:g} in stage {stage}: rates from {high:g} on usually DESTROY what {kind} have learned. "
        "Lower it, unless the model is small or the value is tested."
    )


def transition_warning(callbacks: Sequence[Any], stage: Stage) -> str | None:
    """For a run that starts with SFT and has no callback that ends it."""
    if stage != Stage.SFT or any(isinstance(callback, EndsSFT) for callback in callbacks):
        return None
    return (
        "The trainer has no callback StageTransition, so the run trains by SFT only. Add "
        "egspo_lightning.StageTransition() to Trainer(callbacks=[...]); with enabled=False it trains by SFT only."
    )


def threads_warning(num_threads: int, quota: float | None, idle: float | None) -> str | None:
    """For more torch threads than cores: waiting for a thread that does not run slows every operation down.

    Args:
        num_threads: threads of this machine's ranks together
        quota: CPU quota, in cores; None if there is none
        idle: idle cores; None if unknown
    """
    cores = min(quota or float("inf"), float("inf") if idle is None else idle)
    if num_threads <= max(1, round(min(cores, num_threads))):
        return None
    found = f"the CPU quota is {quota:g} cores" if cores == quota else f"about {cores:.1f} cores are idle"
    return (
        f"torch uses {num_threads} threads, and {found}: training may be many times slower. Set num_threads: "
        f"{max(1, int(cores))} (in Python: torch.set_num_threads), or stop other programs."
    )


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPU quota of the control group, in cores; None where there is none."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        try:
            quota, period = " ".join((root / name).read_text() for name in names).split()
            if float(quota) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # "max" is no number
            continue
    return None


def idle_cores(seconds: float = 0.2, stat: Path = Path("/proc/stat")) -> float | None:
    """Cores that are idle while this process sleeps; None where the system does not say."""
    try:
        before, started = _idle_ticks(stat), time.monotonic()
        time.sleep(seconds)
        ticks = _idle_ticks(stat) - before
    except (OSError, ValueError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)


def _idle_ticks(stat: Path) -> int:
    """Clock ticks that all cores have been idle since the start of the machine, waiting for a disk included."""
    return sum(int(ticks) for ticks in stat.read_text().split()[4:6])
