"""Hyperparameters of a run, as the dashboard shows them: the part of the config that decides what is trained."""

from typing import Any

from egspo_lightning.callbacks.run_config import flatten_by_class

HYPERPARAMETERS = ("seed_everything", "model", "data", "stage_transition")
"""Sections of the config that are hyperparameters as a whole, but for ``ONLY_EVALUATION``."""
ONLY_EVALUATION = ("benchmarks", "eval_batch_size", "evaluation_grader", "predict_sampling")
"""Keys of ``data`` that are left out."""
TRAINER_HYPERPARAMETERS = (
    "max_epochs",
    "max_steps",
    "precision",
    "strategy",
    "devices",
    "num_nodes",
    "accumulate_grad_batches",
    "gradient_clip_val",
)
"""Keys of ``trainer`` that are hyperparameters."""


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters in a config of fit, by dotted key."""
    data = {key: value for key, value in config["data"].items() if key not in ONLY_EVALUATION}
    trainer = {key: config["trainer"][key] for key in TRAINER_HYPERPARAMETERS}
    return flatten_by_class({key: config[key] for key in HYPERPARAMETERS} | {"data": data, "trainer": trainer})
