"""Tiny random models of many architectures, from transformers' table of causal language models."""

import inspect
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, EOS, PAD = 258, 256, 257
"""Of the tokenizer of configs/tiny_model."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "rotary_dim": 4,
    "sliding_window": 8,  # shorter than the rows
    "attention_window_size": 8,
    # encoders and decoders
    "decoder_layers": 2,
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # recurrent states
    "state_size": 8,
    "num_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
"""Values of the config fields that an architecture has."""
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 4},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmo_hybrid": LINEAR_AND_FULL,
    "qwen3_5_text": LINEAR_AND_FULL,
    "qwen3_next": LINEAR_AND_FULL,
    "recurrent_gemma": {"num_hidden_layers": 3},  # two recurrent layers, then attention
    "xlstm": {"hidden_size": 128},
}
"""Further fields, for both kinds of layers of a hybrid, and sizes that must fit together."""


def tiny_config(model_type: str) -> Any:
    """A config of a few ten thousand parameters."""
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = CONFIG_MAPPING[model_type]
    fields = {*inspect.signature(kind).parameters, *kind.attribute_map}
    return kind(**{name: value for name, value in SIZES.items() if name in fields} | OWN.get(model_type, {}))
