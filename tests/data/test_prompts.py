import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.errors import UserError
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.module import EGSPOModule
from egspo_lightning.types import Demonstration

TINY_MODEL = Path(__file__).parents[2] / "configs" / "tiny_model"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
CHAT_WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


@pytest.fixture
def load() -> Callable[..., object]:
    def load(chat_template: str | None = None, bos: bool = False) -> object:
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        tokenizer.chat_template = chat_template
        if bos:
            tokenizer.add_special_tokens({"bos_token": "<s>"})
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A <|endoftext|>",
                special_tokens=[("<s>", tokenizer.bos_token_id), ("<|endoftext|>", 256)],
            )
        return tokenizer

    return load


def test_plain_prompt_has_system_and_problem(load):
    template = PromptTemplate(system="Think.")
    assert template.render(load(), "1+1?") == "Think.\n\n1+1?\n\n"
    assert bytes(template.encode(load(), "1+1?")).decode() == "Think.\n\n1+1?\n\n"


def test_empty_system_adds_no_leading_blank_lines(load):
    assert PromptTemplate(system="").render(load(), "\n1+1?") == "\n1+1?\n\n"
    assert PromptTemplate(system="", plain="Q: {system}{problem}\n").render(load(), "1?") == "Q: 1?\n"


def test_plain_template_without_system_placeholder_omits_the_system_text(load):
    assert PromptTemplate(system="Think.", plain="\n{problem}\n").render(load(), "1+1?") == "\n1+1?\n"


@pytest.mark.parametrize("text", ["{system} {problem} {x}", "\\frac{1}{2} {", "}}{{ {{ m }}", "{% raw %}"])
def test_braces_in_a_problem_are_kept(load, text):
    assert PromptTemplate(system="{problem}!").render(load(), text) == f"{{problem}}!\n\n{text}\n\n"
    chat = PromptTemplate(system="{problem}!").render(load(CHAT), text)
    assert chat == f"<system>{{problem}}!</system><user>{text}</user><assistant>"


def test_chat_template_is_used_unless_never_and_required_by_always(load):
    assert PromptTemplate(system="").render(load(CHAT), "1+1?") == "<user>1+1?</user><assistant>"
    never = PromptTemplate(system="Think.", use_chat_template="never")
    assert never.render(load(CHAT), "1+1?") == "Think.\n\n1+1?\n\n"
    with pytest.raises(UserError, match="has no chat template"):
        PromptTemplate(use_chat_template="always").render(load(), "1+1?")


def test_chat_template_without_system_role_is_refused_with_remedy(load):
    with pytest.raises(UserError, match=r'no system role.*set system to ""'):
        PromptTemplate().render(load(CHAT_WITHOUT_SYSTEM), "1+1?")
    assert PromptTemplate(system="").render(load(CHAT_WITHOUT_SYSTEM), "1+1?") == "<user>1+1?</user><assistant>"


def test_chat_template_kwargs_are_passed_to_the_template(load):
    """For prompts and for demonstrations."""
    tokenizer = load(THINKING)
    assert PromptTemplate(system="").render(tokenizer, "1+1?") == "<user>1+1?</user><assistant>"
    template = PromptTemplate(system="", chat_template_kwargs={"enable_thinking": False})
    assert template.render(tokenizer, "1+1?") == "<user>1+1?</user><assistant><think></think>"
    prompt, _ = template.encode_demonstration(tokenizer, Demonstration("1", "1+1?", "2"))
    assert bytes(prompt).decode() == template.render(tokenizer, "1+1?")


@pytest.mark.parametrize(
    ("variables", "template", "message"),
    [
        ({"enable_thinkin": False}, THINKING, "sets enable_thinkin, which the tokenizer's chat template never reads"),
        ({"enable_thinking": False}, None, "no chat template is used"),
        ({"tokenize": True}, THINKING, "sets tokenize, which the prompt template sets itself"),
    ],
)
def test_unused_or_reserved_chat_template_kwargs_are_refused(load, variables, template, message):
    with pytest.raises(UserError, match=message):
        PromptTemplate(chat_template_kwargs=variables).render(load(template), "1+1?")


