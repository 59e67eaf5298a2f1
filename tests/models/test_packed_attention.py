"""Packed sequences have the same token statistics and gradients as unpacked ones."""

import pytest
import torch
import transformers
from packed_models import GQA, PACKED, SIZES, lm_of, require_equal_to_naive

from egspo_lightning.models import batched_forward
from egspo_lightning.models import packed_attention as packing
from egspo_lightning.models.batched_forward import Sequences
from egspo_lightning.models.policy import Policy

WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
NOT_PACKED = {
    "window implemented only in the mask": transformers.Qwen2MoeConfig(
        **GQA, **WINDOW, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "position biases computed from the mask": transformers.FalconConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "eager attention": transformers.Qwen2Config(**GQA, attn_implementation="eager"),
    "no attention interface": transformers.FalconConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4
    ),
    "convolution layers": transformers.Lfm2Config(**GQA, layer_types=["conv", "full_attention"]),
}


def rows_of_various_lengths():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (9, 14), generator=generator)
    ends = torch.tensor([5, 14, 9, 9, 6, 11, 3, 9, 2])  # the last row has no completion
    return Sequences(ids, (torch.arange(14) >= 2) & (torch.arange(14) < ends[:, None]), 0.8)


@pytest.mark.parametrize("short", [0, 8, 64], ids=["fused", "some fused", "plain products"])
@pytest.mark.parametrize("worth", [0, 16, 10**6], ids=["no padding", "some", "one run"])
@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_packed_statistics_and_gradients_equal_unpacked(config, worth, short, monkeypatch):
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", worth)
    monkeypatch.setattr(packing, "SHORT", short)
    plain, lm = lm_of(config), lm_of(config)
    policy = Policy(lm)
    assert policy.passes.packs
    assert lm.config._attn_implementation == packing.NAME
    require_equal_to_naive(
        lm, policy, rows_of_various_lengths()
    )  # a plain forward pass for logits does not use the packed attention
    torch.testing.assert_close(lm(input_ids=ids()).logits, plain(input_ids=ids()).logits, rtol=0, atol=1e-6)


def ids():
    return torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize("config", NOT_PACKED.values(), ids=NOT_PACKED)
def test_unsupported_models_run_one_pass_per_length_group(config):
    lm = lm_of(config)
    before = lm.config._attn_implementation
    policy = Policy(lm)
    assert not policy.passes.packs
    assert lm.config._attn_implementation == before
    require_equal_to_naive(lm, policy, rows_of_various_lengths())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_disables_packing(kind):
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8} | factors
    assert not Policy(lm_of(transformers.LlamaConfig(**SIZES, rope_parameters=rope))).passes.packs


def test_packing_works_with_another_default_dtype():
    lm = lm_of(PACKED["qwen2"])
    torch.set_default_dtype(torch.float64)
    try:
        policy = Policy(lm)
        assert policy.passes.packs
        assert policy(*rows_of_various_lengths()).logprobs.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "settings", [{"is_causal": False}, {"dropout": 0.1}, {"position_bias": torch.zeros(1, 4, 3, 3)}]
)
def test_short_attention_is_not_used_for_unknown_settings(monkeypatch, settings):
    monkeypatch.setattr(packing, "_short_attention", None)
    module, run = torch.nn.Module(), packing.Run(2, 3)
    states = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    assert packing.Runs([run]).attend(module, *states, **settings).shape == (1, 6, 4, 8)
    module.is_causal = False
    assert packing.Runs([run]).attend(module, *states).shape == (1, 6, 4, 8)


def test_leak_between_packed_sequences_disables_packing(monkeypatch):
    monkeypatch.setattr(packing.Runs, "attend", attend_to_whole_row)
    assert not Policy(lm_of(PACKED["llama"])).passes.packs


def attend_to_whole_row(self, module, queries, keys, values, **settings):
    """Attend across packed sequences, although the call is counted as a packed one."""
    self.num_uses += 1
    return packing.sdpa_attention_forward(module, queries, keys, values, None, **settings)[0]


def test_packing_works_with_gradient_checkpointing():
    lm = lm_of(PACKED["qwen2"])
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(lm)
    assert policy.passes.packs
    require_equal_to_naive(lm, policy, rows_of_various_lengths())


def test_packing_runs_one_pass_with_bounded_padding(monkeypatch):
    policy, part, seen = Policy(lm_of(PACKED["llama"])), rows_of_various_lengths(), []
    policy.passes.shares_prompts = False
    policy.lm.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    num_tokens = 5 + 14 + 9 + 9 + 6 + 11 + 3 + 9 + 2
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 0)
    policy(*part)
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 3)
    policy.together(part, part)
    (_, exact), (rows, nearly) = seen
    assert (exact, rows) == (num_tokens, 1)
    assert 2 * num_tokens < nearly <= 2 * num_tokens + 3 * len(part.input_ids) * 2


def test_saved_config_does_not_name_packed_attention(tmp_path):
    lm = lm_of(PACKED["llama"])
    Policy(lm)
    lm.save_pretrained(tmp_path)
    assert packing.NAME not in (tmp_path / "config.json").read_text()
