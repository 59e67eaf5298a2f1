"""Setup rules: which settings of module, data and trainer fit together.

``require_run`` runs in the datamodule's ``setup``. Two rules need the built networks: ``require_separate_passes``,
which follows at once, and ``require_bounded_passes``, when a phase begins. ``require_positions`` also serves
evaluation. ``training.method_rules`` has the rules for the parts of the module. Ranges of single fields are in their
annotations, and rules within one part in its constructor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from egspo_lightning.errors import UserError, require
from egspo_lightning.models.lora import adapts_parameters
from egspo_lightning.ops.batching import BLANK_TOKENS
from egspo_lightning.ops.estimators import ExpertAdvantage
from egspo_lightning.ops.expert_methods import HPT
from egspo_lightning.training.callback_rules import require_callbacks

# The trainer's flags


def _require_phases(trainer: Any) -> None:
    """Refuse trainer flags that break the rule that one epoch is one phase."""
    num_micro_batches = trainer.accumulate_grad_batches
    require(num_micro_batches >= 1, "trainer.accumulate_grad_batches", num_micro_batches, "at least 1")
    allowed = "at least 1, or -1 to go on until trainer.max_steps or trainer.max_time"
    require(trainer.max_epochs != 0, "trainer.max_epochs", trainer.max_epochs, allowed)
    require(trainer.max_steps != 0, "trainer.max_steps", trainer.max_steps, "at least 1, or -1 for no limit")
    num_epochs = trainer.reload_dataloaders_every_n_epochs
    allowed = "1, because each epoch has new data"
    require(num_epochs == 1, "trainer.reload_dataloaders_every_n_epochs", num_epochs, allowed)


def _require_whole_steps(trainer: Any, max_tokens: int | None) -> None:
    """Refuse a limit of micro-batches that would end a phase within an optimizer step."""
    limit, num_micro_batches = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if max_tokens is not None and not isinstance(limit, float):
        raise UserError(
            f"trainer.limit_train_batches = {limit} counts micro-batches, and data.max_tokens_per_micro_batch sets "
            "their number for each phase. Leave out one of them, or limit optimizer steps by trainer.max_steps."
        )
    is_whole = limit == 1.0 if isinstance(limit, float) else limit > 0 and limit % num_micro_batches == 0
    if not is_whole or trainer.overfit_batches:
        raise UserError(
            f"trainer.limit_train_batches = {limit} (overfit_batches = {trainer.overfit_batches}) would end a phase "
            f"within an optimizer step. Give a multiple of accumulate_grad_batches = {num_micro_batches}, or change "
            "data.num_problems and data.num_ppo_epochs instead."
        )


# A whole run


def require_run(trainer: Any, module: Any, data: Any) -> None:
    """Check the settings of a training run across its parts.

    Args:
        trainer: Lightning's Trainer
        module: the EGSPOModule
        data: the HybridDataModule

    Raises:
        UserError: naming the settings that do not fit together, and a remedy.
    """
    _require_phases(trainer)
    require_callbacks(trainer)
    _require_whole_steps(trainer, data.max_tokens_per_micro_batch)
    require_token_budget(data, trainer.accumulate_grad_batches, is_mixed=module.mixes_expert_data)
    _require_groups(module, data)
    _require_switch(module, data)
    _require_shares(trainer.world_size, data)
    _require_staleness(trainer, data)


def require_token_budget(data: Any, num_micro_batches: int, *, is_mixed: bool) -> None:
    """Refuse a budget below the longest row, and a budget together with accumulate_grad_batches.

    Args:
        data: the HybridDataModule
        num_micro_batches: trainer.accumulate_grad_batches
        is_mixed: whether optimizer steps on rollouts carry demonstrations as well

    Raises:
        UserError: the budget cannot be kept, or both are given.
    """
    max_tokens = data.max_tokens_per_micro_batch
    if max_tokens is None:
        return
    if num_micro_batches > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches = {num_micro_batches} gives the number of micro-batches of an optimizer "
            f"step, and data.max_tokens_per_micro_batch = {max_tokens} derives it from a token budget. Leave out "
            "accumulate_grad_batches to bound tokens, or max_tokens_per_micro_batch to give the number."
        )
    longest = data.max_prompt_length + data.max_completion_length + (BLANK_TOKENS if is_mixed else 0)
    allowed = (
        f"at least {longest}, the longest row that data.max_prompt_length and data.max_completion_length allow; "
        "raise it, or lower one of these"
    )
    require(max_tokens >= longest, "data.max_tokens_per_micro_batch", max_tokens, allowed)


def _require_groups(module: Any, data: Any) -> None:
    """Refuse groups that the advantage estimator cannot use."""
    allowed = f"0, or at least 1 / data.num_problems = 1 / {data.num_problems}"
    has_experts = data.expert_fraction > 0
    require(data.num_experts > 0 or not has_experts, "data.expert_fraction", data.expert_fraction, allowed)
    least = module.advantage.min_generations
    allowed = f"at least {least} with this model.advantage, which compares the completions of a group"
    require(data.num_generations >= least, "data.num_generations", data.num_generations, allowed)
    if has_experts and not isinstance(module.advantage, ExpertAdvantage):
        raise UserError(
            f"data.expert_fraction = {data.expert_fraction} puts expert solutions among the rollouts, which "
            "this model.advantage does not support. Set expert_fraction to 0, or choose GroupRelative or LeaveOneOut."
        )


def _require_switch(module: Any, data: Any) -> None:
    """Refuse HPT without a demonstration of each problem, or with another loss on it than SFT's."""
    if not isinstance(module.advantage, HPT):
        return
    why = "because HPT trains problems without a right completion by SFT on their demonstrations"
    fraction, surrogate = data.expert_fraction, module.objective.expert_surrogate
    require(data.num_experts == data.num_problems, "data.expert_fraction", fraction, f"1, {why}")
    require(surrogate == "nll", "model.objective.expert_surrogate", surrogate, f"nll, {why}")


