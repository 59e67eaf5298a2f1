"""Chat columns, nested columns and usual names: the same problems and demonstrations from every form of a row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from egspo_lightning.data.dataset_sources import DatasetDemonstrations, DatasetProblems
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import DatasetBenchmark
from egspo_lightning.types import Demonstration, Problem


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


SYSTEM, ASKED, SOLVED = turn("system", "Think."), turn("user", "1+1?"), turn("assistant", "So \\boxed{2}")
EARLIER = [turn("user", "Hi"), turn("assistant", "Hello")]
TEXT_PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?", "image_url": None}]
THINK = (("system", "Think."),)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: dict[str, Any]) -> str:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"problem": "1+1?", "solution": "So \\boxed{2}", "answer": 2}, ()),
        ({"problem": "1+1?", "solution": "So \\boxed{2}"}, ()),
        ({"question": "1+1?", "answer": "So \\boxed{2}"}, ()),
        ({"prompt": "1+1?", "completion": "So \\boxed{2}"}, ()),
        ({"prompt": [ASKED], "completion": [SOLVED]}, ()),
        ({"prompt": [SYSTEM, ASKED], "completion": [SOLVED], "answer": ["2"]}, THINK),
        ({"messages": [ASKED, SOLVED]}, ()),
        ({"messages": [SYSTEM, ASKED, SOLVED], "answer": "2"}, THINK),
        ({"messages": [turn("developer", "Think."), ASKED, SOLVED]}, THINK),
        ({"messages": [turn("system", " "), ASKED, SOLVED]}, ()),
        (
            {"messages": [SYSTEM, *EARLIER, ASKED, SOLVED]},
            (*THINK, ("user", "Hi"), ("assistant", "Hello")),
        ),
        ({"messages": [turn("user", TEXT_PARTS), {**SOLVED, "tool_calls": None}]}, ()),
        ({"messages": [ASKED], "solution": "So \\boxed{2}"}, ()),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_problem_and_demonstration(write, row, context):
    path = write(row)
    problem = Problem("a.jsonl:1", "1+1?", "2", context=context)
    assert DatasetDemonstrations(path).load() == [Demonstration("a.jsonl:1", "1+1?", "So \\boxed{2}", context)]
    assert DatasetProblems(path).load() == [problem]
    assert DatasetBenchmark("mine", path).load() == [problem]


def test_nested_columns_are_named_with_dots(write):
    path = write(  # as verl writes GSM8K
        {
            "prompt": [ASKED],
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"answer": "1+1=<<1+1=2>>2\n#### 2", "question": "1+1?"},
        }
    )
    assert DatasetProblems(path, answer_field="reward_model.ground_truth").load()[0].answer == "2"
    assert DatasetProblems(path, answer_field="extra_info.answer").load()[0].answer == "2"
    assert DatasetProblems(path, problem_field="extra_info.question", answer_field="reward_model.ground_truth").load()
    (solved,) = DatasetDemonstrations(path, solution_field="extra_info.answer").load()
    assert solved.solution == "1+1=2\n\\boxed{2}"
    named = r"field 'reward_model\.truth' is missing\. Did you mean reward_model\.ground_truth\?.*answer_field"
    with pytest.raises(UserError, match=named):
        DatasetProblems(path, answer_field="reward_model.truth").load()


def test_answers_are_numbers_lists_or_found_in_a_named_solution(write):
    path = write({"problem": "p", "final": [1, 0.5], "messages": [ASKED, turn("assistant", "The **3**.")], "n": 7})
    assert DatasetProblems(path, answer_field="final").load()[0].answer == "1, 0.5"
    assert DatasetProblems(path, answer_field="n").load()[0].answer == "7"
    assert DatasetProblems(path, answer_field="messages", answer_extractor="bold").load()[0].answer == "3"


def test_solution_without_an_answer_gets_that_of_the_answer_column(write):
    path = write({"messages": [ASKED, turn("assistant", "It is two.")], "final": "2"})
    (solved,) = DatasetDemonstrations(path, answer_field="final").load()
    assert solved.solution == "It is two.\n\\boxed{2}"
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'answer' \(or an answer in .*\) is missing"):
        DatasetProblems(path).load()
    assert DatasetProblems(path).load_questions()[0].answer == ""
    with pytest.raises(UserError, match=r"field 'finale' is missing\. Did you mean final\?"):
        DatasetDemonstrations(path, answer_field="finale").load()


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("[{'role': 'user'}]", "must be a list of messages.*got str.*CSV cannot hold lists"),
        ([], r"must be a list of messages, each with role and content, got list \[\]"),
        ({"role": ["user"], "content": ["1+1?"]}, "must be a list of messages.*got dict"),
        ([{"from": "human", "value": "1+1?"}], "message 1 has the keys from, value, but needs role and content"),
        ([ASKED, turn("tool", "2"), SOLVED], "message 2 has the role 'tool'. Roles are system, user and assistant"),
        ([ASKED, {**SOLVED, "tool_calls": [{"id": 1}]}], "message 2 holds tool_calls, which is not supported"),
        ([ASKED, {**SOLVED, "thinking": "hm"}], "message 2 holds thinking, which is not supported"),
        ([turn("user", None), SOLVED], "message 1: content must be text or a list of text parts, got NoneType"),
        ([turn("user", ""), SOLVED], "message 1 has no text"),
        ([turn("user", [{"type": "image"}]), SOLVED], "message 1: content has a part of type 'image'"),
        ([ASKED, SYSTEM, SOLVED], "has a system message at place 2"),
        ([SOLVED], "has the roles assistant"),
        ([ASKED, SOLVED, SOLVED], "has the roles user, assistant, assistant"),
        ([SYSTEM], "has the roles system"),
        ([turn("user", "\0"), SOLVED], "'messages' holds the character NUL"),
    ],
)
def test_malformed_messages_are_refused_with_file_row_and_column(write, messages, found):
    path = write({"messages": [ASKED, SOLVED]}, {"messages": messages})
    for source in (DatasetDemonstrations(path), DatasetProblems(path), DatasetBenchmark("mine", path)):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: field 'messages'.*{found}|a\.jsonl:2: field {found}"):
            source.load()


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [ASKED]}, r"field 'solution' \(or completion, a turn of the assistant in messages\) is missing"),
        (
            {"text": "1+1?"},
            r"field 'problem' \(or question, prompt, messages\) is missing\. The row has the fields text",
        ),
        ({"prompt": [ASKED, SOLVED], "completion": [ASKED]}, None),
        ({"prompt": [ASKED], "completion": [SOLVED, ASKED]}, "'completion' ends in a turn of the user"),
        ({"prompt": [ASKED], "completion": "", "answer": "2"}, "field 'completion' must be non-empty text"),
    ],
)
def test_demonstration_without_a_solution_is_refused_with_its_row(write, row, found):
    if found is None:
        assert DatasetDemonstrations(write(row)).load()[0].solution == "So \\boxed{2}"
        return
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{found}"):
        DatasetDemonstrations(write(row)).load()


def test_own_system_message_replaces_that_of_the_template(write):
    """In prompts and demonstrations, with a chat template and as plain text."""
    from transformers import AutoTokenizer

    path = write({"messages": [SYSTEM, *EARLIER, ASKED, SOLVED]}, {"messages": [ASKED, SOLVED]})
    (own, usual), (solved, _) = DatasetProblems(path).load(), DatasetDemonstrations(path).load()
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "configs" / "tiny_model")
    template = PromptTemplate(system="Box.")
    assert template.render(tokenizer, own.problem, own.context) == "Think.\n\nHi\n\nHello\n\n1+1?\n\n"
    assert template.render(tokenizer, usual.problem, usual.context) == "Box.\n\n1+1?\n\n"
    tokenizer.chat_template = CHAT
    rendered = "<system>Think.<user>Hi<assistant>Hello<user>1+1?"
    assert template.render(tokenizer, own.problem, own.context) == rendered
    assert template.render(tokenizer, usual.problem, usual.context) == "<system>Box.<user>1+1?"
    assert bytes(template.encode_demonstration(tokenizer, solved)[0]).decode() == rendered
