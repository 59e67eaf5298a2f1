"""Shows what the policy writes: a few completions with their rewards, as text in the logger."""

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.access import data_of, tensorboard_writer
from egspo_lightning.errors import UserError
from egspo_lightning.types import Completion


class RolloutSamples(Callback):
    """Logs the first completions of a collection as text in TensorBoard.

    Args:
        every_n_collections: How often; 0 is never.
        num_samples: Completions logged at a time.
        max_characters: A longer text is cut, and says so.
    """

    def __init__(self, every_n_collections: int = 10, num_samples: int = 4, max_characters: int = 4000) -> None:
        super().__init__()
        if every_n_collections < 0 or num_samples < 1:
            raise UserError(
                "rollout_samples.every_n_collections must be at least 0 and .num_samples at least 1, got "
                f"{every_n_collections} and {num_samples}."
            )
        self.every_n_collections, self.num_samples, self.max_characters = (
            every_n_collections,
            num_samples,
            max_characters,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the collection that this epoch trained on."""
        data = data_of(trainer)
        writer = tensorboard_writer(trainer)
        collection = data.collection
        if writer is None or collection is None or not self.every_n_collections:
            return
        if (data.num_collections - 1) % self.every_n_collections == 0:
            text = "\n\n---\n\n".join(self._markdown(c) for c in collection.completions[: self.num_samples])
            writer.add_text("rollout/samples", text, trainer.global_step)

    def _markdown(self, completion: Completion) -> str:
        """As indented blocks, in which Markdown and HTML are shown and not interpreted."""
        found = "none" if completion.extracted is None else completion.extracted
        terms = ", ".join(f"{name} {value:g}" for name, value in completion.reward_terms.items())
        reward = f"reward {completion.reward:g}" + (f" ({terms})" if len(completion.reward_terms) > 1 else "")
        head = f"{reward}, answer {found}, gold {completion.problem.answer}, {completion.status}"
        return "\n\n".join(_block(self._cut(text)) for text in (head, completion.problem.problem, completion.text))

    def _cut(self, text: str) -> str:
        if len(text) <= self.max_characters:
            return text
        return f"{text[: self.max_characters]} ... ({len(text) - self.max_characters} more characters)"


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
