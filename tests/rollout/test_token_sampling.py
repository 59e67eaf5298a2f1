"""Token sampling: draws against exact distributions, and token statistics against float64."""

import math
import random

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from egspo_lightning.rollout import token_sampling
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.token_sampling import NUMBERS_AHEAD, RandomStreams, TokenSampler
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling


def draw(logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> Tensor:
    """Draw one token for each row of logits."""
    rows = torch.arange(len(logits))
    whole = TokenSampler(len(logits), logits.shape[-1], sampling, logits.device)
    return whole.draw(logits, uniforms, rows, torch.ones_like(rows, dtype=torch.bool))


def chi_square_excess(counts: Tensor, probs: Tensor) -> float:
    """Pearson's statistic, in standard deviations from its mean; cells that expect fewer than 5 counts are pooled."""
    expected = probs * counts.sum()
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum().view(1)]).double()
    wanted = torch.cat([expected[big], expected[~big].sum().view(1)]).double()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    return (((observed - wanted) ** 2 / wanted).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, generator=generator) * 1.5
    uniforms = torch.rand(40_000, generator=generator)
    tokens = draw(logits.expand(40_000, -1), uniforms, Sampling(1, temperature))
    probs = torch.softmax(logits.double() / temperature, 0)
    assert chi_square_excess(tokens.bincount(minlength=12), probs) < 4
    others = torch.softmax(logits.double() / (temperature * 1.15), 0)
    assert chi_square_excess(tokens.bincount(minlength=12), others) > 10  # the bound above can fail


def test_token_pairs_are_drawn_with_their_joint_probability():
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    lm = LlamaForCausalLM(config).eval()
    prompt, count, temperature = [3, 1, 4], 6000, 1.3
    with torch.no_grad():
        heads = torch.tensor([[*prompt, first] for first in range(9)])
        log_probs = (lm(input_ids=heads).logits.double() / temperature).log_softmax(-1)
    joint = (log_probs[:, 2].diagonal().unsqueeze(1) + log_probs[:, 3]).exp()  # (first, second)
    assert joint.sum().item() == pytest.approx(1.0)
    requests = [Request(prompt, f"seed/{i}") for i in range(count)]
    samples = TransformersEngine(count).generate(lm, requests, Sampling(2, temperature), eos_ids=[], pad_id=0)
    cells = torch.tensor([9 * a + b for a, b in (sample.token_ids for sample in samples)])
    assert chi_square_excess(cells.bincount(minlength=81), joint.flatten()) < 4


