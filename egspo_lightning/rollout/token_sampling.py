"""Drawing tokens from the logits of each decode step, and what is told of them: log-probabilities and entropies.

A step only does what the next one needs. Its probabilities wait, and the statistics of many steps are taken at once:
with a small vocabulary, launching an operation takes longer than what it does for the rows of one step.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_lightning.ops.token_stats import stats_from_probs
from egspo_lightning.rollout.engine import Sample
from egspo_lightning.types import Sampling

NUMBERS_AHEAD = 64
"""Random numbers are drawn for this many steps at a time: in one go for a short limit, not all of a long one."""
WAITING = 2**19
"""Probabilities, and as many logits, 4 MiB in all, that may wait for their statistics; where a step has more, they are
taken at every step."""


class RandomStreams:
    """Numbers in [0, 1), a stream for each row of a batch: a function of the row's seed alone.

    Args:
        seeds: Their names.
        device: Where the numbers are needed.
    """

    def __init__(self, seeds: Sequence[str], device: torch.device) -> None:
        self._generators = [random.Random(seed) for seed in seeds]
        self._device = device
        self._ahead = torch.empty(len(seeds), 0, device=device)  # (B, steps), drawn and not yet used up
        self._used = 0  # steps of them

    def draw(self, num_left: int) -> Tensor:
        """The next number of each row, (B,) float32; ``num_left`` are the most that will be asked for, with these."""
        if self._used == self._ahead.shape[1]:
            steps, self._used = range(min(NUMBERS_AHEAD, num_left)), 0
            numbers = [[draw() for _ in steps] for draw in (generator.random for generator in self._generators)]
            self._ahead = torch.tensor(numbers, dtype=torch.float32, device=self._device)
        self._used += 1
        return self._ahead[:, self._used - 1]

    def select(self, kept: Tensor) -> None:
        """Keep these rows alone."""
        self._ahead = self._ahead[kept]
        self._generators = [self._generators[row] for row in kept.tolist()]


class _Step(NamedTuple):
    """What has been drawn in a step, (n,) each."""

    rows: Tensor
    """int64, which of all rows"""
    tokens: Tensor
    """int64"""
    running: Tensor
    """bool, whether the row had not ended before"""


class Drawing:
    """Draws the tokens of a batch, a step at a time, and writes them down with their statistics.

    One softmax serves for both. Statistics are of the whole distribution, whatever ``top_p``, and at temperature 1
    where sampling is greedy.

    Args:
        num_rows: B
        num_entries: V
        sampling: temperature, top_p, and how long a completion may be
        device: of the logits
    """

    def __init__(self, num_rows: int, num_entries: int, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._temperature = sampling.temperature or 1.0
        shape = num_rows, sampling.max_completion_length
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs, self._entropies = (torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(2))
        self._lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        shape = max(WAITING // num_entries, num_rows), num_entries
        self._logits, self._probs = (torch.empty(shape, device=device, dtype=torch.float32) for _ in range(2))
        self._waiting: list[_Step] = []
        self._num_waiting = 0  # rows of theirs
        self._num_written = 0  # steps

    def draw(self, logits: Tensor, uniforms: Tensor | None, rows: Tensor, running: Tensor) -> Tensor:
        """One token a row, (n,), by inverting the distribution function; what ended rows are given does not count.

        Args:
            logits: (n, V)
            uniforms: (n,) in [0, 1]; None for greedy
            rows: (n,) int64, which of the B rows they are
            running: (n,) bool, whether they had not ended before
        """
        if self._num_waiting + len(rows) > len(self._probs):
            self._settle()
        place = slice(self._num_waiting, self._num_waiting + len(rows))
        probs = self._probabilities(logits, place)
        if uniforms is None or self._sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = invert(probs, uniforms, self._sampling.top_p)
        self._waiting.append(_Step(rows, tokens, running))
        self._num_waiting += len(rows)
        return tokens

    def _probabilities(self, logits: Tensor, place: slice) -> Tensor:
        """The softmax of a step; it waits for the statistics, with the logits."""
        scaled = self._logits[place].copy_(logits)
        if self._temperature != 1.0:
            scaled.div_(self._temperature)
        return torch.softmax(scaled, -1, out=self._probs[place])

    def _settle(self) -> None:
        """Take the statistics of the steps that wait, and write all down."""
        if not self._waiting:
            return
        numbers = enumerate(self._waiting, self._num_written)
        steps = torch.cat([torch.full_like(step.rows, number) for number, step in numbers])  # without waiting for it
        rows, tokens, running = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        logprobs, entropies = self._statistics(tokens)
        self._tokens[rows, steps] = tokens
        self._logprobs[rows, steps] = logprobs
        self._entropies[rows, steps] = entropies
        self._lengths.index_add_(0, rows, running.long())
        self._num_written += len(self._waiting)
        self._waiting, self._num_waiting = [], 0

    def _statistics(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of all tokens that wait."""
        waiting = slice(self._num_waiting)
        with torch.autocast(tokens.device.type, enabled=False):  # it would take products in half precision
            return stats_from_probs(self._probs[waiting], self._logits[waiting], tokens)

    def samples(self, rows: Tensor, cut_off: Tensor | None = None) -> list[tuple[int, Sample]]:
        """Some rows with what has been drawn for them; those that still run have been cut off.

        Args:
            rows: (n,) int64
            cut_off: int64, which of the B rows still run
        """
        self._settle()
        is_cut = torch.zeros_like(self._lengths, dtype=torch.bool)
        if cut_off is not None:
            is_cut[cut_off] = True
        lengths = self._lengths[rows].tolist()
        longest = max(lengths)  # the limit may be many times that
        written = (whole[rows, :longest].tolist() for whole in (self._tokens, self._logprobs, self._entropies))
        columns = zip(rows.tolist(), lengths, is_cut[rows].tolist(), *written, strict=True)
        return [
            (row, Sample(tokens[:length], cut, logprobs[:length], entropies[:length]))
            for row, length, cut, tokens, logprobs, entropies in columns
        ]


def invert(probs: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """The first v with ``sum_{w <= v} p_w > u`` in each row, (n,).

    Args:
        probs: (n, V)
        uniforms: (n,) in [0, 1]
        top_p: share of the probability that the most probable tokens must reach to be drawn from
    """
    if top_p < 1:
        probs = _nucleus(probs, top_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]  # 1 but for rounding
    # a uniform just below 1 is 1 in float32: without the bound it would choose the last token, possible or not
    target = (uniforms * total).minimum(total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp(max=probs.shape[-1] - 1)  # only NaN exceeds it


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the most probable tokens that reach ``top_p`` together."""
    ranked, order = probs.sort(-1, descending=True)
    kept = ranked.cumsum(-1) - ranked < top_p
    return torch.zeros_like(probs).scatter(-1, order, ranked * kept)
