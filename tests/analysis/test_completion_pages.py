import base64
import math
from html.parser import HTMLParser

import pandas as pd
import pytest

from egspo_lightning.analysis.__main__ import main
from egspo_lightning.analysis.completion_pages import ColoredCompletions
from egspo_lightning.analysis.record_reading import Records
from egspo_lightning.errors import UserError

HOSTILE = [
    "<script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "</div></span></article></main></body></html>",
    "<b><table><!-- ",
    "]]><style>body{display:none}</style>",
    '" onmouseover="document.title=\'ran\'" x="',
    "' autofocus onfocus='document.title=1",
    "&lt;&amp;&#0;",
    "a\0b",
    "\u202egnp.exe",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x1b[2J",
    "line\r\nend",
    "",
]
VISIBLE = {"\0": "\u2400", "\u202e": "<U+202E>", "\x1b": "\u241b", "\r": "\u240d"}


def shown(text: str) -> str:
    for character, sign in VISIBLE.items():
        text = text.replace(character, sign)
    return text.replace("\n", "\u240a\n") or "\u2205"


def token(text, position, completion="0/0/0", **values):
    row = {
        "run": "r", "rollout_batch": 0, "stage": "egspo", "policy_version": 5, "problem_id": "<p>", "token": text,
        "completion_id": completion, "position": position, "token_id": 7, "entropy": 0.5, "old_logprob": -0.25,
        "is_high_entropy": False, "phi": 0.125, "token_weight": 0.375, "advantage": -1.5, "ratio": 1.0625,
        "entropy_after": 0.4375, "reward": 0.75, "threshold": 0.625,
    }  # fmt: skip
    return row | values


def completion(name="0/0/0", **values):
    row = {
        "run": "r", "rollout_batch": 0, "stage": "egspo", "policy_version": 5, "problem_id": "<p>",
        "completion_id": name, "problem": "2<3?", "completion": "", "gold": "yes", "extracted": None, "reward": 0.75,
        "is_correct": False, "length": 3, "is_truncated": True,
    }  # fmt: skip
    return row | values


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


@pytest.mark.parametrize("form", ["page", "notebook"])
def test_hostile_text_is_escaped(hostile, form):
    colored = ColoredCompletions(hostile)
    text = colored.page("<script>title</script>\0") if form == "page" else colored._repr_html_()
    page = Page(text)
    text.encode("utf-8")
    assert "\0" not in text
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "nav",
        "a",
        "div",
        "span",
        "article",
    }
    assert {tag for tag, _ in page.tags} <= allowed | {"dl", "dt", "dd"}
    assert page.texts == [shown(part) for part in HOSTILE]
    assert all(set(attributes) == {"class", "style", "data-v"} for attributes in page.tokens)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_color_shows_entropy_and_underline_shows_the_gate():
    values = [(0.0, False), (1.0, False), (2.0, True), (9.0, True)]
    tokens = [token("a", i, entropy=entropy, is_high_entropy=high) for i, (entropy, high) in enumerate(values)]
    page = Page(ColoredCompletions(records_of(tokens, [completion()]), most=2.0).page("run"))
    assert [found["style"] for found in page.tokens] == ["--h:0.00", "--h:0.42", "--h:0.85", "--h:0.85"]
    assert [found["class"] for found in page.tokens] == ["t", "t", "t high", "t high"]


def test_hover_box_lists_every_value():
    page = Page(ColoredCompletions(records_of([token(" 7", 3)], [completion()])).page("run"))
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
    return ColoredCompletions(records_of([row], [completion()])).page("run")


def test_completion_is_shown_with_problem_gold_and_verdict():
    page = ColoredCompletions(records_of([token("a", 0)], [completion()])).page("run")
    for text in ('<dd dir="auto">2&lt;3?</dd>', ">none found<", ">yes<", ">wrong, reward 0.75, 3 tokens, cut at the"):
        assert text in page


def test_latest_rollout_batches_come_first_up_to_max_completions(records):
    tokens, completions, _ = records
    shown_ids = ColoredCompletions(records, max_completions=20).completions["completion_id"].tolist()
    assert shown_ids == [f"2/0/{i}" for i in range(16)] + [f"1/0/{i}" for i in range(4)]
    page = Page(ColoredCompletions(records, max_completions=1000).page("run"))
    assert len(page.texts) == len(tokens)
    assert sum(tag == "article" for tag, _ in page.tags) == len(completions) == 48
    assert set(ColoredCompletions(records, rollout_batch=1).completions["rollout_batch"]) == {1}


def test_same_completion_id_in_two_runs_is_not_mixed():
    tokens = [token("a", 0), token("b", 0, run="s")]
    page = Page(ColoredCompletions(records_of(tokens, [completion(), completion(run="s")])).page("run"))
    assert page.texts == ["a", "b"]


def test_missing_rollout_batch_or_empty_selection_is_refused(records):
    with pytest.raises(UserError, match="rollout_batch must be one of those recorded: 0, 1, 2, got 5"):
        ColoredCompletions(records, rollout_batch=5)
    with pytest.raises(UserError, match="max_completions must be at least 1, got 0"):
        ColoredCompletions(records, max_completions=0)
    with pytest.raises(UserError, match="no completions to show"):
        ColoredCompletions(records._replace(completions=records.completions[:0]))


def test_command_writes_an_html_page(log_dir, tmp_path, capsys):
    main([str(log_dir), "--html", str(tmp_path / "out.html"), "--rollout_batch", "1"])
    assert capsys.readouterr().out == f"Page: {tmp_path / 'out.html'}\n"
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert sum(tag == "article" for tag, _ in page.tags) == 16
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in page.tags


def test_command_prints_user_errors_in_one_line(log_dir, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none"), "--html", "x.html"], "no such run"),
        ([str(log_dir), "--html", str(tmp_path / "no" / "x.html")], "cannot be written: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error


def test_browser_runs_no_script_and_hover_shows_values(hostile, tmp_path, browser):
    more = [token(f"t{i % 50}", i % 50, f"0/0/{1 + i // 50}") for i in range(199 * 50)]
    tokens = pd.concat([hostile.tokens, pd.DataFrame(more)])
    rows = pd.concat([hostile.completions, pd.DataFrame([completion(f"0/0/{i}") for i in range(1, 200)])])
    path = tmp_path / "page.html"
    colored = ColoredCompletions(Records(tokens, rows, pd.DataFrame()), max_completions=200)
    path.write_text(colored.page("Page"), encoding="utf-8")
    browser.open(path)
    assert browser.run("return document.title") == "Page"
    assert browser.run("return document.querySelectorAll('article').length") == 200
    assert browser.run("return document.querySelectorAll('script, img, .t *').length") == 0
    texts = browser.run("return [...document.querySelector('.text').children].map(e => e.textContent)")
    assert texts == [shown(text) for text in HOSTILE]
    content = "return getComputedStyle(arguments[0], '::after').content"
    last = browser.find("article:last-of-type .t:nth-child(7)")
    assert browser.run(content, last) == "none"
    browser.point_at(last)
    box = browser.run(content, last)
    for value in (
        "t6",
        "0.5 nats",
        "-0.25",
        "0.125",
        "0.375",
        "-1.5",
        "1.062",
        "0.4375",
        "0.75",
        "0.625",
        "0/0/199",
    ):
        assert value in box
    worst = browser.find(".text .t:nth-child(6)")  # the text that tries to break out of an attribute
    browser.point_at(worst)
    assert "onmouseover" in browser.run(content, worst)
    assert browser.run("return document.title") == "Page"
    assert len(base64.b64decode(browser.screenshot())) > 10_000
