"""Replay of the non-finite micro-batch that stopped a run: ``egspo replay FILE``."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egspo_lightning.callbacks.run_config import KEY
from egspo_lightning.checkpointing.load import open_checkpoint
from egspo_lightning.cli.parser import Parser
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.training.nonfinite_updates import RecordedMicroBatch, bad_tokens, unpack
from egspo_lightning.types import NetworkOutputs

NUM_SHOWN = 20
"""Number of tokens or weights that the report lists by name."""


def replay(path: Path) -> list[str]:
    """Report of the loss, and of the weights, tokens and gradients that are not finite, as lines.

    Raises:
        UserError: the file holds no non-finite micro-batch, or its weights are sharded.
    """
    checkpoint = open_checkpoint(path)
    kept, config = checkpoint["egspo"]["finite"].get("bad_micro_batch"), checkpoint.get(KEY)
    if kept is None or config is None:
        raise UserError(
            f"replay: {path} holds no micro-batch that was not finite. Give the nonfinite.ckpt that a stopped run "
            "has written."
        )
    if not checkpoint.get("state_dict"):
        raise UserError(
            f"replay: the weights of {path} are sharded. Repeat the run with a strategy that keeps them whole."
        )
    module, recorded = _module(config["model"]), unpack(kept)
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    with torch.enable_grad():
        loss, current = module.replay(recorded)
        loss.backward()
    return _report(path, recorded, loss.detach(), current, module)


def _module(config: dict[str, Any]) -> EGSPOModule:
    """Build the module of the run from its config, without trainer and data."""
    parser = Parser()
    parser.add_lightning_class_args(EGSPOModule, "model")
    module = parser.instantiate_classes(parser.parse_object({"model": config})).model
    assert isinstance(module, EGSPOModule)
    return module


def _report(
    path: Path, recorded: RecordedMicroBatch, loss: Tensor, current: NetworkOutputs, module: EGSPOModule
) -> list[str]:
    weights = [name for name, p in module.named_parameters() if not p.isfinite().all()]
    gradients = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return [
        f"{path}: micro-batch {recorded.number} of stage {recorded.batch.stage}",
        f"loss {loss.item():.6g} (in training {recorded.loss.item():.6g})",
        *_some("weights", weights),
        *_some("gradients", gradients),
        *_some("tokens", _bad_tokens(recorded, current, module)),
    ]


def _bad_tokens(recorded: RecordedMicroBatch, current: NetworkOutputs, module: EGSPOModule) -> list[str]:
    """The tokens that have a value that is not finite, with its name."""
    rollout = recorded.batch.rollout
    batch = rollout or recorded.batch.expert
    assert batch is not None
    named = [("logprob", current.logprobs), ("entropy", current.entropies), ("value", current.values)]
    if rollout is not None:
        given = ("old_logprobs", "entropies", "ref_logprobs", "advantages", "returns")
        named += [(name, getattr(rollout, name)) for name in given]
    ids, decode = batch.input_ids.tolist(), module.tokenizer.decode
    return [
        f"row {row}, position {at}, token {ids[row][at]} {decode([ids[row][at]])!r}: {name} is {value}"
        for row, at, name, value in bad_tokens(batch.completion_mask, named)
    ]


def _some(what: str, found: list[str]) -> list[str]:
    """The number of the findings, and the first of them."""
    lines = [f"{what} that are not finite: {len(found)}", *(f"  {line}" for line in found[:NUM_SHOWN])]
    return lines if len(found) <= NUM_SHOWN else [*lines, f"  and {len(found) - NUM_SHOWN} more"]
