"""Demonstrations are graded behind their prompts, with chat templates as reasoning models have them."""

import pytest
from transformers import AutoTokenizer

from egspo_lightning.data.decoding import decode
from egspo_lightning.data.demonstration_check import drop_wrong
from egspo_lightning.data.expert_pool import ExpertPool
from egspo_lightning.data.prompts import PromptEncoder, PromptTemplate
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.types import Demonstration

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    *("[THINK]", "[/THINK]", "<seed:think>", "</seed:think>", "<seed:cot_budget_reflect>"),
    *("</seed:cot_budget_reflect>", "<|START_THINKING|>", "<|END_THINKING|>", "<|channel>", "<channel|>"),
]


def chat(opening: str, answer: str = "{{ m.content }}") -> str:
    """A template whose prompts end in an opening, and that writes an answer's turn in some way."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + answer + "{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )


GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "<|return|>{% else %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistantOPENING{% endif %}"
)
LAST_PART = "{{ m.content.split('</think>')[-1] }}"
BLOCK = "<think>\n\n</think>\n\n{{ m.content }}"
TEMPLATES = {
    "no reasoning": (chat(""), ""),
    "DeepSeek-R1": (chat("<think>\n", LAST_PART), "\n</think>\n\n"),
    "Qwen3, thinking": (chat("", BLOCK), "<think>\n\n</think>\n\n"),
    "Qwen3, not thinking": (chat("<think>\n\n</think>\n\n", BLOCK), ""),
    "Qwen3-Thinking": (chat("<think>\n", BLOCK), "\n</think>\n\n"),
    "MiniMax-M2": (chat("<think>\n"), "\n</think>\n\n"),
    "DeepSeek-V3.1": (chat("<think>", LAST_PART), "</think>"),
    "EXAONE Deep": (chat("<thought>\n"), "\n</thought>\n\n"),
    "Magistral": (chat("[THINK]"), "[/THINK]"),
    "Seed-OSS": (chat("<seed:think>"), "</seed:think>"),
    "Seed-OSS, no budget": (
        chat("<seed:think><seed:cot_budget_reflect>"),
        "</seed:cot_budget_reflect></seed:think>",
    ),
    "Kimi-VL": (chat("◁think▷"), "◁/think▷"),
    "Command A": (chat("<|START_THINKING|>"), "<|END_THINKING|>"),
    "Gemma 4": (chat("<|channel>thought\n"), "\n<channel|>\n\n"),
    "gpt-oss": (GPT_OSS.replace("OPENING", ""), "<|channel|>final<|message|>"),
    "gpt-oss, analysis": (
        GPT_OSS.replace("OPENING", "<|channel|>analysis<|message|>"),
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
}

OPEN_NOTHING = ("no reasoning", "Qwen3, thinking", "Qwen3, not thinking", "gpt-oss")
CUT_OFF = r"hm \boxed{2}"


@pytest.fixture
def load(tiny_model):
    def load(chat_template: str) -> object:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = chat_template
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.split_special_tokens = False
        return tokenizer

    return load


@pytest.fixture(scope="module")
def grader():
    with MathGrader() as grader:
        yield grader


def pool_of(tokenizer, *solutions: str) -> ExpertPool:
    demonstrations = [Demonstration(f"d{i}", "1+1?", solution) for i, solution in enumerate(solutions)]
    encoder = PromptEncoder(PromptTemplate(system=""), tokenizer, 99)
    return ExpertPool.encode(demonstrations, encoder, max_completion_length=99, seed=0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_grader_accepts_what_sft_teaches(load, grader, name):
    template, beginning = TEMPLATES[name]
    tokenizer = load(template)
    pool = drop_wrong(pool_of(tokenizer, r"so \boxed{2}"), tokenizer, grader, needs_answers=True)
    (item,) = pool.demonstrations
    target = tokenizer.decode(item.completion_ids[:-1])
    assert target == beginning + r"so \boxed{2}"
    grades = grader.grade(
        [
            it.judged
            for it in decode(tokenizer, [item.prompt_ids] * 2, [item.completion_ids, tokenizer.encode(CUT_OFF)])
        ],
        ["2", "2"],
    )
    assert [grade.correct for grade in grades] == [True, name in OPEN_NOTHING]


def test_wrong_and_unanswered_demonstrations_are_dropped_and_counted(load, grader):
    tokenizer = load(chat("<think>\n"))
    solutions = [
        r"so \boxed{2}",
        r"1+1=\boxed{2}</think>as above",
        r"1+1</think>\boxed{2}",
        "so 2",
        r"<think>\boxed{2}",
    ]
    pool = pool_of(tokenizer, *solutions)
    kept = drop_wrong(pool, tokenizer, grader, needs_answers=True)
    assert [item.demonstration.id for item in kept.demonstrations] == ["d0", "d2"]
    assert (kept.num_wrong, kept.num_unanswered) == (3, 0)
    kept = drop_wrong(pool, tokenizer, grader, needs_answers=False)
    assert [item.demonstration.id for item in kept.demonstrations] == ["d0", "d1", "d2", "d3", "d4"]
    assert (kept.num_wrong, kept.num_unanswered) == (0, 3)


def test_an_answer_that_its_tokens_lose_is_dropped(load, grader):
    """Without its spaces it is still right; without its braces it is no answer."""
    tokenizer = load(chat(""))
    pool = pool_of(tokenizer, r"so \boxed{x + 1}", r"so \boxed{2}")
    for place, lost in enumerate(" }"):
        item, (token,) = pool.demonstrations[place], tokenizer.encode(lost)
        pool.demonstrations[place] = item._replace(completion_ids=[it for it in item.completion_ids if it != token])
    kept = drop_wrong(pool, tokenizer, grader, needs_answers=False)
    assert [item.demonstration.id for item in kept.demonstrations] == ["d0"]
    assert kept.num_wrong == 1


def test_demonstrations_that_are_all_wrong_are_refused_with_their_block(load, grader):
    tokenizer = load(chat("[THINK]"))
    pool = pool_of(tokenizer, "so 2", "so 3")
    message = (
        r"marks all 2 of them wrong behind their prompts\. In the first, 'd0', it has no answer in \\boxed\{\}; its "
        r"tokens end in '\[/THINK\]so 2'\. The prompt opens a block of reasoning by \[THINK\], which \[/THINK\] "
        r"closes\. End each solution in \\boxed\{answer\}, after any reasoning\. .* stage_transition\.enabled: false"
    )
    with pytest.raises(UserError, match=message):
        drop_wrong(pool, tokenizer, grader, needs_answers=True)


def test_lenient_grader_may_read_answers_without_a_box(load):
    tokenizer = load(chat(""))
    with MathGrader(extraction="lenient") as lenient:
        kept = drop_wrong(pool_of(tokenizer, "so it is 2"), tokenizer, lenient, needs_answers=True)
    assert (kept.num_wrong, kept.num_unanswered) == (0, 1)


def test_answers_found_as_written_start_no_process(load, grader):
    with MathGrader() as fresh:
        drop_wrong(pool_of(load(chat("")), r"\boxed{\sqrt{x^2+1}}"), load(chat("")), fresh, needs_answers=True)
        assert fresh.worker_pids() == []
