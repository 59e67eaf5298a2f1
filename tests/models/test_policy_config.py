"""PolicyConfig builds models from saved weights or from scratch."""

import torch
from transformers import Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from egspo_lightning.models.policy_config import PolicyConfig

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def test_saved_model_is_loaded_with_its_weights(tmp_path):
    lm = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    lm.save_pretrained(tmp_path)
    policy = PolicyConfig(str(tmp_path)).build()
    for name, value in lm.state_dict().items():
        assert torch.equal(policy.lm.state_dict()[name], value)
    half = PolicyConfig(str(tmp_path), dtype="bfloat16").build()
    assert next(half.parameters()).dtype == torch.bfloat16


def test_from_scratch_weights_depend_on_the_global_seed(tiny_model):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(next(PolicyConfig(tiny_model, from_scratch=True).build().parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
