"""Policy interface used for rollouts and by the datamodule; the LightningModule and its Snapshot implement it."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from egspo_lightning.types import Measurements, NetworkOutputs, RolloutBatch, ScoredRollouts, Stage


class RolloutPolicy(Protocol):
    """A policy that can be sampled from and scored with: the one in training, or a snapshot of it."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, which is there before the weights are."""

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a completion."""

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""

    @property
    def temperature(self) -> float:
        """Sampling temperature; all log-probabilities in training are taken at it."""

    @property
    def policy_version(self) -> int:
        """Optimizer steps taken; rollouts are stamped with it."""

    @property
    def takes_sampled_statistics(self) -> bool:
        """Whether the engine's statistics of its sampled tokens can replace ``score``."""

    def sampling(self, *, whole: bool = True) -> AbstractContextManager[Any]:
        """Context that gives the causal language model in eval mode, without gradients, in the training precision.

        All ranks must enter it equally often; within it they are independent of one another. ``whole=False`` leaves a
        sharded model in shards, for an engine that copies its weights, which all ranks do together.
        """

    def scoring(self) -> AbstractContextManager[Any]:
        """Context for ``score``, like ``sampling`` with all networks; may be entered within ``sampling``."""

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> NetworkOutputs:
        """Score given sequences with all networks, at the sampling temperature."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum equally shaped tensors over all ranks."""


class FrozenPolicy(RolloutPolicy, Protocol):
    """A snapshot of the policy, which another thread may use while training continues."""

    def apart(self) -> AbstractContextManager[None]:
        """Context in which a thread's work on the device does not wait for training's."""

    def cancel(self) -> None:
        """End computations with it early, with an error."""


class TrainedPolicy(RolloutPolicy, Protocol):
    """The policy in training, as the datamodule sees it."""

    @property
    def initial_stage(self) -> Stage:
        """The stage in which a run starts."""

    @property
    def stage(self) -> Stage:
        """The stage of the next epoch."""

    @property
    def mixes_expert_data(self) -> bool:
        """Whether optimizer steps on rollouts carry expert demonstrations as well."""

    @property
    def needs_every_rollout(self) -> bool:
        """Whether rollouts of advantage 0 take part in the loss."""

    @property
    def is_full_precision(self) -> bool:
        """Whether all computation is in float32."""

    def trained_logprobs(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """Log-probabilities as an optimizer step computes them, without gradients; call it within ``scoring``."""

    def snapshot(self) -> FrozenPolicy:
        """Copy the policy as it is now. Overwrites the previous snapshot, which must not be in use."""

    def add_advantages_and_gate(self, rollouts: ScoredRollouts, measurements: Measurements) -> RolloutBatch:
        """Add advantages and the gate's threshold to scored rollouts; keep the measurements for the log. Collective."""

    def set_num_micro_batches(self, number: int, num_steps: int) -> None:
        """Set the number of micro-batches of each optimizer step, before the phase's first one is trained on."""

    def collect_over_ranks(self, value: Any) -> list[Any]:
        """Gather one value from each rank, in the order of the ranks."""
