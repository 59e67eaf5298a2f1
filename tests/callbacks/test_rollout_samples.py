import shlex
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
import torch

from egspo_lightning import RolloutSamples, StageTransition, TokenRecords
from egspo_lightning.analysis.token_text import visible
from egspo_lightning.callbacks.rollout_samples import SEPARATOR
from egspo_lightning.cli.report_command import write_report
from egspo_lightning.data.sources import FiniteProblems
from egspo_lightning.ops.gate import OpenGate
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.format import FormatReward
from egspo_lightning.types import Problem

MARKUP = "<script>alert(1)</script>\n# not a title **bold** | [a](b)"
ONE_ROLLOUT_BATCH = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 1}, "logger": True}
TAG = "rollout/samples/text_summary"


@dataclass
class MarkupProblems(FiniteProblems):
    """Problems that contain markup."""

    def load(self) -> list[Problem]:
        return [Problem(str(i), MARKUP, "2") for i in range(4)]


def texts(events, run) -> list[tuple[int, str]]:
    log = events(run.trainer)
    if TAG not in log.Tags()["tensors"]:
        return []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in log.Tensors(TAG)]


def test_completions_are_logged_as_text_with_verdicts(tiny_run, events):
    run = tiny_run(RolloutSamples(num_samples=3), StageTransition(), logger=True, trainer={"max_epochs": 2}).fit()
    ((step, text),) = texts(events, run)
    assert step == 3
    *samples, pointers = text.split(SEPARATOR)
    assert len(samples) == 3
    for sample, completion in zip(samples, run.data.phases.rollouts.completions, strict=False):
        assert f"reward {completion.reward:g}, answer none, gold {completion.problem.answer}, no_answer" in sample
        assert completion.problem.problem in sample
    assert pointers == "Bold: high-entropy token, takes the full update."  # no token records, so no page to link


class PageText(HTMLParser):
    """The completions of a page, and their bold tokens with tooltips."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.completions: list[str] = []
        self.bold: list[list[tuple[str, str]]] = []
        self._open: list[str] = []
        self._hint = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "hr":
            return
        self._open.append(tag)
        self._hint = dict(attrs).get("title", "")
        if tag == "pre":
            self.completions.append("")
            self.bold.append([])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "pre" in self._open and "code" not in self._open:
            self.completions[-1] += data
            if "strong" in self._open:
                assert self._open[-1] == "a"
                self.bold[-1].append((data, self._hint))


def test_high_entropy_tokens_are_bold(tiny_run, events):
    """Compares the HTML of TensorBoard's server with values computed from the rollout batch."""
    run = tiny_run(RolloutSamples(num_samples=4), **ONE_ROLLOUT_BATCH).fit()
    shown = PageText(served_html(events, run))
    # every other block holds verdict and problem
    shown.completions, shown.bold = shown.completions[1::2], shown.bold[1::2]
    rollout, completions = run.data.phases.rollouts[1::-1]
    num_bold = 0
    for row, completion in enumerate(completions[:4]):
        tokens = [visible(run.module.tokenizer.decode([i])).replace("\u240a", "\u240a\n") for i in completion.token_ids]
        values = rollout.entropies[row][rollout.completion_mask[row]].tolist()
        advantage = rollout.advantages[row][rollout.completion_mask[row]][0].item()
        expected = [
            (token, f"entropy {value:.3g} nats, advantage {advantage:.3g}")
            for token, value in zip(tokens, values, strict=True)
            if value >= rollout.threshold[row].item()
        ]
        assert shown.completions[row] == "".join(tokens)
        assert shown.bold[row] == expected
        num_bold += len(expected)
    assert 0 < num_bold < sum(len(completion.token_ids) for completion in completions[:4])


def test_open_gate_marks_no_tokens(tiny_run, events):
    options = {"module": {"initial_stage": "egspo", "gate": OpenGate()}, "trainer": {"max_epochs": 1}, "logger": True}
    ((_, text),) = texts(events, tiny_run(RolloutSamples(), **options).fit())
    assert "<pre>" in text
    assert "<strong>" not in text


