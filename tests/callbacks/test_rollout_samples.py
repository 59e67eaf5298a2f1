from dataclasses import dataclass

import pytest

from egspo_lightning.callbacks import RolloutSamples, StageTransition
from egspo_lightning.data.sources import FiniteProblems
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.format import FormatReward
from egspo_lightning.types import Problem

MARKUP = "<script>alert(1)</script>\n# not a title **bold** | [a](b)"
ONE_COLLECTION = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 1}, "logger": True}
TAG = "rollout/samples/text_summary"


@dataclass
class Marked(FiniteProblems):
    """A problem full of markup."""

    def load(self) -> list[Problem]:
        return [Problem(str(i), MARKUP, "2") for i in range(4)]


def texts(events, run) -> list[tuple[int, str]]:
    log = events(run.trainer)
    if TAG not in log.Tags()["tensors"]:
        return []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in log.Tensors(TAG)]


def test_completions_are_logged_as_text_with_their_verdicts(tiny_run, events):
    run = tiny_run(RolloutSamples(num_samples=3), StageTransition(), logger=True, trainer={"max_epochs": 2}).fit()
    ((step, text),) = texts(events, run)
    assert step == 4
    samples = text.split("\n\n---\n\n")
    assert len(samples) == 3
    for sample, completion in zip(samples, run.data.collection.completions, strict=False):
        assert f"reward {completion.reward:g}, answer none, gold {completion.problem.answer}, no_answer" in sample
        assert completion.problem.problem in sample
        for line in completion.text.splitlines():
            assert f"    {line}" in sample


def test_markup_is_shown_as_it_is_written(tiny_run, events):
    """Every line is in an indented block: Markdown shows it literally, and escapes HTML in it."""
    from tensorboard.plugins.text.text_plugin import text_array_to_html
    from tensorboard.util.tensor_util import make_ndarray

    options = ONE_COLLECTION | {"data": {"problems": Marked(), "max_prompt_length": 99}}
    run = tiny_run(RolloutSamples(), **options).fit()
    ((_, text),) = texts(events, run)
    lines = [line for line in text.splitlines() if line and line != "---"]
    assert all(line.startswith("    ") for line in lines)
    shown = make_ndarray(events(run.trainer).Tensors(TAG)[0].tensor_proto)
    html = text_array_to_html(shown, enable_markdown=True)  # what the browser gets
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n# not a title **bold** | [a](b)" in html
    for interpreted in ("<script", "<h1", "<strong", "<a "):
        assert interpreted not in html


def test_a_text_that_is_cut_says_so(tiny_run, events):
    options = ONE_COLLECTION | {"data": {"problems": Marked(), "max_prompt_length": 99}}
    run = tiny_run(RolloutSamples(num_samples=1, max_characters=20), **options).fit()
    ((_, text),) = texts(events, run)
    assert f"    {MARKUP[:20]} ... ({len(MARKUP) - 20} more characters)" in text
    assert "not a title" not in text


def test_a_sum_shows_its_terms(tiny_run, events):
    reward = WeightedReward({"format": FormatReward(), "short": lambda texts, golds: [0.5] * len(texts)}, {"short": 3})
    run = tiny_run(RolloutSamples(num_samples=1), **ONE_COLLECTION | {"data": {"reward": reward}}).fit()
    ((_, text),) = texts(events, run)
    assert text.startswith("    reward 1.5 (format 0, short 0.5), answer none, gold ")


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 4, 6]), (2, [2, 6]), (0, [])])
def test_samples_come_every_n_collections(tiny_run, events, every, steps):
    run = tiny_run(RolloutSamples(every), **ONE_COLLECTION | {"trainer": {"max_epochs": 3}}).fit()
    assert [step for step, _ in texts(events, run)] == steps


@pytest.mark.parametrize("options", [{"every_n_collections": -1}, {"num_samples": 0}])
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match=r"rollout_samples.every_n_collections must be at least 0 and .num_samples"):
        RolloutSamples(**options)
