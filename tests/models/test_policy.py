import pytest
import torch
from torch import nn
from transformers import Gemma2Config, GPT2Config, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from egspo_lightning.errors import UserError
from egspo_lightning.models.batched_forward import Sequences
from egspo_lightning.models.critic import Critic
from egspo_lightning.models.policy import Policy, ValueHead, end_of_sequence_ids
from egspo_lightning.models.policy_config import PolicyConfig

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def qwen2(**changes):
    config = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def batch():
    torch.manual_seed(1)
    input_ids = torch.randint(50, (3, 9))
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:9], mask[1, 2:5] = True, True  # the third row has no completion
    return input_ids, mask


@pytest.mark.parametrize("tied", [True, False])
def test_policy_statistics_and_gradients_match_naive_computation(tied):
    policy = Policy(qwen2(tie_word_embeddings=tied))
    input_ids, mask = batch()
    stats = policy(input_ids, mask, 0.7)
    log_probs = (policy.lm(input_ids).logits / 0.7).log_softmax(-1)
    for row, column in mask.nonzero().tolist():
        before = log_probs[row, column - 1]
        assert stats.logprobs[row, column].item() == pytest.approx(before[input_ids[row, column]].item(), abs=1e-5)
        assert stats.entropies[row, column].item() == pytest.approx(-(before.exp() * before).sum().item(), abs=1e-5)
    assert not stats.logprobs[~mask].any()
    assert not stats.entropies[~mask].any()
    chosen = log_probs[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)[mask[:, 1:]]
    parameters = list(policy.parameters())
    for ours, naive in zip(
        torch.autograd.grad(stats.logprobs.sum(), parameters, retain_graph=True),
        torch.autograd.grad(chosen.sum(), parameters),
        strict=True,
    ):
        assert (ours - naive).abs().max() < 1e-4


def unpacked(policy, *, splits_rows):
    """Turn packing off. Rows of similar length share a pass if ``splits_rows``, else all rows do."""
    policy.lm.set_attn_implementation("sdpa")
    policy.passes.packs, policy.passes.splits_rows = False, splits_rows
    return policy


@pytest.mark.parametrize("way", ["packed", "runs", "whole", "value head"])
def test_together_gives_statistics_of_separate_batches(way):
    lm, plain = qwen2(), unpacked(Policy(qwen2()), splits_rows=False)
    policy = Policy(lm, ValueHead(lm) if way == "value head" else None)
    assert policy.passes.packs
    if way in ("runs", "whole"):
        policy = unpacked(policy, splits_rows=way == "runs")
    ids, mask = batch()
    wide = torch.randint(50, (40, 30))
    ends = torch.randint(3, 31, (40, 1))
    wide_mask = (torch.arange(30) >= 2) & (torch.arange(30) < ends)
    parts = [Sequences(ids, mask, 0.7), Sequences(wide, wide_mask)]
    together, apart = policy.together(*parts), [plain(*part) for part in parts]
    for found, alone in zip(together, apart, strict=True):
        torch.testing.assert_close(found.logprobs, alone.logprobs, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.entropies, alone.entropies, rtol=0, atol=2e-5)
        assert (found.values is not None) == (way == "value head")
    ours, naive = (
        torch.autograd.grad(sum((i + 1) * s.logprobs.sum() for i, s in enumerate(stats)), list(lm.parameters()))
        for lm, stats in ((policy.lm, together), (plain.lm, apart))
    )
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_value_is_computed_from_the_state_before_the_token():
    lm = qwen2()
    policy = Policy(lm, ValueHead(lm))
    input_ids, mask = batch()
    assert not policy(input_ids, mask).values.any()  # zero at initialization
    torch.nn.init.normal_(policy.value_head.linear.weight)
    torch.nn.init.constant_(policy.value_head.linear.bias, 0.5)
    values = policy(input_ids, mask).values
    hidden = lm.get_decoder()(input_ids).last_hidden_state
    for row, column in mask.nonzero().tolist():
        expected = hidden[row, column - 1] @ policy.value_head.linear.weight[0] + 0.5
        assert values[row, column].item() == pytest.approx(expected.item(), abs=1e-5)
    assert not values[~mask].any()


def test_separate_critic_with_copied_weights_gives_values_of_shared_trunk():
    policy, critic = Policy(qwen2(), None), Critic(qwen2())
    with torch.no_grad():
        for p in critic.trunk.parameters():
            p.normal_()
    critic.start_from(policy)
    torch.nn.init.normal_(critic.value_head.linear.weight)
    head = ValueHead(policy.lm)
    head.load_state_dict(critic.value_head.state_dict())
    input_ids, mask = batch()
    assert torch.equal(critic(input_ids, mask), Policy(policy.lm, head)(input_ids, mask).values)
    assert critic(input_ids, mask).any()
    assert {id(p) for p in critic.parameters()}.isdisjoint(id(p) for p in policy.parameters())


def test_critic_of_another_architecture_is_not_initialized_from_policy():
    other = Critic(
        AutoModelForCausalLM.from_config(
            Qwen2Config(**SIZES | {"hidden_size": 8}, num_attention_heads=4, num_key_value_heads=4)
        )
    )
    before = [p.clone() for p in other.parameters()]
    other.start_from(Policy(qwen2()))
    assert all(map(torch.equal, before, other.parameters()))


def test_values_are_float32_under_autocast():
    lm = qwen2()
    policy, critic = Policy(lm, ValueHead(lm)), Critic(qwen2())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy(*batch()).values.dtype == critic(*batch()).dtype == torch.float32


def test_right_padding_does_not_change_statistics():
    policy = Policy(qwen2())
    input_ids, mask = batch()
    padded = torch.cat([input_ids, torch.full((3, 5), 7)], 1)
    with torch.no_grad():
        short = policy(input_ids, mask)
        long = policy(padded, torch.nn.functional.pad(mask, (0, 5)))
    assert (short.logprobs - long.logprobs[:, :9]).abs().max() < 1e-5


def test_dropout_is_off_in_train_mode():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.5, attn_pdrop=0.5)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    policy.train()
    input_ids, mask = batch()
    assert torch.equal(policy(input_ids, mask).logprobs, policy(input_ids, mask).logprobs)
    assert {m.p for m in policy.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_attention_dropout_is_off():
    policy = Policy(qwen2(attention_dropout=0.9))
    input_ids, mask = batch()
    assert torch.equal(policy(input_ids, mask).logprobs, policy(input_ids, mask).logprobs)


def test_model_with_logit_softcapping_is_refused():
    config = Gemma2Config(
        **SIZES, num_attention_heads=2, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1
    )
    with pytest.raises(UserError, match="changes its logits after the output layer"):
        Policy(AutoModelForCausalLM.from_config(config))


def test_end_of_sequence_ids_combine_generation_config_and_tokenizer(tiny_model):
    tokenizer = PolicyConfig(tiny_model).load_tokenizer()
    lm = qwen2()
    lm.generation_config.eos_token_id = [3, 7]
    assert end_of_sequence_ids(lm, tokenizer) == [3, 7, tokenizer.eos_token_id]
    lm.generation_config.eos_token_id = 5
    assert end_of_sequence_ids(lm, tokenizer) == [5, tokenizer.eos_token_id]
    lm.generation_config.eos_token_id = None
    assert end_of_sequence_ids(lm, tokenizer) == [tokenizer.eos_token_id]
