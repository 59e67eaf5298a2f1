import math
from html.parser import HTMLParser

import pandas as pd
import pytest

from egspo_lightning.analysis.completion_pages import ColoredCompletions
from egspo_lightning.analysis.record_reading import Records
from egspo_lightning.errors import UserError
from hostile_records import HOSTILE, completion, shown, token


def records_of(tokens, completions) -> Records:
    return Records(pd.DataFrame(tokens), pd.DataFrame(completions), pd.DataFrame())


@pytest.fixture
def hostile() -> Records:
    tokens = [token(text, i) for i, text in enumerate(HOSTILE)]
    everything = "".join(HOSTILE)
    return records_of(tokens, [completion(problem=everything, gold=everything, extracted=everything)])


class Page(HTMLParser):
    """Tags, token texts and hover boxes of a page, parsed with the standard library."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "span" and "data-v" in dict(attrs):
            self.texts.append("")

    def handle_data(self, data):
        if self.tags and "data-v" in self.tags[-1][1]:
            self.texts[-1] += data

    @property
    def tokens(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if "data-v" in attributes]


def test_hostile_text_is_escaped(hostile):
    text = ColoredCompletions(hostile)._repr_html_()
    page = Page(text)
    text.encode("utf-8")
    assert "\0" not in text
    assert {tag for tag, _ in page.tags} <= {"style", "h2", "div", "span", "article", "dl", "dt", "dd"}
    assert page.texts == [shown(part) for part in HOSTILE]
    assert all(set(attributes) == {"class", "style", "data-v"} for attributes in page.tokens)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_color_shows_entropy_and_underline_shows_the_gate():
    values = [(0.0, False), (1.0, False), (2.0, True), (9.0, True)]
    tokens = [token("a", i, entropy=entropy, is_high_entropy=high) for i, (entropy, high) in enumerate(values)]
    page = Page(ColoredCompletions(records_of(tokens, [completion()]), most=2.0)._repr_html_())
    assert [found["style"] for found in page.tokens] == ["--h:0.00", "--h:0.42", "--h:0.85", "--h:0.85"]
    assert [found["class"] for found in page.tokens] == ["t", "t", "t high", "t high"]


def test_hover_box_lists_every_value():
    page = Page(ColoredCompletions(records_of([token(" 7", 3)], [completion()]))._repr_html_())
    assert page.tokens[0]["data-v"].split("\n") == [
        "token \u201c\u24237\u201d, id 7",
        "position             3",
        "gate                 low: attenuated",
        "entropy              0.5 nats",
        "threshold            0.625 nats",
        "log-probability      -0.25 nats",
        "phi                  0.125",
        "weight               0.375",
        "advantage            -1.5",
        "ratio after update   1.062",
        "entropy after update 0.4375 nats",
        "reward               0.75",
        "problem <p>, completion 0/0/0",
    ]
    (box,) = [found["data-v"] for found in Page(_open_gate()).tokens]
    assert "threshold            -inf nats" in box


def _open_gate() -> str:
    row = token("a", 0, threshold=-math.inf, is_high_entropy=True)
    return ColoredCompletions(records_of([row], [completion()]))._repr_html_()


def test_completion_is_shown_with_problem_gold_and_verdict():
    page = ColoredCompletions(records_of([token("a", 0)], [completion()]))._repr_html_()
    for text in ('<dd dir="auto">2&lt;3?</dd>', ">none found<", ">yes<", ">wrong, reward 0.75, 3 tokens, cut at the"):
        assert text in page


def test_latest_rollout_batches_come_first_up_to_max_completions(records):
    tokens, completions, _ = records
    shown_ids = ColoredCompletions(records, max_completions=20).completions["completion_id"].tolist()
    assert shown_ids == [f"2/0/{i}" for i in range(16)] + [f"1/0/{i}" for i in range(4)]
    page = Page(ColoredCompletions(records, max_completions=1000)._repr_html_())
    assert len(page.texts) == len(tokens)
    assert sum(tag == "article" for tag, _ in page.tags) == len(completions) == 48
    assert set(ColoredCompletions(records, rollout_batch=1).completions["rollout_batch"]) == {1}


def test_same_completion_id_in_two_runs_is_not_mixed():
    tokens = [token("a", 0), token("b", 0, run="s")]
    page = Page(ColoredCompletions(records_of(tokens, [completion(), completion(run="s")]))._repr_html_())
    assert page.texts == ["a", "b"]


def test_missing_rollout_batch_or_empty_selection_is_refused(records):
    with pytest.raises(UserError, match="rollout_batch must be one of those recorded: 0, 1, 2, got 5"):
        ColoredCompletions(records, rollout_batch=5)
    with pytest.raises(UserError, match="max_completions must be at least 1, got 0"):
        ColoredCompletions(records, max_completions=0)
    with pytest.raises(UserError, match="no completions to show"):
        ColoredCompletions(records._replace(completions=records.completions[:0]))
