"""TransformersEngine against transformers' `generate`, the forward pass, and other batch sizes."""

import itertools
import tracemalloc
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM as CausalLM
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from egspo_lightning.models.policy import Policy
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.token_sampling import NUMBERS_AHEAD
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling

VOCABULARY, PAD = 40, 0
ROPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,  # large, so that outputs vary and depend on positions
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**ROPE),
    "qwen2-gqa": Qwen2Config(**ROPE, num_key_value_heads=2),
    "qwen3-gqa": Qwen3Config(**ROPE, num_key_value_heads=2, head_dim=8),
    "neox": GPTNeoXConfig(**ROPE),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4),
}
WITHOUT_LOOP: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.4),
    "lfm2": Lfm2Config(**ROPE, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "no-cache": OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
"""Models that ``generate`` decodes: a recurrent state, convolutions and attention, neither positions nor a cache."""
PROMPTS = [[5, 9, 3], [7], [11, 2, 8, 30, 21, 4, 4, 19], [12, 13], [5, 9, 3, 1, 1, 6]]


class Drawn(NamedTuple):
    """A sample without log-probabilities, whose last digit depends on the batch."""

    token_ids: list[int]
    is_truncated: bool


def build(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return CausalLM.from_config((CONFIGS | WITHOUT_LOOP)[name]).eval()


@pytest.fixture(scope="module")
def lm() -> nn.Module:
    return build()


def generate(lm, prompts, sampling, eos_ids=(), *, seeds=None, max_batch_size=256) -> list[Drawn]:
    seeds = seeds or [f"seed/{i}" for i in range(len(prompts))]
    requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    engine = TransformersEngine(max_batch_size)
    samples = engine.generate(lm, requests, sampling, eos_ids=list(eos_ids), pad_id=PAD)
    assert all(len(sample.logprobs) == len(sample.token_ids) for sample in samples)
    return [Drawn(sample.token_ids, sample.is_truncated) for sample in samples]


def reference(lm, prompt: list[int], length: int, eos_ids: list[int] | None = None) -> list[int]:
    """Greedy continuation of one unpadded prompt by transformers."""
    ids = torch.tensor([prompt])
    output = lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=eos_ids,
        pad_token_id=PAD,
    )
    return output[0, len(prompt) :].tolist()


# Greedy decoding


@pytest.mark.parametrize("name", [*CONFIGS, *WITHOUT_LOOP])
def test_greedy_equals_generate_for_prompts_of_different_lengths(name):
    lm = build(name)
    expected = [reference(lm, prompt, 20) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 5
    samples = generate(lm, PROMPTS, Sampling(20, temperature=0.0))
    assert [sample.token_ids for sample in samples] == expected
    assert all(sample.is_truncated for sample in samples)


@pytest.mark.parametrize("name", [*CONFIGS, *WITHOUT_LOOP])
def test_rows_that_end_early_have_the_tokens_of_generate(name):
    lm = build(name)
    free = [reference(lm, prompt, 20) for prompt in PROMPTS]
    eos_ids = [free[0][3], free[2][8]]  # rows end at different lengths
    expected = [reference(lm, prompt, 20, eos_ids) for prompt in PROMPTS]
    assert len({len(row) for row in expected}) > 1
    samples = generate(lm, PROMPTS, Sampling(20, temperature=0.0), eos_ids)
    assert [sample.token_ids for sample in samples] == expected
    assert [sample.is_truncated for sample in samples] == [row[-1] not in eos_ids for row in expected]


def test_shared_prefill_gives_the_tokens_of_separate_prefills(lm):
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    expected = [reference(lm, prompt, 6) for prompt in prompts]
    assert [s.token_ids for s in generate(lm, prompts, Sampling(6, temperature=0.0))] == expected


def test_no_requests_give_no_samples(lm):
    assert generate(lm, [], Sampling(6)) == []


# The end of a completion


def test_completion_ends_with_its_eos(lm):
    row = reference(lm, PROMPTS[0], 20)
    end = row[4]
    expected = row[: row.index(end) + 1]
    assert generate(lm, PROMPTS[:1], Sampling(20, temperature=0.0), [end]) == [(expected, False)]


def test_any_of_several_eos_ids_ends_a_completion(lm):
    row = reference(lm, PROMPTS[0], 20)
    first, second = sorted({row[2], row[5], row[7]}, key=row.index)[:2]
    expected = row[: row.index(first) + 1]
    for eos_ids in ([first, second], [second, first]):
        assert generate(lm, PROMPTS[:1], Sampling(20, temperature=0.0), eos_ids) == [(expected, False)]


def test_eos_at_the_length_limit_is_not_a_truncation(lm):
    row = reference(lm, PROMPTS[0], 20)
    end = row.index(row[4])
    assert generate(lm, PROMPTS[:1], Sampling(end + 1, temperature=0.0), [row[4]]) == [(row[: end + 1], False)]
    assert generate(lm, PROMPTS[:1], Sampling(end, temperature=0.0), [row[4]]) == [(row[:end], True)]


def test_padding_token_can_be_the_eos(lm):
    row = reference(lm, PROMPTS[2], 20)
    end = row.index(row[4])
    requests = [Request(prompt, "s") for prompt in PROMPTS]
    samples = TransformersEngine().generate(
        lm, requests, Sampling(20, temperature=0.0), eos_ids=[row[4]], pad_id=row[4]
    )
    assert samples[2][:2] == (row[: end + 1], False)


# A sample depends only on its seed and its prompt


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=0.6, top_p=0.8)], ids=["plain", "nucleus"])
def test_samples_do_not_depend_on_batch_size_or_order(name, sampling):
    lm, eos_ids = build(name), [1, 2, 3, 4, 5]
    prompts, seeds = [*PROMPTS, PROMPTS[0]], list("abcdef")
    together = generate(lm, prompts, sampling, eos_ids, seeds=seeds)
    assert len({len(sample.token_ids) for sample in together}) > 1
    others = generate(lm, [PROMPTS[2]] * 8, sampling)
    assert len({tuple(sample.token_ids) for sample in others}) > 1  # one prompt, eight seeds
    torch.manual_seed(123)  # torch's global generator has no effect
    for size in (1, 2, 256):
        assert generate(lm, prompts, sampling, eos_ids, seeds=seeds, max_batch_size=size) == together
    assert generate(lm, prompts[::-1], sampling, eos_ids, seeds=seeds[::-1]) == together[::-1]
    alone = [generate(lm, [p], sampling, eos_ids, seeds=[s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert alone == together


def test_stream_yields_samples_when_their_rows_end(lm):
    requests = [Request(prompt, f"seed/{i}") for i, prompt in enumerate(4 * PROMPTS)]
    engine, sampling, ids = TransformersEngine(), Sampling(40), {"eos_ids": [1, 2, 3], "pad_id": PAD}
    batches = list(engine.stream(lm, requests, sampling, **ids))
    assert len(batches) > 3
    longest = [max(len(sample.token_ids) for _, sample in batch) for batch in batches]
    assert longest == sorted(longest)
    assert not any(sample.is_truncated for batch in batches[:-1] for _, sample in batch)
    assert max(longest[:-1]) < longest[-1]
    assert sorted(pair for batch in batches for pair in batch) == list(
        enumerate(engine.generate(lm, requests, sampling, **ids))
    )


def test_longer_length_limit_extends_the_same_sample(lm):
    short, long = (generate(lm, PROMPTS, Sampling(length)) for length in (5, 11))
    assert [sample.token_ids[:5] for sample in long] == [sample.token_ids for sample in short]


def test_samples_longer_than_a_random_block_do_not_depend_on_the_batch(lm):
    sampling, eos_ids = Sampling(2 * NUMBERS_AHEAD + 3), [1]
    together = generate(lm, PROMPTS, sampling, eos_ids)
    lengths = sorted(len(sample.token_ids) for sample in together)
    assert lengths[0] < NUMBERS_AHEAD < lengths[-1]
    for i, prompt in enumerate(PROMPTS):
        assert generate(lm, [prompt], sampling, eos_ids, seeds=[f"seed/{i}"]) == together[i : i + 1]


def test_memory_does_not_grow_with_the_length_limit(lm):
    requests = [Request(prompt, f"seed/{i}") for i, prompt in enumerate(PROMPTS)]
    most = {}
    for limit in (100, 100_000):
        tracemalloc.start()
        samples = TransformersEngine().generate(lm, requests, Sampling(limit), eos_ids=range(1, 20), pad_id=PAD)
        most[limit] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert max(len(sample.token_ids) for sample in samples) < 50
    assert most[100_000] < most[100] + 100_000  # bytes; each random number takes more than 8


def test_sampling_does_not_change_torch_rng_state(lm):
    before = torch.get_rng_state()
    generate(lm, PROMPTS, Sampling(5))
    assert torch.equal(torch.get_rng_state(), before)


# Log-probabilities


@pytest.mark.parametrize(("name", "temperature"), list(itertools.product(CONFIGS, [1.0, 0.7])))
def test_policy_statistics_equal_sampling_distribution(name, temperature):
    lm = build(name)
    samples = generate(lm, PROMPTS, Sampling(9, temperature), [1, 2, 3, 4, 5])
    width = max(len(p) + len(s.token_ids) for p, s in zip(PROMPTS, samples, strict=True))
    input_ids, mask = torch.full((len(PROMPTS), width), PAD), torch.zeros(len(PROMPTS), width, dtype=torch.bool)
    logprobs, entropies = torch.zeros(2, len(PROMPTS), width)
    for row, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        sequence = torch.tensor([*prompt, *sample.token_ids])
        input_ids[row, : len(sequence)] = sequence
        with torch.no_grad():
            table = torch.log_softmax(lm(input_ids=sequence[None]).logits[0].double() / temperature, -1)
        for t in range(len(prompt), len(sequence)):
            mask[row, t] = True
            logprobs[row, t] = table[t - 1, sequence[t]]
            entropies[row, t] = -(table[t - 1].exp() * table[t - 1]).sum()
    with torch.no_grad():
        stats = Policy(lm)(input_ids, mask, temperature)
    torch.testing.assert_close(stats.logprobs, logprobs, rtol=0, atol=3e-5)
    torch.testing.assert_close(stats.entropies, entropies, rtol=0, atol=3e-5)


def test_gradient_checkpointing_does_not_change_samples(tiny_run, small_model):
    """The sampling context sets eval mode. Otherwise the first-ratio check of training would raise."""
    texts = []
    for checkpointing in (False, True):
        policy = PolicyConfig(small_model, from_scratch=True, gradient_checkpointing=checkpointing)
        run = tiny_run(module={"policy": policy, "initial_stage": "egspo"}, trainer={"max_epochs": 1}).fit()
        assert run.module.policy.training
        texts.append([completion.text for completion in run.data.phases.rollouts.completions])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4


def test_policy_in_train_mode_samples_as_in_eval_mode():
    config = GPT2Config(**(CONFIGS["gpt2"].to_dict() | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}))
    torch.manual_seed(0)
    policy = Policy(CausalLM.from_config(config))
    assert policy.lm.training
    in_training = generate(policy.lm, PROMPTS, Sampling(8))
    assert generate(policy.eval().lm, PROMPTS, Sampling(8)) == in_training


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_engine_logprobs_equal_sampling_distribution(lm, temperature):
    requests = [Request(prompt, f"seed/{i}") for i, prompt in enumerate(PROMPTS)]
    samples = TransformersEngine().generate(lm, requests, Sampling(12, temperature), eos_ids=[3, 4], pad_id=PAD)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([[*prompt, *sample.token_ids]])
        with torch.no_grad():
            log_probs = (lm(ids).logits[0] / temperature).log_softmax(-1)
        expected = [log_probs[len(prompt) - 1 + t, token].item() for t, token in enumerate(sample.token_ids)]
        assert sample.logprobs == pytest.approx(expected, abs=1e-4)
