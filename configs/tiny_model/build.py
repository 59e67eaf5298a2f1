"""Write the tiny model's folder: ``python configs/tiny_model/build.py [FOLDER]``.

The model is a Llama architecture with 0.28 million parameters and no stored weights: training starts from random ones.
Token b of the tokenizer is byte b, so decoding restores every text exactly. The architecture equals Qwen2's without the
bias of the attention projections. The model type is not "qwen2", because transformers 5 would then load Qwen's own
tokenizer, whose Unicode normalization changes some texts.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS, PAD = "<|endoftext|>", "<|pad|>"  # tokens 256 and 257, after the bytes

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "dtype": "float32",
}
TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "TokenizersBackend",
    "eos_token": EOS,
    "pad_token": PAD,
    "bos_token": None,
    "unk_token": None,
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,  # "<|endoftext|>" in a problem is encoded as plain text
}


def byte_names() -> list[str]:
    """The character that byte-level BPE uses for each byte: itself if printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build(folder: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE({name: byte for byte, name in enumerate(byte_names())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True, normalized=False) for name in (EOS, PAD)]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"config.json": MODEL, "tokenizer_config.json": TOKENIZER}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
