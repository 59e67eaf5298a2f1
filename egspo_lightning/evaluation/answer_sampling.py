"""How many answers are sampled to a problem, and how."""

from dataclasses import dataclass

from egspo_lightning.errors import UserError, require
from egspo_lightning.types import Sampling, require_sampling


@dataclass(frozen=True)
class AnswerSampling:
    """How problems are answered: once and greedily by default.

    Args:
        num_samples: Answers to each problem.
        temperature: Of sampling; 0 is greedy.
        top_p: The probability mass that is sampled from, in (0, 1].
        max_completion_length: Tokens of an answer at most; null for the length of the training rollouts.
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_completion_length: int | None = None

    def require_sense(self, where: str) -> None:
        """Refuse what cannot be sampled; ``where`` begins the message.

        Raises:
            UserError: a value is out of range, or several samples are asked for greedily.
        """
        require(self.num_samples >= 1, f"{where} num_samples", self.num_samples, "at least 1")
        length = 1 if self.max_completion_length is None else self.max_completion_length  # null is always allowed
        require_sampling(length, self.temperature, self.top_p, where)
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"{where} num_samples is {self.num_samples}, but at temperature 0 all samples are the same. "
                "Set a temperature above 0, or num_samples to 1."
            )

    def within(self, max_completion_length: int) -> Sampling:
        """The sampling of each answer; the given length counts where none is set."""
        length = self.max_completion_length
        return Sampling(max_completion_length if length is None else length, self.temperature, self.top_p)


GREEDY = AnswerSampling()
"""Where the defaults stand."""
