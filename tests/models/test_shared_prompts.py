"""Where the prompt of several rows stands once, statistics and gradients equal those of each row alone."""

import random

import pytest
import torch
from packed_models import PACKED, lm_of, require_equal_gradients, require_equal_to_naive

from egspo_lightning.models import batched_forward
from egspo_lightning.models import packed_attention as packing
from egspo_lightning.models.batched_forward import Sequences
from egspo_lightning.models.critic import Critic
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.packed_layout import Costs, lay_out
from egspo_lightning.models.policy import Policy, ValueHead
from egspo_lightning.ops.batching import pad_right

GROUPS = [(3, [6, 1, 9, 4]), (5, [2, 7, 7]), (1, [5, 3]), (4, [3]), (4, [1, 1]), (6, [0])]
"""Tokens of a prompt, and of its completions; prompts of one length differ."""
NUM_SAVED = 3 * 3 + 5 * 2 + 1 + 4


def groups_of_rows(seed=1, temperature=0.8):
    """The rows of all groups, in random order."""
    rng = random.Random(seed)
    pairs = []
    for length, completions in GROUPS:
        prompt = [rng.randrange(1, 50) for _ in range(length)]
        pairs += [(prompt, [rng.randrange(1, 50) for _ in range(number)]) for number in completions]
    rng.shuffle(pairs)
    return Sequences(*pad_right(pairs, 0), temperature)


def tokens_seen(decoder):
    """A list that gets the number of tokens of each pass."""
    seen = []
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("short", [0, 8, 64], ids=["fused", "some fused", "plain products"])
@pytest.mark.parametrize("worth", [0, 9, NUM_SAVED - 1], ids=["no padding", "some", "much"])
@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_statistics_and_gradients_equal_those_of_rows_alone(config, worth, short, monkeypatch):
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", worth)
    monkeypatch.setattr(packing, "SHORT", short)
    lm = lm_of(config)
    policy = Policy(lm)
    assert policy.passes.shares_prompts
    seen = []
    monkeypatch.setattr(batched_forward, "Runs", lambda runs: seen.extend(runs) or packing.Runs(runs))
    require_equal_to_naive(lm, policy, groups_of_rows())
    assert any(run.prompts for run in seen)


def test_each_prompt_stands_once(monkeypatch):
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 0)
    policy = Policy(lm_of(PACKED["llama"]))
    seen = tokens_seen(policy.trunk)
    policy(*groups_of_rows())
    policy.together(groups_of_rows(), groups_of_rows())
    shared, own = (
        3 + 5 + 1 + 4,
        (5 + 1 + 8 + 3) + (1 + 6 + 6) + (4 + 2) + (1 + 1),
    )  # at least one, else without the last
    alone, blank = 4 + 3, 2
    assert seen == [shared + own + alone + blank, shared + 2 * own + (4 + 2 * 2) + 2 * blank]


@pytest.mark.parametrize("kind", ["lora", "checkpointing"])
def test_adapters_and_recomputed_layers_give_the_same_gradients(kind, monkeypatch):
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 4)
    lm = lm_of(PACKED["qwen2"])
    if kind == "lora":
        LoraConfig(rank=4).inject(lm)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    else:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(lm)
    assert policy.passes.shares_prompts
    require_equal_to_naive(lm, policy, groups_of_rows())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_demonstrations_equal_those_of_an_unshared_pass(dtype, monkeypatch):
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 4)
    lm = lm_of(PACKED["qwen2"], scale=4.0).to(dtype)
    policy, critic = Policy(lm, ValueHead(lm)), Critic(lm)
    for network in (policy, critic):
        torch.nn.init.normal_(network.value_head.linear.weight)
    parts = groups_of_rows(), groups_of_rows(temperature=1.0)  # one of rollouts, one of demonstrations
    results = []
    for shares in (True, False):
        policy.passes.shares_prompts = critic.passes.shares_prompts = shares
        outputs = policy.together(*parts)
        tensors = [x for output in outputs for x in output if x is not None] + [critic(*parts[0][:2])]
        results.append(tensors)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if dtype != torch.bfloat16:
        weights = torch.linspace(0.5, 1.5, results[0][0].numel()).view_as(results[0][0])
        one, other = (sum((i + 1) * (x * weights).sum() for i, x in enumerate(found)) for found in results)
        require_equal_gradients([*policy.parameters(), *critic.value_head.parameters()], one, other)


def see_all_keys(run, num_keys, window, device):
    """Attend to every key, also to padding."""
    return torch.ones(1, 1, run.width, num_keys, dtype=torch.bool, device=device)


def test_a_model_whose_states_differ_does_not_share_prompts(monkeypatch):
    monkeypatch.setattr(packing, "_visible", see_all_keys)
    lm = lm_of(PACKED["llama"])
    policy = Policy(lm)
    assert policy.passes.packs
    assert not policy.passes.shares_prompts
    require_equal_to_naive(lm, policy, groups_of_rows())


# Layout


def layout_of(pairs, **costs):
    return lay_out(*pad_right(pairs, 0), Costs(**costs))


def test_layout_by_hand():
    pairs = [([5, 6], [7, 8]), ([9], [1, 2]), ([5, 6], [3]), ([5, 6], [4, 4, 4, 4])]
    ids, mask = pad_right(pairs, 0)
    layout = lay_out(ids, mask, Costs(run=1, pairs_per_token=100))
    prompt, first, last = 1, 2, 3
    assert [(run.num_rows, run.width) for run in layout.runs] == [(1, 3), (1, 2), (2, 1), (1, 3)]
    assert ids.flatten()[layout.tokens].tolist() == [9, 1, 2, 5, 6, 7, 3, 4, 4, 4]
    assert [run.prompts and run.prompts.run for run in layout.runs] == [None, None, prompt, prompt]
    assert layout.runs[first].prompts.rows.tolist() == [0, 0]
    assert layout.runs[last].prompts.lengths.tolist() == [[2]]
    rows, positions = mask[:, 1:].nonzero(as_tuple=True)  # states before completion tokens
    assert layout.places(rows, positions).tolist() == [4, 5, 0, 1, 4, 4, 7, 8, 9]


def test_distinct_prompts_have_the_layout_without_sharing():
    pairs = [([5, 6], [7, 8]), ([5], [6, 7, 8]), ([5, 7], [7, 8]), ([6, 5], [1] * 9)]
    ours, plain = layout_of(pairs, run=2, pairs_per_token=100), layout_of(pairs, run=2)
    assert ours.runs == plain.runs
    assert torch.equal(ours.tokens, plain.tokens)


def test_a_prompt_is_shared_where_it_saves_more_than_a_run_costs():
    pairs = [([5, 6, 7], [1, 2])] * 3
    assert layout_of(pairs, run=6, pairs_per_token=100).runs == [packing.Run(3, 5)]
    assert len(layout_of(pairs, run=5, pairs_per_token=100).runs) == 2


def test_a_prompt_is_shared_where_it_saves_more_than_masked_attention_costs():
    """Two rows of 10 + 20 tokens: 2 (20 * 30 - 30^2 / 2) = 300 more pairs, for 10 tokens."""
    pairs = [([5] * 10, [1] * 20)] * 2
    assert len(layout_of(pairs, run=1, pairs_per_token=30).runs) == 1
    assert len(layout_of(pairs, run=1, pairs_per_token=31).runs) == 2
    assert len(layout_of(pairs, run=1, pairs_per_token=31, masked_pair=1.1).runs) == 1