def _require_shares(num_ranks: int, data: Any) -> None:
    """Refuse numbers that the ranks cannot share evenly."""
    allowed = f"a multiple of the {num_ranks} ranks, which share the problems evenly"
    require(data.num_problems % num_ranks == 0, "data.num_problems", data.num_problems, allowed)
    most = data.num_problems * data.num_generations // num_ranks
    allowed = f"at most {most}, the completions that each rank has"
    require(data.num_minibatches <= most, "data.num_minibatches", data.num_minibatches, allowed)


def _require_staleness(trainer: Any, data: Any) -> None:
    """Refuse sampling in a thread where ranks would have to communicate: main threads may be in an all-reduce."""
    if data.max_staleness > 0 and data.max_resampling > 0 and trainer.world_size > 1:
        raise UserError(
            f"data.max_resampling = {data.max_resampling} needs communication between the {trainer.world_size} ranks, "
            f"which is impossible while they train (data.max_staleness = {data.max_staleness}). Set one of them to 0, "
            "or use one rank."
        )
    if data.max_staleness > 0 and isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"data.max_staleness = {data.max_staleness} samples from a copy of the policy while it trains. Under "
            "trainer.strategy fsdp2 each rank holds only a shard of it: two threads would gather weights and reduce "
            "gradients at the same time, in different orders on the ranks. Set max_staleness to 0, or "
            "trainer.strategy to ddp."
        )


# The model's networks


def require_positions(max_positions: int | None, max_prompt_length: int, completions: Mapping[str, int]) -> None:
    """Refuse sequences that are longer than the model supports.

    Args:
        max_positions: longest sequence of the model, in tokens; None where its config does not say
        max_prompt_length: longest prompt, in tokens
        completions: limits of a completion, in tokens, by config field

    Raises:
        UserError: prompt and completion together may have more tokens than the model has positions.
    """
    for field, length in completions.items():
        if max_positions is not None and max_prompt_length + length > max_positions:
            raise UserError(
                f"data.max_prompt_length + {field} = {max_prompt_length} + {length} is more than the {max_positions} "
                "positions of the model. Lower one of them."
            )


def require_separate_passes(networks: Sequence[nn.Module], max_staleness: int) -> None:
    """Refuse sampling in a thread where two threads would mix up weights with adapters.

    peft adapts single parameters by ``torch.nn.utils.parametrize``, whose cache all threads share. A forward pass would
    take weights that were computed before the latest optimizer step.

    Args:
        networks: policy and critic, once they are built
        max_staleness: data.max_staleness

    Raises:
        UserError: adapters of fused experts, with sampling ahead.
    """
    if max_staleness > 0 and any(adapts_parameters(network) for network in networks):
        raise UserError(
            f"data.max_staleness = {max_staleness} samples in a thread, and adapters of fused experts are exact in "
            "one thread only. Set max_staleness to 0, or name the layers of the attention alone in "
            "model.policy.lora.target_modules, such as [q_proj, k_proj, v_proj, o_proj]."
        )


def require_bounded_passes(passes: Any) -> None:
    """Refuse a token budget for a model whose rows go through it padded, because padding breaks the budget.

    Args:
        passes: the policy's ``Passes``, once it is built and sharded

    Raises:
        UserError: it neither packs rows nor splits them into passes.
    """
    if not (passes.packs or passes.splits_rows):
        raise UserError(
            "data.max_tokens_per_micro_batch: under trainer.strategy fsdp2 this model needs padded batches, so a token "
            "budget cannot be kept: it does not use transformers' sdpa attention in a way that keeps packed rows "
            "apart. Set model.policy.attn_implementation to sdpa where it is something else; or "
            "leave the budget out and give trainer.accumulate_grad_batches."
        )
