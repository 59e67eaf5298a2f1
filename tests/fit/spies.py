"""Callback that records metrics, weights, batches and gradients of a run; parameters of tests."""

import pytest
from lightning.pytorch import Callback

from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.ops.estimators import GAE, GroupRelative
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.training.adaptive_coefficients import KLReward
from egspo_lightning.types import Stage

RL = {"initial_stage": Stage.EGSPO}
METHODS = {
    "egspo": {},
    "ppo": {"advantage": GAE(), "critic": CriticConfig("own"), "objective": Objective(beta=0.1, mu=0.0)},
    "kl": {
        "advantage": GroupRelative(scale_by_std=False),
        "kl_reward": KLReward(coefficient=0.1, target=0.01, horizon=16),
        "gate": QuantileGate(running_decay=0.5),
    },
}
"""Module settings of runs that resume; together they have every kind of state that a checkpoint holds."""


def slow(*values):
    """Parameters of a test that only CI runs."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


class Spy(Callback):
    """Records batches, gradients, the weights of each epoch, the final metrics, optimizer and attention settings."""

    def __init__(self):
        self.metrics, self.weights, self.batches, self.gradients = [], [], [], []
        self.fused = self.attention = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters()])

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append([p.detach().clone() for p in pl_module.policy.parameters()])
        self.attention = pl_module.policy.lm.config._attn_implementation
        self.fused = pl_module.optimizers().param_groups[0].get("fused")

    def on_train_end(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def distance(one, other):
    """Largest absolute difference between two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))