def test_inverse_transform_sampling_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, 4)
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.9999])
    assert draw(logits, uniforms, Sampling(1)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sampling_temperature_by_hand():
    logits = torch.tensor([0.2, 0.8]).log().expand(4, 2)
    uniforms = torch.tensor([0.05, 0.07, 0.32, 0.34])  # T = 1/2: p_0 = 1/17; T = 2: p_0 = 1/3
    assert draw(logits, uniforms, Sampling(1, temperature=0.5)).tolist() == [0, 1, 1, 1]
    assert draw(logits, uniforms, Sampling(1, temperature=2.0)).tolist() == [0, 0, 0, 1]
    assert draw(logits, uniforms, Sampling(1, temperature=0.0)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.95, {0, 1, 2, 3}), (0.85, {0, 1, 3}), (0.7, {1, 3}), (0.3, {1})]
)
def test_nucleus_sampling_by_hand(top_p, kept):
    probs = torch.tensor([0.2, 0.4, 0.1, 0.3])  # ranked: 1 (0.4), 3 (0.7), 0 (0.9), 2 (1.0)
    uniforms = (torch.arange(20_000) + 0.5) / 20_000  # evenly spaced in the unit interval
    tokens = draw(probs.log().expand(20_000, -1), uniforms, Sampling(1, top_p=top_p))
    assert set(tokens.tolist()) == kept
    mass = sum(probs[token].item() for token in kept)
    for token in kept:
        share = (tokens == token).float().mean().item()
        assert share == pytest.approx(probs[token].item() / mass, abs=2e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_token_with_probability_zero_is_never_drawn(top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 1000, generator=generator)
    impossible = torch.rand(1000, generator=generator) < 0.5
    impossible[0] = impossible[-1] = impossible[-2] = True
    logits[:, impossible] = -torch.inf
    for u in (0.0, 1e-12, 0.5, 1 - 2**-20, 1 - 2**-24, 1.0):  # a double just below 1 is 1 in float32
        tokens = draw(logits, torch.full((256,), u), Sampling(1, top_p=top_p))
        assert not impossible[tokens].any(), u


# Random numbers


def test_random_numbers_depend_only_on_the_seed_of_the_row():
    seeds, steps = ["0/a/0", "0/a/1", "0/b/0"], 2 * NUMBERS_AHEAD + 3
    streams, kept, drawn = RandomStreams(seeds, torch.device("cpu")), [0, 1, 2], {seed: [] for seed in seeds}
    for step in range(steps):
        for row, number in zip(kept, streams.draw(steps - step).tolist(), strict=True):
            drawn[seeds[row]].append(number)
        if step in (5, NUMBERS_AHEAD - 1):  # inside a block, and at its end
            kept = kept[1:] if step == 5 else kept[1:2]
            streams.select(torch.tensor([1, 2] if step == 5 else [1]))
    for seed, numbers in drawn.items():
        draw = random.Random(seed).random
        assert numbers == torch.tensor([draw() for _ in numbers]).tolist()
    assert [len(drawn[seed]) for seed in seeds] == [6, NUMBERS_AHEAD, steps]


# Statistics


def samples_and_reference(
    steps: list[tuple[list[int], Tensor, list[bool]]], num_rows: int, sampling: Sampling, cut_off: list[int]
):
    """Samples of the given steps (rows, logits, whether each row is running), and float64 statistics for each row."""
    whole = TokenSampler(num_rows, steps[0][1].shape[-1], sampling, torch.device("cpu"))
    expected: list[list[tuple[int, float, float]]] = [[] for _ in range(num_rows)]
    for rows, logits, running in steps:
        uniforms = None if sampling.temperature == 0 else torch.rand(len(rows))
        tokens = whole.draw(logits, uniforms, torch.tensor(rows), torch.tensor(running))
        log_probs = (logits.double() / (sampling.temperature or 1.0)).log_softmax(-1)
        for row, token, its, runs in zip(rows, tokens.tolist(), log_probs, running, strict=True):
            if runs:
                expected[row].append((token, its[token].item(), torch.special.entr(its.exp()).sum().item()))
    done = whole.samples(torch.arange(num_rows), torch.tensor(cut_off, dtype=torch.long))
    assert [row for row, _ in done] == list(range(num_rows))
    return [sample for _, sample in done], expected


@pytest.mark.parametrize("waiting", [0, 3 * 50, 2**20])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_token_statistics_are_correct_when_rows_end_or_leave(monkeypatch, waiting, temperature, top_p):
    monkeypatch.setattr(token_sampling, "MAX_PENDING", waiting)  # buffer of no rows, three rows, all rows
    torch.manual_seed(0)
    plan = [
        ([0, 1, 2, 3], [True] * 4),
        ([0, 1, 2, 3], [True, True, False, True]),
        ([0, 3], [True, True]),
        ([3], [True]),
    ]
    steps = [(rows, torch.randn(len(rows), 50) * 3, running) for rows, running in plan]
    samples, expected = samples_and_reference(steps, 4, Sampling(6, temperature, top_p), cut_off=[3])
    assert [len(sample.token_ids) for sample in samples] == [3, 2, 1, 4]
    assert [sample.is_truncated for sample in samples] == [False, False, False, True]
    for sample, row in zip(samples, expected, strict=True):
        tokens, logprobs, entropies = zip(*row, strict=True)
        assert sample.token_ids == list(tokens)
        assert sample.logprobs == pytest.approx(logprobs, abs=2e-6)
        assert sample.entropies == pytest.approx(entropies, abs=2e-6)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1000.0, 1e5])
def test_token_statistics_of_large_logits_are_accurate(size):
    torch.manual_seed(0)
    logits = (torch.randn(64, 300) + 1) * size
    logits[0, :2] = logits[0].max() + size  # two tokens share all probability
    samples, expected = samples_and_reference([(list(range(64)), logits, [True] * 64)], 64, Sampling(1), cut_off=[])
    for sample, row in zip(samples, expected, strict=True):
        _, logprob, entropy = row[0]
        assert sample.entropies[0] >= 0
        assert sample.entropies[0] == pytest.approx(entropy, abs=2e-6)
        assert sample.logprobs[0] == pytest.approx(logprob, abs=2e-6)
    assert samples[0].entropies[0] == pytest.approx(math.log(2) if size > 1 else math.log(300), abs=1e-2)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_token_statistics_do_not_depend_on_default_dtype(default):
    torch.manual_seed(0)
    logits, uniforms = torch.randn(40, 70) * 4, torch.rand(40)
    rows, running = torch.arange(40), torch.ones(40, dtype=torch.bool)
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            whole = TokenSampler(40, 70, Sampling(1), torch.device("cpu"))
            whole.draw(logits, uniforms, rows, running)
            found.append(whole.samples(rows))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(40, 70) * 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples, expected = samples_and_reference(
            [(list(range(40)), logits, [True] * 40)], 40, Sampling(1, 0.8), cut_off=[]
        )
    for sample, row in zip(samples, expected, strict=True):
        assert (sample.logprobs[0], sample.entropies[0]) == pytest.approx(row[0][1:], abs=3e-6)
