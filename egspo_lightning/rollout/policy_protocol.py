"""What rollouts need of the thing that is trained; the LightningModule is one such thing."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from egspo_lightning.types import Measurements, RolloutBatch, ScoredRollouts, Scores, Stage


class RolloutPolicy(Protocol):
    """A policy that can be sampled from and scored with: the one in training, or a snapshot of it."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer; there before its weights are."""
        ...

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a completion."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def temperature(self) -> float:
        """The sampling temperature, which all log-probabilities in training are taken at."""
        ...

    @property
    def policy_version(self) -> int:
        """Optimizer steps taken: what rollouts are stamped with."""
        ...

    @property
    def takes_sampled_statistics(self) -> bool:
        """Whether what the engine says of the tokens that it sampled can stand for ``score``."""
        ...

    def sampling(self) -> AbstractContextManager[Any]:
        """Enter eval mode, no gradients, the precision of training; gives the causal language model.

        All ranks must enter it, equally often; within it they are independent of one another.
        """
        ...

    def scoring(self) -> AbstractContextManager[Any]:
        """The same for ``score``, with all networks at hand; may hold ``sampling``'s own."""
        ...

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> Scores:
        """What the networks say of given sequences, at the sampling temperature."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of equally shaped tensors over all ranks."""
        ...


class FrozenPolicy(RolloutPolicy, Protocol):
    """A policy as it was once, which another thread may use while the one in training goes on."""

    def apart(self) -> AbstractContextManager[None]:
        """Enter what a thread needs so that its work on the device does not wait for that of training."""
        ...

    def cancel(self) -> None:
        """Let whatever is being computed with it end with an error, soon."""
        ...


class TrainedPolicy(RolloutPolicy, Protocol):
    """The policy in training, as the datamodule sees it."""

    @property
    def stage(self) -> Stage:
        """What the coming epoch trains."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model was made for, in tokens; None where its config does not say."""
        ...

    @property
    def mixes_expert_data(self) -> bool:
        """Whether updates on rollouts carry expert demonstrations as well."""
        ...

    @property
    def needs_every_rollout(self) -> bool:
        """Whether rollouts with advantage 0 take part in the loss."""
        ...

    @property
    def min_generations(self) -> int:
        """The least number of completions a problem that advantages can be estimated from."""
        ...

    @property
    def takes_expert_rollouts(self) -> bool:
        """Whether experts' solutions may stand among the rollouts."""
        ...

    def accept_staleness(self, num_rollout_batches: int) -> None:
        """Train on rollouts of a policy so many collections old as well, and refuse what is older.

        Raises:
            UserError: no snapshot can be made of this policy.
        """
        ...

    def snapshot(self) -> FrozenPolicy:
        """The policy as it is now; the snapshot before, whose memory it takes, must not be in use any more."""
        ...

    def to_rollout_batch(self, rollouts: ScoredRollouts, measurements: Measurements) -> RolloutBatch:
        """Take a whole collection in: credit its tokens, settle the gate, and log what was measured."""
        ...

    def settle_micro_batches(self, number: int, num_updates: int) -> None:
        """Let the phase, before its first micro-batch is trained on, have so many of them an update."""
        ...

    def collect_over_ranks(self, value: Any) -> list[Any]:
        """The value of each rank, in their order."""
        ...
