"""Blocks of reasoning: every pair of marks, whoever opens the block."""

import pytest

from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.rewards.format import is_well_formed
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rewards.think_blocks import (
    FINAL_CHANNEL,
    THINK_MARKS,
    close_opened_block,
    is_part_of_mark,
    opened_block,
    with_opened_block,
)

PAIRS = pytest.mark.parametrize(("begin", "end"), THINK_MARKS.items())


@PAIRS
@pytest.mark.parametrize("is_opened_by_prompt", [False, True])
@pytest.mark.parametrize(
    ("rest", "answer"),
    [
        (r"hm \boxed{5}", None),  # cut off
        (r"hm \boxed{5} END as found", None),
        (r"hm \boxed{5} END so \boxed{6}", "6"),
        (r"END\boxed{6}", "6"),
        (r"a BEGIN b \boxed{5} END \boxed{6}", "6"),
        (r"a END \boxed{5} BEGIN \boxed{6}", "5"),
        (r"a END \boxed{5} BEGIN b END c", None),
        (r"OTHER \boxed{5}", None),  # only its own mark closes a block
        (r"OTHER \boxed{5} END \boxed{6}", "6"),
    ],
)
def test_a_box_counts_only_behind_a_closed_block(begin, end, is_opened_by_prompt, rest, answer):
    other = "[/THINK]" if begin != "[THINK]" else "</think>"
    rest = rest.replace("BEGIN", begin).replace("END", end).replace("OTHER", other)
    text = with_opened_block(rest, f"<user>1+1?<assistant>{begin}\n") if is_opened_by_prompt else begin + rest
    assert extract_boxed(text) == answer


def test_lenient_extraction_leaves_cut_off_reasoning_out():
    texts = [f"{begin}the answer is 5" for begin in THINK_MARKS]
    with MathGrader(extraction="lenient") as lenient:
        assert {grade.status for grade in lenient.grade(texts, ["5"] * len(texts))} == {"no_answer"}


@PAIRS
def test_a_closing_mark_alone_ends_reasoning(begin, end):
    assert extract_boxed(rf"\boxed{{5}} {end} \boxed{{6}}") == "6"
    assert extract_boxed(rf"\boxed{{5}} {end} done") is None


@PAIRS
def test_format_reward_knows_every_pair_of_marks(begin, end):
    for prompt, start in (("", begin), (f"Q {begin}\n", "")):
        assert is_well_formed(rf"{start}\boxed{{1}} so{end}\boxed{{3}}", prompt)
        assert not is_well_formed(rf"{start}so \boxed{{3}}", prompt)
        assert not is_well_formed(rf"{start}so{end}\boxed{{3}}{end}", prompt)
        assert not is_well_formed(rf"{start}{begin}so{end}\boxed{{3}}", prompt)
    assert not is_well_formed(rf"so{end}\boxed{{3}}") or end == FINAL_CHANNEL


def test_final_channel_of_gpt_oss_needs_no_reasoning_before_it():
    assert is_well_formed(FINAL_CHANNEL + r"\boxed{3}")
    assert not is_well_formed(FINAL_CHANNEL + r"\boxed{3}" + FINAL_CHANNEL)


@pytest.mark.parametrize(
    "prompt",
    ["Q", "<think>\n\n</think>\n\n", "What does [THINK] mean?", "<|channel>thought\n<channel|>", "<|start|>assistant"],
)
def test_other_prompts_open_no_block(prompt):
    assert opened_block(prompt) is None
    assert close_opened_block("so 2", prompt) == "so 2"


@PAIRS
@pytest.mark.parametrize("blank", ["", "\n"])
def test_target_closes_the_block_that_its_prompt_opens(begin, end, blank):
    prompt = f"Q {begin}{blank}"
    target = close_opened_block(r"so \boxed{2}", prompt)
    assert target.startswith(blank)
    assert target.endswith(end + 2 * blank + r"so \boxed{2}")
    assert extract_boxed(with_opened_block(target, prompt)) == "2"
    assert is_well_formed(target, prompt)
    reasoning = rf"1+1{end}so \boxed{{2}}"
    for solution in (reasoning, begin + blank + reasoning, f"\n{begin}{blank}{reasoning}"):
        assert close_opened_block(solution, prompt) == reasoning  # the prompt has the opening mark


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("<think>\n", "\n</think>\n\nso 2"),
        ("[THINK]", "[/THINK]so 2"),
        ("<seed:think><seed:cot_budget_reflect>", "</seed:cot_budget_reflect></seed:think>so 2"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>so 2"),
    ],
)
def test_an_empty_block_is_closed_as_templates_write_it(prompt, target):
    assert close_opened_block("so 2", prompt) == target


def test_cut_off_reasoning_stays_without_an_answer():
    r"""It must not become the answer behind an empty block."""
    solution = r"<think>1+1 \boxed{2}"
    assert extract_boxed(with_opened_block(close_opened_block(solution, "<think>\n"), "<think>\n")) is None


@pytest.mark.parametrize("token", ["<think>", "<|channel|>", "<|message|>", "[/THINK]", "<seed:cot_budget_reflect>"])
def test_special_tokens_in_marks_are_recognized(token):
    assert is_part_of_mark(token)
    assert not is_part_of_mark("<|im_end|>")
