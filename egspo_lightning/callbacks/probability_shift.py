"""ProbabilityShift: how far the optimizer steps on a rollout batch moved the probabilities of its tokens."""

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.trainer_access import due_rollout_batch, module_of, outputs_now
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.losses import log_ratio
from egspo_lightning.types import NonNegativeInt, RolloutBatch, UnitInterval

SHIFTS = ("shift/high_positive", "shift/high_negative", "shift/low_positive", "shift/low_negative")
"""Names of the metrics: branch by entropy, and sign of the advantage."""


class ProbabilityShift(Callback):
    """Logs the mean change of log-probability that the optimizer steps on a rollout batch made, in nats per token.

    The four metrics are ``SHIFTS``. High or low is the token's entropy under the sampling policy, split at the quantile
    ``1 - top_fraction`` over all ranks, whatever gate the method has. Positive or negative is the token's advantage.
    ``shift/low_negative`` tells whether confident tokens of wrong completions become less probable. Nothing is logged
    for tokens that do not occur. One more forward pass over the rollout batch gives the log-probabilities.

    Args:
        every_n_rollout_batches: Interval in rollout batches; 0 logs none.
        top_fraction: Share of tokens that count as high-entropy, in [0, 1].
    """

    def __init__(self, every_n_rollout_batches: NonNegativeInt = 1, top_fraction: UnitInterval = 0.2) -> None:
        self.every_n_rollout_batches, self.top_fraction = every_n_rollout_batches, top_fraction

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rollout batch of the ending phase."""
        rollouts = due_rollout_batch(trainer, self.every_n_rollout_batches)
        if rollouts is None:
            return
        module = module_of(pl_module)
        module.log_phase(shifts(rollouts.batch, module, self.top_fraction))


def shifts(rollout: RolloutBatch, module: EGSPOModule, top_fraction: float) -> dict[str, float]:
    """The metrics of ``ProbabilityShift``, for a module that has taken the optimizer steps. Collective."""
    over_ranks, mask = module.token_method.over_ranks, rollout.gated_mask
    now = outputs_now(module, rollout.input_ids, rollout.completion_mask)
    moved = log_ratio(now.logprobs, rollout.old_logprobs)
    is_high = rollout.entropies >= over_ranks.quantile(rollout.entropies, mask, 1 - top_fraction)
    signs = rollout.advantages > 0, rollout.advantages < 0
    masks = (mask & branch & sign for branch in (is_high, ~is_high) for sign in signs)
    groups = dict(zip(SHIFTS, masks, strict=True))
    sums = {
        name: (over_ranks.sum(moved, group).item(), over_ranks.count(group).item()) for name, group in groups.items()
    }
    return {name: total / count for name, (total, count) in sums.items() if count > 0}