def test_bos_is_added_only_to_plain_text_and_eos_never(load):
    tokenizer = load(bos=True)
    bos_id = tokenizer.bos_token_id
    template = PromptTemplate(system="", plain="{problem}")
    assert tokenizer.encode("1") == [bos_id, ord("1"), 256]
    assert template.encode(tokenizer, "1") == [bos_id, ord("1")]
    chat = template.encode(load(CHAT, bos=True), "1")
    assert bytes(chat).decode() == "<user>1</user><assistant>"
    demonstration = Demonstration("1", "1", "2")
    assert template.encode_demonstration(tokenizer, demonstration) == (
        [bos_id, ord("1")],
        [ord("2"), 256],
    )


def test_demonstration_prompt_equals_sampling_prompt(load):
    template = PromptTemplate()
    demonstration = Demonstration("1", "47+85=?", "7+5=12 \\boxed{132}")
    prompt, completion = template.encode_demonstration(load(), demonstration)
    assert prompt == template.encode(load(), demonstration.problem)
    assert bytes(completion[:-1]).decode() == demonstration.solution
    assert completion[-1] == 256


GEMMA = (  # no EOS; the text is stripped
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
SPACED = (  # as Llama 2 and Mistral
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
EMPTY_BLOCK = (  # as Qwen3 does for a turn without reasoning
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
REASONING = (  # as DeepSeek-R1: the prompt opens the block, and reasoning of earlier turns is dropped
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
TWO_ENDS = GEMMA.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")  # Phi-3


@pytest.mark.parametrize(
    ("chat_template", "solution", "target"),
    [
        (GEMMA, "so 2", "so 2<end_of_turn>"),
        (GEMMA, " so 2\n", "so 2<end_of_turn>"),
        (TWO_ENDS, "so 2", "so 2<end_of_turn>"),
        (SPACED, "so 2", " so 2 <|endoftext|>"),
        (EMPTY_BLOCK, "so 2", "<think>\n\n</think>\n\nso 2<end_of_turn>"),
        (REASONING, "1+1</think>so 2", "1+1</think>so 2<end_of_turn>"),
        (REASONING, "<think>\n1+1</think>so 2", "1+1</think>so 2<end_of_turn>"),  # the prompt has the mark
        (REASONING, "so 2", "\n</think>\n\nso 2<end_of_turn>"),
        (CHAT, "so 2", "so 2<|endoftext|>"),  # no token ends the turn
        (
            CHAT + "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}",
            "2",
            "2<|endoftext|>",
        ),
    ],
)
def test_demonstration_ends_as_the_chat_template_ends_a_turn(load, chat_template, solution, target):
    tokenizer = load(chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    template = PromptTemplate(system="")
    prompt, completion = template.encode_demonstration(tokenizer, Demonstration("1", "1+1?", solution))
    assert prompt == template.encode(tokenizer, "1+1?")
    assert tokenizer.decode(completion) == target
    assert completion[-1] == (tokenizer.convert_tokens_to_ids("<end_of_turn>") if "turn>" in target else 256)
    plain = PromptTemplate(use_chat_template="never")
    assert plain.encode_demonstration(tokenizer, Demonstration("1", "1+1?", "2"))[1] == [ord("2"), 256]
    opened = PromptTemplate(plain="{problem}[THINK]", use_chat_template="never")
    assert bytes(opened.encode_demonstration(tokenizer, Demonstration("1", "1+1?", "2"))[1][:-1]) == b"[/THINK]2"


@pytest.mark.parametrize("plain", ["", "{system}", "{problem} and {problem}"])
def test_plain_template_without_exactly_one_problem_is_refused(plain):
    with pytest.raises(UserError, match="exactly once"):
        PromptTemplate(plain=plain)


def test_unknown_use_chat_template_is_refused():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--prompt", type=PromptTemplate)
    with pytest.raises(ArgumentError, match=r"(?s)use_chat_template.*auto.*always.*never.*sometimes"):
        parser.parse_args(["--prompt.use_chat_template=sometimes"])


def test_sampling_stops_at_the_eos_and_at_the_end_of_a_turn(load, tmp_path):
    tokenizer = load(GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    shutil.copytree(TINY_MODEL, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    module = EGSPOModule(policy=PolicyConfig(str(tmp_path), from_scratch=True))
    module.configure_model()
    assert module.eos_ids == [256, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