def test_with_token_records_the_text_gives_a_working_report_command(tiny_run, events, tmp_path):
    callbacks = TokenRecords(), RolloutSamples(num_samples=1)  # in the order of the command line
    run = tiny_run(*callbacks, **ONE_ROLLOUT_BATCH).fit()
    ((_, text),) = texts(events, run)
    command = shlex.split(text.rsplit("\n", 1)[-1])
    assert command[:3] == ["python", "-m", "egspo_lightning"]
    assert command[3:] == ["report", run.trainer.log_dir, "-o", "report.html"]
    assert write_report([*command[4:6], str(tmp_path / command[6])], "") == f"Report: {tmp_path / 'report.html'}"
    assert "All 16 recorded completions" in (tmp_path / "report.html").read_text(encoding="utf-8")


def served_html(events, run) -> str:
    """HTML of the latest samples, as TensorBoard serves it."""
    from tensorboard.plugins.text.text_plugin import text_array_to_html
    from tensorboard.util.tensor_util import make_ndarray

    return text_array_to_html(make_ndarray(events(run.trainer).Tensors(TAG)[-1].tensor_proto), enable_markdown=True)


def test_markup_in_problems_is_shown_literally(tiny_run, events):
    """Every line is in an indented block, which Markdown shows literally with escaped HTML."""
    options = ONE_ROLLOUT_BATCH | {"data": {"problems": MarkupProblems(), "max_prompt_length": 99}}
    html = served_html(events, tiny_run(RolloutSamples(), **options).fit())
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n# not a title **bold** | [a](b)" in html
    for interpreted in ("<script", "<h1", 'href="b"'):
        assert interpreted not in html


@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_markup_in_completions_is_shown_literally(tiny_run, events, entropy):
    """The text tries to break out of a block, a table, a list and an attribute."""
    samples = RolloutSamples()
    run = tiny_run(samples, **ONE_ROLLOUT_BATCH).fit()
    hostile = "</pre><script>alert(1)</script>\n\n# title\n\n**bold** [a](b) </strong> \" '"
    token_ids = run.module.tokenizer.encode(hostile)
    length = len(token_ids)
    ones = torch.ones(1, length)
    rollout = run.data.phases.rollouts.batch._replace(
        completion_mask=ones.bool(),
        entropies=entropy * ones,
        advantages=ones,
        threshold=torch.tensor([[0.5]]),
        is_high=entropy * ones >= 0.5,
    )
    completion = run.data.phases.rollouts.completions[0]._replace(token_ids=token_ids)
    run.data.phases.rollouts = run.data.phases.rollouts._replace(batch=rollout, completions=[completion])
    samples.on_train_epoch_end(run.trainer, run.module)
    html = served_html(events, run)
    shown = PageText(html).completions[1]
    assert shown == visible(hostile).replace("\u240a", "\u240a\n")
    for interpreted in ("<script", "<h1", "href="):
        assert interpreted not in html


def test_truncated_text_says_how_much_is_missing(tiny_run, events):
    options = ONE_ROLLOUT_BATCH | {"data": {"problems": MarkupProblems(), "max_prompt_length": 99}}
    run = tiny_run(RolloutSamples(num_samples=1, max_characters=20), **options).fit()
    ((_, text),) = texts(events, run)
    assert f"    {MARKUP[:20]} ... ({len(MARKUP) - 20} more characters)" in text
    assert "not a title" not in text


def test_weighted_reward_shows_its_terms(tiny_run, events):
    reward = WeightedReward({"format": FormatReward(), "short": lambda texts, golds: [0.5] * len(texts)}, {"short": 3})
    run = tiny_run(RolloutSamples(num_samples=1), **ONE_ROLLOUT_BATCH | {"data": {"reward": reward}}).fit()
    ((_, text),) = texts(events, run)
    assert text.startswith("    reward 1.5 (format 0, short 0.5), answer none, gold ")


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 3, 5]), (2, [1, 5]), (0, [])])
def test_samples_are_logged_every_n_rollout_batches(tiny_run, events, every, steps):
    run = tiny_run(RolloutSamples(every), **ONE_ROLLOUT_BATCH | {"trainer": {"max_epochs": 3}}).fit()
    assert [step for step, _ in texts(events, run)] == steps
