import pytest

from egspo_lightning.rewards.format import FormatReward, is_well_formed
from egspo_lightning.rewards.functions import Details
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.types import Problem

OPENED = "<|im_start|>assistant\n<think>\n"  # end of a chat template of a reasoning model


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        # without a think block
        (r"So \boxed{3}", True),
        (r"So \boxed {3}, as was to be shown.", True),
        (r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{\{1, 2\}}", True),
        ("So 3", False),
        ("", False),
        (r"\boxed{3} or \boxed{4}", False),
        (r"\boxed{3} again \boxed{3}", False),
        (r"\boxed{\boxed{3}}", False),
        (r"\boxed{3", False),
        (r"\boxed{3} and \boxed{4", False),
        (r"\boxed{}", False),
        (r"\boxed{  }", False),
        (r"\\boxed{3}", False),  # a line break followed by text
        (r"\\boxed{3} \boxed{4}", True),
        (r"\\\boxed{3}", True),  # a line break followed by a box
        (r"\{\boxed{3}\}", True),
        (r"\boxed 3", False),
        ("\\boxed{" + "1" * 600 + "}", False),  # above the maximal answer length
        # with a think block that the completion opens
        (r"<think>so</think>\boxed{3}", True),
        ("\n <think>so</think>\n" + r"Thus \boxed{3}.", True),
        (r"<think></think>\boxed{3}", True),
        (r"<think>\boxed{1} or \boxed{2}</think>\boxed{3}", True),
        (r"<think>\boxed{3}</think> as above", False),
        (r"<think>\boxed{3}</think>\boxed{3}\boxed{3}", False),
        (r"<think>so \boxed{3}", False),
        (r"<think>so</thin>\boxed{3}", False),
        (r"so</think>\boxed{3}", False),
        (r"\boxed{3}<think>so</think>", False),
        (r"First <think>so</think>\boxed{3}", False),
        (r"<think>a</think><think>b</think>\boxed{3}", False),
        (r"<think>a<think>b</think>\boxed{3}", False),
        (r"<think>a</think>b</think>\boxed{3}", False),
        (r"</think><think>\boxed{3}", False),
    ],
)
def test_is_well_formed_by_cases(text, is_good):
    assert is_well_formed(text) is is_good


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        (r"so</think>\boxed{3}", True),
        (r"</think>\boxed{3}", True),
        (r"\boxed{1}</think>\boxed{3}", True),
        (r"\boxed{3}</think>", False),
        (r"so \boxed{3}", False),
        (r"<think>so</think>\boxed{3}", False),  # opened twice
        (r"so</think>\boxed{3}</think>", False),
    ],
)
@pytest.mark.parametrize("prompt", [OPENED, "Q: 1+2=? <think>"])
def test_completion_must_close_a_think_block_opened_by_the_prompt(prompt, text, is_good):
    assert is_well_formed(text, prompt) is is_good


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",  # Qwen3 template with thinking disabled
        "Think within <think> and </think>, then answer.",
        "What does <think> mean?",
    ],
)
def test_other_prompts_open_no_think_block(prompt):
    assert is_well_formed(r"\boxed{3}", prompt)
    assert not is_well_formed(r"so</think>\boxed{3}", prompt)


def test_format_reward_uses_the_prompt_of_each_completion():
    grade = Grade(True, "graded", "3", 0.0)
    details = [Details(Problem("1", "q", "3"), prompt, 5, 9, False, grade) for prompt in (OPENED, "Q", OPENED)]
    texts = [r"so</think>\boxed{3}", r"so</think>\boxed{3}", r"\boxed{3}"]
    assert FormatReward()(texts, ["3"] * 3, details) == [1.0, 0.0, 0.0]
    assert FormatReward()(texts, ["3"] * 3) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("piece", ["<think>", "</think>", "\\boxed{", "\\", "{", "}", "\\boxed ", "<think></think>"])
def test_is_well_formed_takes_linear_time_on_repetitions(piece):
    """A backtracking pattern would take hours."""
    assert not is_well_formed(piece * 200_000)
