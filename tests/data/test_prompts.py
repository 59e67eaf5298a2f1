from collections.abc import Callable
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.errors import UserError
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


@pytest.mark.parametrize("plain", ["", "{system}", "{problem} and {problem}"])
def test_plain_template_without_exactly_one_problem_is_refused(plain):
    with pytest.raises(UserError, match="exactly once"):
        PromptTemplate(plain=plain)


def test_unknown_use_chat_template_is_refused():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--prompt", type=PromptTemplate)
    with pytest.raises(ArgumentError, match=r"(?s)use_chat_template.*auto.*always.*never.*sometimes"):
        parser.parse_args(["--prompt.use_chat_template=sometimes"])
