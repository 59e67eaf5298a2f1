"""HFExport: saves the trained policy in Hugging Face format."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig

from egspo_lightning.callbacks.run_callback import RunCallback
from egspo_lightning.callbacks.trainer_access import module_of
from egspo_lightning.checkpointing import atomic_files
from egspo_lightning.errors import UserError
from egspo_lightning.models.lora_merge import merged
from egspo_lightning.training.trainer import log_folder

EXPORTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Patterns of the files that transformers saves; a folder with any other file is never replaced."""


class HFExport(RunCallback):
    """After training, saves model and tokenizer for ``AutoModelForCausalLM.from_pretrained``.

    Args:
        folder: Output folder; "hf" in the log folder by default. An earlier export there is replaced.
        enabled: Whether to export.
    """

    of_run = ("exported",)

    def __init__(self, folder: str | None = None, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self.exported: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the folder before training starts.

        Raises:
            UserError: the folder holds other files than an export, or is the model that training starts from.
        """
        super().setup(trainer, pl_module, stage)
        folder = Path(self.folder) if self.enabled and self.folder is not None else None
        if folder is None or not folder.exists():
            return
        source = Path(module_of(pl_module).policy_config.name_or_path)
        if source.exists() and source.resolve() == folder.resolve():
            raise UserError(f"hf_export.folder: {folder} is the model that training starts from. Name another folder.")
        if not folder.is_dir() or any(not any(map(path.match, EXPORTED)) for path in folder.iterdir()):
            raise UserError(f"hf_export.folder: {folder} holds other files than a model. Name a new or empty folder.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights on all ranks, and write them on the first."""
        if not self.enabled:
            return
        target = Path(self.folder) if self.folder is not None else log_folder(trainer) / "hf"
        module = module_of(pl_module)
        lm, options = module.networks.policy.lm, StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(lm, options=options)
        if trainer.is_global_zero:
            partial = atomic_files.partial_of(target)
            atomic_files.delete(partial)
            configured = lm.generation_config  # its penalties and filters were not used in training
            lm.generation_config = GenerationConfig(
                eos_token_id=module.eos_ids, pad_token_id=module.tokenizer.pad_token_id
            )
            lm.save_pretrained(partial, state_dict=merged(lm, weights))
            lm.generation_config = configured
            module.tokenizer.save_pretrained(partial)
            atomic_files.replace(partial, target)
        trainer.strategy.barrier("hf_export")
        self.exported = target
