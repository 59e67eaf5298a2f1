import importlib.util
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TINY_MODEL = Path(__file__).parents[2] / "configs" / "tiny_model"
TOKENIZER = AutoTokenizer.from_pretrained(TINY_MODEL)

ODD_TEXTS = [
    "", " ", "  two", "a , b . c n't 's", "<|endoftext|>", "a<|pad|>b", "<|", "<0x41>", "\0", "\r\n\t",
    "\ufeff", "e\u0301 \u00e9", "\U0001f600\u200d\U0001f525", "\u2126", "\\boxed{\\frac{1}{2}}",
]  # fmt: skip


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_tokenizer_round_trips_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_encodes_unusual_text_as_its_bytes(text):
    ids = TOKENIZER.encode(text)
    assert ids == TOKENIZER(text).input_ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_of_tokenizer():
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, TOKENIZER.bos_token_id) == (256, 257, None)
    assert len(TOKENIZER) == 258
    assert TOKENIZER.chat_template is None
    assert TOKENIZER.decode([52, 256, 257], skip_special_tokens=True) == "4"
    assert TOKENIZER.decode([52, 256]) == "4<|endoftext|>"


def test_invalid_bytes_decode_to_replacement_characters_only():
    assert TOKENIZER.decode([52, 0xF0, 0x9F, 65, 0xFF, 66]) == "4\ufffdA\ufffdB"


def test_saved_tokenizer_loads_unchanged(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(TINY_MODEL).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        assert again.encode(text) == list(text.encode("utf-8"))
    assert (again.eos_token_id, again.pad_token_id) == (256, 257)


def test_tiny_model_has_the_documented_size():
    config = AutoConfig.from_pretrained(TINY_MODEL)
    assert config.vocab_size == len(TOKENIZER)
    assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    per_layer = 4 * 96 * 96 + 3 * 96 * 320 + 2 * 96
    assert sum(math.prod(p.shape) for p in model.parameters()) == 258 * 96 + 2 * per_layer + 96 == 283_296


def test_tiny_model_folder_equals_output_of_build_script(tmp_path):
    spec = importlib.util.spec_from_file_location("build", TINY_MODEL / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY_MODEL / name).read_bytes()
