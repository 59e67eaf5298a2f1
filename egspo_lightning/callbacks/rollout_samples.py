"""RolloutSamples: sample completions with rewards and high-entropy tokens, as text in the logger."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.analysis.record_schema import files_of
from egspo_lightning.analysis.token_text import shown
from egspo_lightning.callbacks.logger_displays import SHOWS_TEXT, log_text, note_once
from egspo_lightning.callbacks.trainer_access import due_rollout_batch, module_of, step_of_phase
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.rollout_records import CollectedRollouts
from egspo_lightning.training.trainer import log_folder
from egspo_lightning.types import Completion, NonNegativeInt, PositiveInt

SEPARATOR = "\n\n---\n\n"


class RolloutSamples(Callback):
    """Logs the first completions of a rollout batch as text: in TensorBoard, Weights & Biases and MLflow.

    High-entropy tokens, which take the full update, are bold; hovering over one shows its values. TensorBoard's text
    has neither colors nor links to files. Once token records exist, the text ends with the command that writes a page
    of colored tokens from them.

    Args:
        every_n_rollout_batches: Interval in rollout batches; 0 logs none.
        num_samples: Completions logged at a time.
        max_characters: Length limit of a text; a longer one is cut, and says so.
    """

    def __init__(
        self,
        every_n_rollout_batches: NonNegativeInt = 10,
        num_samples: PositiveInt = 4,
        max_characters: PositiveInt = 4000,
    ) -> None:
        self.every_n_rollout_batches = every_n_rollout_batches
        self.num_samples, self.max_characters = num_samples, max_characters

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell where to find completions if a logger keeps no text."""
        if self.every_n_rollout_batches:
            instead = "keeps no text; completions are in the token records, see egspo report."
            note_once(trainer, "rollout_samples", SHOWS_TEXT, instead)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rollout batch of the ending phase."""
        rollouts = due_rollout_batch(trainer, self.every_n_rollout_batches)
        log_dir = log_folder(trainer)
        if rollouts is not None and trainer.is_global_zero:
            num_shown = min(self.num_samples, len(rollouts.completions))
            samples = [self._sample(rollouts, row, module_of(pl_module)) for row in range(num_shown)]
            text = SEPARATOR.join([*samples, _legend(log_dir)])
            log_text(trainer, "rollout/samples", text, step_of_phase(trainer))

    def _sample(self, rollouts: CollectedRollouts, row: int, module: EGSPOModule) -> str:
        """Verdict and problem as indented blocks, which Markdown shows literally; then the tokens."""
        completion = rollouts.completions[row]
        verdict = _verdict(completion) + (", masked: not in the loss" if rollouts.batch.is_masked[row] else "")
        blocks = [_block(self._cut(text)) for text in (verdict, completion.problem.problem)]
        return "\n\n".join([*blocks, f"<pre>{''.join(self._tokens(rollouts, row, module))}</pre>"])

    def _tokens(self, rollouts: CollectedRollouts, row: int, module: EGSPOModule) -> Iterator[str]:
        """The tokens as HTML, at most ``max_characters`` of text."""
        rollout, token_ids = rollouts.batch, rollouts.completions[row].token_ids
        mask = rollout.completion_mask[row]
        has_gate = rollout.threshold[row].isfinite() and not rollout.is_masked[row]  # an open gate highlights nothing
        columns = (rollout.entropies, rollout.advantages, rollout.is_high)
        values = zip(*(column[row][mask].tolist() for column in columns), strict=True)
        length = 0
        for i, (token_id, (entropy, advantage, is_high)) in enumerate(zip(token_ids, values, strict=True)):
            text = shown(module.tokenizer.decode([token_id]))
            length += len(text)
            if length > self.max_characters:
                yield f" ... ({len(token_ids) - i} more tokens)"
                return
            is_marked = has_gate and is_high
            hint = f"entropy {entropy:.3g} nats, advantage {advantage:.3g}"
            yield f'<strong><a title="{hint}">{escape(text)}</a></strong>' if is_marked else escape(text)

    def _cut(self, text: str) -> str:
        if len(text) <= self.max_characters:
            return text
        return f"{text[: self.max_characters]} ... ({len(text) - self.max_characters} more characters)"


def _verdict(completion: Completion) -> str:
    found = "none" if completion.extracted is None else completion.extracted
    terms = ", ".join(f"{name} {value:g}" for name, value in completion.reward_terms.items())
    reward = f"reward {completion.reward:g}" + (f" ({terms})" if len(completion.reward_terms) > 1 else "")
    return f"{reward}, answer {found}, gold {completion.problem.answer}, {completion.status}"


def _legend(log_dir: Path) -> str:
    """The meaning of bold tokens, and the command that shows all recorded tokens in color."""
    legend = "Bold: high-entropy token, takes the full update."
    if not files_of(log_dir, "tokens"):
        return legend
    command = f"python -m egspo_lightning report {log_dir} -o report.html"
    return f"{legend}\nAll recorded tokens, colored by entropy:\n\n{_block(command)}"


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
