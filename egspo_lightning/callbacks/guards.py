"""Guards: warnings about runs that train but do not learn."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from egspo_lightning.callbacks.run_callback import CheckpointedCallback
from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.callbacks.weight_sample import WeightSample
from egspo_lightning.module import EGSPOModule
from egspo_lightning.types import PositiveFloat, PositiveInt, Stage, UnitInterval

LIMITS = {
    "entropy_collapse": "min_entropy_share",
    "kl_runaway": "max_kl",
    "ratio_after_sampling": "max_first_ratio_gap",
    "truncated": "max_truncated_fraction",
    "zero_reward": "num_zero_rewards",
    "unmoved_weights": "min_moved_fraction",
    "tied_entropies": "max_tied_fraction",
}
"""The argument that a guard compares with."""
REMEDIES = {
    "entropy_collapse": "Raise the temperature, add model.entropy_bonus, or lower the learning rate.",
    "kl_runaway": "Lower the learning rate or data.num_ppo_epochs, or clip the gradient.",
    "ratio_after_sampling": "Score in the precision of training, or train in float32.",
    "truncated": "Raise data.max_completion_length, or set model.objective.mask_truncated.",
    "truncated_and_masked": "Their tokens are not trained on (model.objective.mask_truncated). Raise "
    "data.max_completion_length to train on them.",
    "zero_reward": "Train longer by SFT, choose easier problems, or check the reward by the rollout samples.",
    "flat_rewards": "Choose problems of another difficulty, more data.num_generations, or data.max_resampling. "
    "guard/flat_rollout_batches counts such rollout batches.",
    "unmoved_weights": "Set model.policy.dtype: float32 and trainer.precision: bf16-mixed, or raise the learning rate.",
    "tied_entropies": "The gate then selects among equal tokens by a fixed random order. Raise the temperature, add "
    "model.entropy_bonus, or train on harder problems.",
    "duplicate_problems": "Problems that differ in wording alone are not found.",
}


class Guards(CheckpointedCallback):
    """Checks the metrics of each rollout batch; logs ``guard/*`` as 1 where a guard fires, else 0, and warns once.

    ``guard/flat_rollout_batches`` (rollout batches in which all groups are flat) and ``guard/duplicate_problems`` are
    counts. ``guard/unmoved_weights`` is found in the first phase of each stage, from a sample of the weights. The
    callback neither changes nor stops training.

    Args:
        min_entropy_share: Entropy collapse: fires where the mean token entropy falls below this share of its value in
            the first rollout batch. RL has little to gain once entropy is used up (arXiv 2505.22617). The quickstart
            ends at a share of 0.4.
        max_kl: KL run-away: fires where the mean approximate KL between the sampling policy and the trained policy,
            in nats a token, exceeds this. PPO's usual limit is 0.015 (Spinning Up stops an epoch at 1.5 times 0.01).
            The quickstart's first rollout batch has 0.04.
        max_first_ratio_gap: Ratio after sampling not 1: fires where |log(pi / pi_old)| before the first optimizer
            step, in nats, exceeds this. bfloat16 gives up to 0.04 on sharp models. In float32 the run stops at 0.001.
        max_truncated_fraction: Fires where a larger share of completions is cut off by max_completion_length. Cut
            completions mostly lack the answer, so length is punished instead of error (arXiv 2503.14476, overlong
            filtering).
        num_zero_rewards: Reward never fires: this many rollout batches in a row without any reward other than 0.
        min_moved_fraction: Rounded-off steps: fires where a smaller share of bfloat16 or float16 weights moves in the
            first phase of a stage; a phase in which the learning rate rises is not judged. Of bfloat16 weights, a
            learning rate of 1e-6 moves 1 %, of float32 weights 99 %.
        max_tied_fraction: Tied entropies: fires where the gate leaves out a larger share of tokens whose entropy equals
            the threshold, because it selects an exact share.
    """

    checkpointed = ("first_entropy", "num_rollout_batches", "num_flat", "num_zero", "spoken", "moved_fractions")
    of_run = ("_sample",)

    def __init__(
        self,
        min_entropy_share: UnitInterval = 0.1,
        max_kl: PositiveFloat = 0.1,
        max_first_ratio_gap: PositiveFloat = 0.1,
        max_truncated_fraction: UnitInterval = 0.3,
        num_zero_rewards: PositiveInt = 5,
        min_moved_fraction: UnitInterval = 0.5,
        max_tied_fraction: UnitInterval = 0.1,
    ) -> None:
        self.min_entropy_share, self.max_kl, self.max_first_ratio_gap = min_entropy_share, max_kl, max_first_ratio_gap
        self.max_truncated_fraction, self.num_zero_rewards = max_truncated_fraction, num_zero_rewards
        self.min_moved_fraction, self.max_tied_fraction = min_moved_fraction, max_tied_fraction
        self.first_entropy: float | None = None
        self.num_rollout_batches = self.num_flat = self.num_zero = 0
        self.spoken: list[str] = []
        """Guards that have warned."""
        self.moved_fractions: dict[str, float] = {}
        """Share of the half-precision weights that moved, by stage."""
        self._stage, self._learning_rate, self._sample = "", 0.0, WeightSample(nn.Module())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the weights until their movement in this stage is known."""
        self._stage, self._learning_rate = str(module_of(pl_module).stage), _learning_rate(trainer)
        is_known = self._stage in self.moved_fractions
        self._sample = WeightSample(nn.Module() if is_known else pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the weights after the last optimizer step of the phase, while there are gradients."""
        if trainer.is_last_batch and self._sample.before and _learning_rate(trainer) <= self._learning_rate:
            self._check_weights(module_of(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the rollout batch of the ending phase."""
        data = data_of(trainer)
        if data.phases.num_rollout_batches == self.num_rollout_batches:
            return
        self.num_rollout_batches = data.phases.num_rollout_batches
        findings = self._judge({name: float(value) for name, value in trainer.callback_metrics.items()})
        values = {f"guard/{guard}": float(fires) for guard, (fires, _) in findings.items()}
        values["guard/unmoved_weights"] = float(
            self.moved_fractions.get(Stage.EGSPO.value, 1.0) < self.min_moved_fraction
        )
        values["guard/flat_rollout_batches"] = float(self.num_flat)
        values["guard/duplicate_problems"] = float(data.num_duplicates)
        module_of(pl_module).log_phase(values)
        findings["duplicate_problems"] = (
            data.num_duplicates > 0,
            f"{data.num_duplicates} training problems or demonstrations are also in a benchmark. They were dropped",
        )
        masks = module_of(pl_module).objective.mask_truncated
        for guard, (fires, message) in findings.items():
            if fires and guard not in self.spoken:
                self._warn(guard, message, "truncated_and_masked" if masks and guard == "truncated" else guard)

    def _check_weights(self, module: EGSPOModule) -> None:
        """Measure the share of the half-precision weights that moved in this phase; warn if it is small. Collective."""
        moved, total = module.sum_over_ranks(self._sample.count_moved(module)).tolist()
        if total == 0:  # every optimizer step was skipped
            return
        self.moved_fractions[self._stage] = moved / total
        if moved / total < self.min_moved_fraction and "unmoved_weights" not in self.spoken:
            dtype = module.policy_config.dtype
            found = f"the first optimizer steps moved {moved / total:.1%} of the weights; {dtype} rounds the rest off"
            self._warn("unmoved_weights", found, "unmoved_weights")

    def _warn(self, guard: str, message: str, remedy: str) -> None:
        self.spoken.append(guard)
        limit = f" (guards.{LIMITS[guard]} = {getattr(self, LIMITS[guard])})" if guard in LIMITS else ""
        rank_zero_warn(
            f"Guard {guard}: {message}{limit}. {REMEDIES[remedy]} This warning is given once; guard/{guard} is logged "
            "for every rollout batch."
        )

    def _judge(self, metrics: Mapping[str, float]) -> dict[str, tuple[bool, str]]:
        """Whether each guard fires, and what it found."""
        kl = metrics["policy/approx_kl"]
        entropy = metrics.get("policy/entropy", math.nan)  # absent where all completions are masked
        gap = metrics.get("policy/first_ratio_gap", 0.0)  # stale rollouts have none
        truncated = metrics["rollout/truncated_fraction"]
        tied = metrics.get("gate/tied_fraction", 0.0)
        is_flat = metrics["rollout/zero_spread_fraction"] == 1
        if self.first_entropy is None and not math.isnan(entropy):
            self.first_entropy = entropy
        first = math.nan if self.first_entropy is None else self.first_entropy
        self.num_zero = self.num_zero + 1 if is_flat and metrics["rollout/reward_mean"] == 0 else 0
        self.num_flat += is_flat
        return {
            "entropy_collapse": (
                entropy < self.min_entropy_share * first,
                f"the policy's entropy is {entropy:.4g} nats a token, against {first:.4g} at first",
            ),
            "kl_runaway": (not kl <= self.max_kl, f"the policy is {kl:.4g} nats a token away from the sampling policy"),
            "ratio_after_sampling": (
                not gap <= self.max_first_ratio_gap,
                f"before the first optimizer step |log(pi / pi_old)| is {gap:.4g} nats",
            ),
            "truncated": (truncated > self.max_truncated_fraction, f"{truncated:.0%} of the completions were cut off"),
            "tied_entropies": (
                tied > self.max_tied_fraction,
                f"{tied:.0%} of the tokens have the entropy of the gate's threshold and are left out",
            ),
            "zero_reward": (
                self.num_zero >= self.num_zero_rewards,
                f"{self.num_zero} rollout batches in a row had no reward other than 0",
            ),
            "flat_rewards": (
                is_flat,
                "all rewards were equal within every group of a rollout batch. Advantages that compare them are 0, and "
                "optimizer steps without another loss term are skipped (policy/skipped_fraction)",
            ),
        }


def _learning_rate(trainer: Trainer) -> float:
    """The largest learning rate of the optimizer."""
    return max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
