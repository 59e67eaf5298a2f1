"""Token sampling: draws tokens from the logits of each decode step and records their log-probabilities and entropies.

A decode step computes only what the next step needs. Statistics are computed later, for many steps at once: with a
small vocabulary, an operation takes longer to launch than to process the rows of one step.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from egspo_lightning.ops.token_stats import stats_from_probs
from egspo_lightning.rollout.engine import Sample
from egspo_lightning.types import Sampling

NUMBERS_AHEAD = 64
"""Decode steps whose random numbers are drawn at once. A long limit does not cost numbers that nothing uses."""
MAX_PENDING = 2**19
"""Most probabilities, and as many logits, that wait for their statistics: 4 MiB in all. Larger steps do not wait."""


class RandomStreams:
    """Uniform random numbers in [0, 1), with a stream for each row of a batch that depends on the row's seed alone.

    Args:
        seeds: Names of the streams.
        device: Device of the numbers.
    """

    def __init__(self, seeds: Sequence[str], device: torch.device) -> None:
        self._generators = [random.Random(seed) for seed in seeds]
        self._device = device
        self._ahead = torch.empty(len(seeds), 0, device=device)  # (B, steps), drawn in advance
        self._used = 0  # steps of them

    def draw(self, num_left: int) -> Tensor:
        """The next number of each row, (B,) float32; ``num_left`` is the most calls to come, this one included."""
        if self._used == self._ahead.shape[1]:
            steps, self._used = range(min(NUMBERS_AHEAD, num_left)), 0
            numbers = [[draw() for _ in steps] for draw in (generator.random for generator in self._generators)]
            self._ahead = torch.tensor(numbers, dtype=torch.float32, device=self._device)
        self._used += 1
        return self._ahead[:, self._used - 1]

    def select(self, kept: Tensor) -> None:
        """Keep only these rows."""
        self._ahead = self._ahead[kept]
        self._generators = [self._generators[row] for row in kept.tolist()]


class TokenSampler:
    """Samples the tokens of a batch step by step, and records them with their statistics.

    One softmax serves sampling and statistics. Statistics describe the whole distribution, whatever ``top_p``; greedy
    sampling takes them at temperature 1.

    Args:
        num_rows: B
        num_entries: V
        sampling: temperature, top_p, and the length limit
        device: device of the logits
    """

    def __init__(self, num_rows: int, num_entries: int, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._temperature = sampling.temperature or 1.0
        shape = num_rows, sampling.max_completion_length
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs, self._entropies = (torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(2))
        self._lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        shape = max(MAX_PENDING // num_entries, num_rows), num_entries
        self._logits, self._probs = (torch.empty(shape, device=device, dtype=torch.float32) for _ in range(2))
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, tokens and running of each step, see ``draw``
        self._num_pending = 0  # rows of the pending steps
        self._num_recorded = 0  # steps

    def draw(self, logits: Tensor, uniforms: Tensor | None, rows: Tensor, running: Tensor) -> Tensor:
        """Sample one token for each row, (n,), by inverting the distribution function; ended rows are ignored later.

        Args:
            logits: (n, V)
            uniforms: (n,) in [0, 1]; None for greedy
            rows: (n,) int64, row numbers in the whole batch
            running: (n,) bool, false where the row has ended
        """
        if self._num_pending + len(rows) > len(self._probs):
            self._record_pending()
        place = slice(self._num_pending, self._num_pending + len(rows))
        scaled = self._logits[place].copy_(logits)
        if self._temperature != 1.0:
            scaled.div_(self._temperature)
        probs = torch.softmax(scaled, -1, out=self._probs[place])
        if uniforms is None or self._sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = invert(probs, uniforms, self._sampling.top_p)
        self._pending.append((rows, tokens, running))
        self._num_pending += len(rows)
        return tokens

    def _record_pending(self) -> None:
        """Compute the statistics of the pending steps, and record their tokens."""
        if not self._pending:
            return
        numbers = enumerate(self._pending, self._num_recorded)
        steps = torch.cat([torch.full_like(rows, number) for number, (rows, _, _) in numbers])  # no wait for the device
        rows, tokens, running = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._tokens[rows, steps] = tokens
        pending = slice(self._num_pending)
        with torch.autocast(tokens.device.type, enabled=False):  # autocast would multiply in half precision
            statistics = stats_from_probs(self._probs[pending], self._logits[pending], tokens)
        self._logprobs[rows, steps], self._entropies[rows, steps] = statistics
        self._lengths.index_add_(0, rows, running.long())
        self._num_recorded += len(self._pending)
        self._pending, self._num_pending = [], 0

    def samples(self, rows: Tensor, cut_off: Tensor | None = None) -> list[tuple[int, Sample]]:
        """The samples of some rows, as (row, sample); rows in ``cut_off`` are truncated.

        Args:
            rows: (n,) int64
            cut_off: int64, rows that have not ended
        """
        self._record_pending()
        truncated = set() if cut_off is None else set(cut_off.tolist())
        lengths = self._lengths[rows].tolist()
        longest = max(lengths)  # the limit may be many times longer
        recorded = (whole[rows, :longest].tolist() for whole in (self._tokens, self._logprobs, self._entropies))
        return [
            (row, Sample(tokens[:length], row in truncated, logprobs[:length], entropies[:length]))
            for row, length, tokens, logprobs, entropies in zip(rows.tolist(), lengths, *recorded, strict=True)
        ]


def invert(probs: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """The first v with ``sum_{w <= v} p_w > u`` in each row, (n,).

    Args:
        probs: (n, V)
        uniforms: (n,) in [0, 1]
        top_p: nucleus sampling draws from the most probable tokens, the fewest whose probabilities reach this sum
    """
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        kept = ranked.cumsum(-1) - ranked < top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked * kept)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]  # 1, up to rounding
    # a uniform just below 1 is 1 in float32: without the bound it would choose the last token, possible or not
    target = (uniforms * total).minimum(total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp(max=probs.shape[-1] - 1)  # only NaN exceeds it
