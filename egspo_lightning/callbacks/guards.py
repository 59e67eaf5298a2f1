"""Warns of runs that go on without learning: what fails quietly speaks once, and stands in the metrics."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.errors import require


class Guards(Callback):
    """Looks at each collection's metrics; logs ``guard/*`` as 1 where a guard fires and 0 where not, and warns once.

    ``guard/flat_collections`` and ``guard/duplicate_problems`` are counts. Nothing is changed or stopped.

    Args:
        min_entropy_share: Entropy collapse: the mean entropy of a collection's tokens, as a share of the first
            collection's, below this. Where entropy is used up, so is what RL can gain from it (arXiv 2505.22617); the
            quickstart ends at 0.4 of its first.
        max_kl: KL run-away: mean approximate KL between the sampling policy and the one that its updates make, nats a
            token, above this. PPO's usual limit is 0.015 (Spinning Up stops an epoch at 1.5 times 0.01), and the
            quickstart's first collection has 0.04.
        max_first_ratio_gap: Ratio after sampling not 1: |log(pi / pi_old)| before the first update, nats, above this.
            bfloat16 gives up to 0.04 on sharp models; in float32 the run ends at 0.001 in any case.
        max_truncated_fraction: Share of completions cut off by max_completion_length above this: what they lack is
            mostly the answer, so length is punished rather than error (arXiv 2503.14476, overlong filtering).
        num_zero_rewards: Reward never fires: after so many collections in a row without any reward other than 0.
    """

    def __init__(
        self,
        min_entropy_share: float = 0.1,
        max_kl: float = 0.1,
        max_first_ratio_gap: float = 0.1,
        max_truncated_fraction: float = 0.3,
        num_zero_rewards: int = 5,
    ) -> None:
        super().__init__()
        shares = {"min_entropy_share": min_entropy_share, "max_truncated_fraction": max_truncated_fraction}
        for name, value in shares.items():
            require(0 <= value <= 1, f"guards.{name}", value, "in [0, 1]")
        for name, value in (("max_kl", max_kl), ("max_first_ratio_gap", max_first_ratio_gap)):
            require(value > 0, f"guards.{name}", value, "above 0")
        require(num_zero_rewards >= 1, "guards.num_zero_rewards", num_zero_rewards, "at least 1")
        self.min_entropy_share, self.max_kl, self.max_first_ratio_gap = min_entropy_share, max_kl, max_first_ratio_gap
        self.max_truncated_fraction, self.num_zero_rewards = max_truncated_fraction, num_zero_rewards
        self.first_entropy: float | None = None
        self.num_rollout_batches = self.num_flat = self.num_zero = 0
        self.spoken: list[str] = []
        """Guards that have warned."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the collection that this epoch trained on."""
        data = data_of(trainer)
        if data.num_rollout_batches == self.num_rollout_batches:
            return
        self.num_rollout_batches = data.num_rollout_batches
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found = dict(self._judge(metrics))
        told = {f"guard/{name}": float(message is not None) for name, message in found.items()}
        counts = {"flat_collections": self.num_flat, "duplicate_problems": data.num_duplicates}
        told |= {f"guard/{name}": float(count) for name, count in counts.items()}
        module_of(pl_module).log_phase(told)
        found["duplicate_problems"] = _duplicates(data.num_duplicates)
        for name, message in found.items():
            self._speak(name, message)

    def _judge(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        """Name and message of each guard; None where it does not fire."""
        entropy = metrics["policy/entropy"]
        self.first_entropy = entropy if self.first_entropy is None else self.first_entropy
        yield (
            "entropy_collapse",
            self._told(
                entropy < self.min_entropy_share * self.first_entropy,
                f"the policy's entropy is {entropy:.4g} nats a token, {self.first_entropy:.4g} at first",
                "min_entropy_share",
                "Raise the temperature, add model.entropy_bonus, or lower the learning rate.",
            ),
        )
        kl = metrics["policy/approx_kl"]
        yield (
            "kl_runaway",
            self._told(
                not kl <= self.max_kl,
                f"the policy is {kl:.4g} nats a token from the one that sampled",
                "max_kl",
                "Lower the learning rate, data.num_ppo_epochs, or clip the gradient.",
            ),
        )
        gap = metrics.get("policy/first_ratio_gap", 0.0)  # stale rollouts have none
        yield (
            "ratio_after_sampling",
            self._told(
                not gap <= self.max_first_ratio_gap,
                f"before the first update |log(pi / pi_old)| is {gap:.4g} nats",
                "max_first_ratio_gap",
                "Score in the precision of training, or train in float32.",
            ),
        )
        truncated = metrics["rollout/truncated_fraction"]
        yield (
            "truncated",
            self._told(
                truncated > self.max_truncated_fraction,
                f"{truncated:.0%} of the completions were cut off",
                "max_truncated_fraction",
                "Raise data.max_completion_length, or set model.objective.mask_truncated.",
            ),
        )
        yield from self._judge_rewards(metrics)

    def _judge_rewards(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        is_zero = metrics["rollout/reward_mean"] == 0 and metrics["rollout/zero_spread_fraction"] == 1
        self.num_zero = self.num_zero + 1 if is_zero else 0
        yield (
            "zero_reward",
            self._told(
                self.num_zero >= self.num_zero_rewards,
                f"{self.num_zero} collections in a row had no reward other than 0",
                "num_zero_rewards",
                "Train longer by SFT, take easier problems, or look at what the reward finds in rollout samples.",
            ),
        )
        is_flat = metrics["rollout/zero_spread_fraction"] == 1
        self.num_flat += is_flat
        yield (
            "flat_rewards",
            None
            if not is_flat
            else (
                "within every group of a collection all rewards were equal, so advantages that compare "
                "them are 0 and updates without another term are skipped (policy/skipped_fraction). Take problems of "
                "another difficulty, more data.num_generations, or data.max_resampling. guard/flat_collections "
                "counts them."
            ),
        )

    def _told(self, fires: bool, what: str, field: str, remedy: str) -> str | None:
        return f"{what} (guards.{field} = {getattr(self, field)}). {remedy}" if fires else None

    def _speak(self, name: str, message: str | None) -> None:
        if message is not None and name not in self.spoken:
            self.spoken.append(name)
            rank_zero_warn(f"Guard {name}: {message} Said once; see guard/{name} in the metrics.")

    def state_dict(self) -> dict[str, Any]:
        """What it compares with, and what was said."""
        names = ("first_entropy", "num_rollout_batches", "num_flat", "num_zero", "spoken")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        vars(self).update(state_dict)


def _duplicates(count: int) -> str | None:
    if count == 0:
        return None
    return (
        f"{count} training problems or demonstrations also stand in a benchmark. They were dropped; those that differ "
        "in wording alone are not found."
    )
