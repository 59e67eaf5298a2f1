"""Shows what the policy writes: a few completions with their rewards and the gate's marks, as text in the logger."""

from collections.abc import Iterator
from html import escape
from math import isfinite

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.analysis.token_text import visible
from egspo_lightning.callbacks.logger_displays import SHOWS_TEXT, log_text, note_once
from egspo_lightning.callbacks.token_records import TokenRecords
from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.scoring import CollectedRollouts
from egspo_lightning.types import Completion

SEPARATOR = "\n\n---\n\n"


class RolloutSamples(Callback):
    """Logs the first completions of a collection as text: in TensorBoard, Weights & Biases and MLflow.

    Tokens that the gate let through whole are bold, and the pointer on one shows its values. TensorBoard's text knows
    neither colors nor links to files, so the page with all tokens colored is given as the command that makes it.

    Args:
        every_n_rollout_batches: How often; 0 is never.
        num_samples: Completions logged at a time.
        max_characters: A longer text is cut, and says so.
    """

    def __init__(self, every_n_rollout_batches: int = 10, num_samples: int = 4, max_characters: int = 4000) -> None:
        super().__init__()
        if every_n_rollout_batches < 0 or num_samples < 1:
            raise UserError(
                "rollout_samples.every_n_rollout_batches must be at least 0 and .num_samples at least 1, got "
                f"{every_n_rollout_batches} and {num_samples}."
            )
        self.every_n_rollout_batches, self.num_samples, self.max_characters = (
            every_n_rollout_batches,
            num_samples,
            max_characters,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where completions are seen with loggers that keep no text."""
        if self.every_n_rollout_batches:
            instead = "keeps no text; completions are in the token records, see python -m egspo_lightning.analysis."
            note_once(trainer, "rollout_samples", SHOWS_TEXT, instead)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the collection that this epoch trained on."""
        data, log_dir = data_of(trainer), trainer.log_dir  # log_dir is broadcast: ask on every rank
        rollouts = data.rollouts
        if rollouts is None or not self.every_n_rollout_batches:
            return
        if (data.num_rollout_batches - 1) % self.every_n_rollout_batches == 0 and trainer.is_global_zero:
            module = module_of(pl_module)
            samples = [self._sample(rollouts, row, module) for row in range(self._num_shown(rollouts))]
            log_text(trainer, "rollout/samples", SEPARATOR.join([*samples, *_pointers(trainer, log_dir)]))

    def _num_shown(self, rollouts: CollectedRollouts) -> int:
        return min(self.num_samples, len(rollouts.completions))

    def _sample(self, rollouts: CollectedRollouts, row: int, module: EGSPOModule) -> str:
        """Verdict and problem as indented blocks, which Markdown shows as they are; then the marked tokens."""
        completion = rollouts.completions[row]
        blocks = [_block(self._cut(text)) for text in (_verdict(completion), completion.problem.problem)]
        return "\n\n".join([*blocks, f"<pre>{''.join(self._tokens(rollouts, row, module))}</pre>"])

    def _tokens(self, rollouts: CollectedRollouts, row: int, module: EGSPOModule) -> Iterator[str]:
        """The tokens as HTML, at most ``max_characters`` of text."""
        rollout, token_ids = rollouts.batch, rollouts.completions[row].token_ids
        mask, threshold = rollout.completion_mask[row], rollout.threshold[row].item()
        values = zip(rollout.entropies[row][mask].tolist(), rollout.advantages[row][mask].tolist(), strict=True)
        length = 0
        for i, (token_id, (entropy, advantage)) in enumerate(zip(token_ids, values, strict=True)):
            text = visible(module.tokenizer.decode([token_id])).replace("\u240a", "\u240a\n")
            length += len(text)
            if length > self.max_characters:
                yield f" ... ({len(token_ids) - i} more tokens)"
                return
            is_marked = isfinite(threshold) and entropy >= threshold  # an open gate marks nothing
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


def _pointers(trainer: Trainer, log_dir: str | None) -> list[str]:
    """What the marks mean, and how all recorded tokens are seen in color."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    lines = ["Bold: let through whole by the gate."]
    if log_dir is not None and any(isinstance(c, TokenRecords) and c.every_n_rollout_batches for c in callbacks):
        lines += ["All recorded tokens, colored by entropy:", ""]
        lines.append(_block(f"python -m egspo_lightning.analysis {log_dir} --html completions.html"))
    return ["\n".join(lines)]


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
