"""``egspo report``: the command, the page of real runs, and the page in a browser."""

import base64
import gzip
import json
import re
import shutil
import sys
import time

import numpy as np
import pandas as pd
import pytest

from egspo_lightning.analysis.report_page import report_page
from egspo_lightning.analysis.run_reading import Run, read_runs
from egspo_lightning.cli.early_answers import answer_early
from egspo_lightning.cli.main import run as train
from egspo_lightning.cli.report_command import write_report
from egspo_lightning.errors import UserError
from hostile_records import HOSTILE, completion, shown, token

SHORT = [
    "--trainer.max_epochs=5",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=2",
    "--stage_transition.learning_rate=1e-3",
    "--data.num_problems=2",
    "--data.num_generations=4",
    "--data.demonstrations.num_demonstrations=128",
    "--data.benchmarks.init_args.num_problems=8",
    "--data.max_completion_length=32",
    "--math_benchmark.every_n_epochs=1",
    "--token_records.every_n_rollout_batches=1",
    "--hf_export.enabled=false",
]
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def runs(repository, tmp_path_factory):
    """Log folders of a short run of the quickstart with EGSPO, and of one with GRPO and Lightning's CSV logger."""
    folder = tmp_path_factory.mktemp("runs")
    quickstart, grpo = (
        f"--config={repository / 'configs' / name}" for name in ("quickstart.yaml", "methods/grpo.yaml")
    )
    root = f"--trainer.default_root_dir={folder / 'logs'}"
    csv = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=grpo"]
    first = train(["fit", quickstart, *SHORT, root]).trainer.log_dir
    second = train(["fit", quickstart, grpo, *SHORT, root, *csv]).trainer.log_dir
    return [first, second]


def data_of(page: str) -> dict:
    (packed,) = re.findall(r'id="data">([^<]*)<', page)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


# The command


def test_command_writes_the_page_of_a_run(runs, tmp_path):
    out = tmp_path / "out.html"
    assert write_report([runs[0], "-o", str(out)], "") == f"Report: {out}"
    page = out.read_text(encoding="utf-8")
    for text in (
        "configs/tiny_model (random weights)",
        "GeneratedProblems (ArithmeticTask)",
        "after SFT",
        "egspo</dd>",
    ):
        assert text in page
    assert "All 24 recorded completions" in page
    data = data_of(page)
    titles = [chart["title"] for chart in data["charts"]]
    assert titles == [
        "Reward", "Accuracy on arithmetic", "Entropy", "Threshold tau", "High-entropy tokens",
        "Weight held by high and low tokens", "KL divergence", "Length", "Truncated completions", "SFT loss",
    ]  # fmt: skip
    assert data["completions"]["completions"]["batch"] == [number for number in range(3) for _ in range(8)]


def test_page_has_no_external_content(runs):
    page = report_page(read_runs(runs), 2000)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert page == report_page(read_runs(runs), 2000)  # the same bytes each time


def test_metrics_of_the_csv_logger_are_drawn(runs):
    (grpo,) = read_runs([f"csv={runs[1]}"])
    assert grpo.name == "csv"
    assert grpo.phases["batches"].tolist()[2:] == [1, 2, 3]
    titles = [chart["title"] for chart in data_of(report_page([grpo], 10))["charts"]]
    assert {"Reward", "Entropy", "Length"} <= set(titles)
    assert "Threshold tau" not in titles  # an open gate has none


def test_names_are_the_parts_in_which_paths_differ(runs, tmp_path):
    for place in ("a/v0", "b/v0", "b/v1"):
        shutil.copytree(runs[0], tmp_path / place)
    named = [run.name for run in read_runs([str(tmp_path / place) for place in ("a/v0", "b/v0")])]
    assert named == ["a", "b"]
    named = [run.name for run in read_runs([str(tmp_path / "b" / "v0"), f"mine={tmp_path / 'b' / 'v1'}"])]
    assert named == ["v0", "mine"]
    with pytest.raises(UserError, match="Two runs have one name: x, x"):
        read_runs([f"x={runs[0]}", f"x={runs[1]}"])


def test_folder_that_is_no_run_is_answered_with_the_runs_nearby(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "logs" / "version_0")
    with pytest.raises(UserError) as caught:
        write_report([str(tmp_path / "logs" / "version_1")], "")
    for words in ("no such folder", f"Did you mean {tmp_path / 'logs' / 'version_0'}?"):
        assert words in str(caught.value)
    with pytest.raises(UserError) as caught:
        write_report([str(tmp_path / "logs")], "")
    for words in ("no logs of a run in it", "benchmarks.jsonl", str(tmp_path / "logs" / "version_0")):
        assert words in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No run was found below"):
        write_report([str(tmp_path / "empty")], "")


def test_wrong_arguments_are_refused_in_one_line(runs, tmp_path, capsys):
    for arguments, message in (
        (["-o", str(tmp_path / "no" / "x.html")], "cannot be written: No such file or directory"),
        (["--max_completions=0"], "max_completions must be at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            write_report([runs[0], *arguments], "")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "benchmarks.jsonl").write_text("{'no': 'json'}\n")
    with pytest.raises(UserError, match=r"benchmarks.jsonl: not readable as JSON lines"):
        write_report([str(tmp_path / "run")], "")
    with pytest.raises(SystemExit):
        answer_early(["report", "--help"])
    printed = capsys.readouterr().out
    assert "usage: egspo report" in printed
    assert "--max_completions" in printed


def test_missing_plotly_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "egspo_lightning.analysis.report_page", None)  # its import fails
    with pytest.raises(UserError, match="report needs Plotly and pandas: pip install plotly pandas"):
        write_report([str(tmp_path)], "")


def test_run_without_token_records_says_how_to_record_them(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("token_records"))
    page = report_page(read_runs([str(folder)]), 2000)
    assert "There are no token records." in page
    assert "token_records.every_n_rollout_batches" in page
    assert data_of(page)["completions"] is None


def test_run_that_is_being_written_is_shown(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    with (folder / "benchmarks.jsonl").open("a") as file:
        file.write('{"step": 99, "bench')
    (run,) = read_runs([str(folder)])
    assert [row["step"] for row in run.scores] == [0, 2, 4, 8, 12, 16]


# Size and content of many completions


def records(num_completions: int, length: int, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Records of random values, which compress badly."""
    rng = np.random.default_rng(seed)
    rows = [
        completion(
            f"{i // 32}/0/{i}", rollout_batch=i // 32, problem_id=f"p{i // 8}", length=length, is_correct=i % 3 == 0
        )
        for i in range(num_completions)
    ]
    size = num_completions * length
    columns = ["entropy", "old_logprob", "phi", "token_weight", "advantage", "ratio", "entropy_after"]
    tokens = pd.DataFrame(rng.normal(size=(size, len(columns))), columns=columns).assign(
        completion_id=np.repeat([row["completion_id"] for row in rows], length),
        position=np.tile(np.arange(length), num_completions),
        token_id=rng.integers(0, 50_000, size),
        token="t",
        is_high_entropy=rng.random(size) < 0.2,
        threshold=0.5,
    )
    return pd.DataFrame(rows), tokens


def run_of(tmp_path, completions: pd.DataFrame, tokens: pd.DataFrame, name: str = "run") -> Run:
    return Run(name, tmp_path, {}, pd.DataFrame({"steps": [], "batches": []}), [], completions, tokens)


@pytest.mark.slow
def test_page_of_two_thousand_completions_has_at_most_eight_megabytes(tmp_path):
    """Of 120 tokens each, which is the limit of tokens in a page."""
    page = report_page([run_of(tmp_path, *records(2000, 120))], 2000)
    assert "All 2,000 recorded completions." in page
    assert len(page.encode()) < 8 * MEGABYTE


def test_limit_is_told_in_the_page(tmp_path):
    page = report_page([run_of(tmp_path, *records(640, 5))], 100)
    assert "96 of 640 recorded completions, evenly over training." in " ".join(page.split())


def test_hostile_text_is_escaped_in_the_page(tmp_path):
    run = hostile_run(tmp_path)
    page = report_page([run, run._replace(name="other")], 10)
    visible_part = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "document.title" in visible_part
    assert "<img" not in visible_part
    assert "\0" not in page


# In a browser


def hostile_run(tmp_path) -> Run:
    everything = "".join(HOSTILE)
    tokens = pd.DataFrame([token(text, i, threshold=-np.inf) for i, text in enumerate(HOSTILE)])
    completions = pd.DataFrame([completion(problem=everything, gold=everything, extracted=everything)])
    metrics = {"avg@1": 0.5, "num_problems": 4.0}
    scores = [{"step": 1, "epoch": 0, "benchmarks": [{"benchmark": everything, "num_samples": 1, "metrics": metrics}]}]
    config = {"model": {"method": everything, "policy": {"name_or_path": everything}}, "seed_everything": everything}
    return Run(everything, tmp_path, config, pd.DataFrame({"steps": [], "batches": []}), scores, completions, tokens)


def opened(browser, page: str, path):
    path.write_text(page, encoding="utf-8")
    browser.open(path)
    deadline = time.monotonic() + 60
    while browser.run("return document.body.dataset.ready") != "yes":
        assert time.monotonic() < deadline, "The page does not become ready."
        time.sleep(0.1)
    return browser


def choose(browser, label: str, value: str) -> None:
    browser.run(
        "const labels = [...document.querySelectorAll('.tools label')];"
        "const found = labels.find(label => label.textContent.startsWith(arguments[0]));"
        "const select = found.querySelector('select'); select.value = arguments[1];"
        "select.dispatchEvent(new Event('change'));",
        label,
        value,
    )


def test_browser_shows_hostile_text_as_text(tmp_path, browser):
    run = hostile_run(tmp_path)
    opened(browser, report_page([run], 10), tmp_path / "page.html")
    assert browser.run("return document.title").endswith("egspo report")
    texts = browser.run("return [...document.querySelectorAll('.text .t')].map(e => e.textContent)")
    assert texts == [shown(text) for text in HOSTILE]
    assert browser.run("return document.querySelector('.problem').textContent") == shown("".join(HOSTILE)).strip(
        "\u2205"
    )
    added = "#problems img, #problems script, #problems b b, .t *, .card h3 *, .run dd *"
    assert browser.run("return document.querySelectorAll(arguments[0]).length", added) == 0
    assert browser.run("return document.querySelectorAll('.js-plotly-plot').length") == 1
    worst = browser.find(".text .t:nth-child(6)")  # the text that tries to break out of an attribute
    browser.point_at(worst)
    box = browser.run("return document.getElementById('hover').textContent")
    assert "onmouseover" in box
    assert "not finite nats" in box  # the threshold of an open gate
    assert browser.run("return document.title").endswith("egspo report")


def test_browser_allows_no_other_script(tmp_path, runs, browser):
    opened(browser, report_page(read_runs(runs[:1]), 10), tmp_path / "page.html")
    browser.run("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.head.append(s)")
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 2\">')")
    assert browser.run("return window.ran === undefined")


def test_browser_draws_charts_and_switches_axis_and_runs(tmp_path, runs, browser):
    opened(browser, report_page(read_runs([f"egspo={runs[0]}", f"grpo={runs[1]}"]), 2000), tmp_path / "page.html")
    assert browser.run("return document.querySelectorAll('.js-plotly-plot').length") == 10
    drawn = "return [...document.querySelectorAll('.js-plotly-plot')[0].data].map(trace => [trace.meta.run, trace.x])"
    assert browser.run(drawn) == [[0, [8, 12, 16]], [1, [8, 12, 16]]]
    assert browser.run("return document.querySelector('.js-plotly-plot').layout.shapes.length") == 2
    choose(browser, "over", "batches")
    assert browser.run(drawn) == [[0, [1, 2, 3]], [1, [1, 2, 3]]]
    browser.run("document.querySelector('#chart-tools input').click()")
    assert browser.run(drawn) == [[1, [1, 2, 3]]]
    assert "rollout batches" in browser.run("return document.querySelector('#charts').textContent")


def test_browser_pages_filters_and_colors_completions(tmp_path, browser):
    run = run_of(tmp_path, *records(96, 6))
    opened(browser, report_page([run], 2000), tmp_path / "page.html")
    count = "return document.querySelectorAll('.completion').length"
    assert browser.run(count) == 32
    label = "return document.querySelector('#completion-tools output').textContent"
    assert browser.run(label) == "rollout batch 0, after 5 optimizer steps: 11 of 32 right"
    scale = "return document.querySelector('.scale').textContent"
    fixed = browser.run(scale)
    browser.run("document.querySelector('[aria-label=next]').click()")
    assert browser.run(label).startswith("rollout batch 1")
    assert browser.run(scale) == fixed
    choose(browser, "show", "right")
    assert browser.run(count) == browser.run("return document.querySelectorAll('.completion.right').length") == 11
    choose(browser, "show", "wrong")
    assert browser.run(count) == 21
    color = "return document.querySelector('.t').style.backgroundColor"
    before = browser.run(color)
    for name in ("phi", "token_weight", "advantage"):
        choose(browser, "color by", name)
        assert browser.run(color) != before
    assert browser.run(scale).startswith("-")
    choose(browser, "show", "all")
    choose(browser, "page by", "problem")
    assert browser.run(label).startswith("problem 1 of")


def test_hover_box_lists_the_recorded_values(tmp_path, browser):
    tokens = pd.DataFrame([token(" 7", 0), token("8", 1, is_high_entropy=True)])
    run = run_of(tmp_path, pd.DataFrame([completion()]), tokens)
    opened(browser, report_page([run], 10), tmp_path / "page.html")
    browser.point_at(browser.find(".t"))
    assert browser.run("return document.getElementById('hover').textContent").split("\n") == [
        "token \u201c\u24237\u201d, id 7",
        "position             0",
        "gate                 low: attenuated",
        "entropy              0.5 nats",
        "threshold            0.625 nats",
        "log-probability      -0.25 nats",
        "phi                  0.125",
        "weight               0.375",
        "advantage            -1.5",
        "ratio after update   1.06",
        "entropy after update 0.438 nats",
        "reward               0.75",
        "problem <p>, completion 0/0/0",
    ]
    browser.point_at(browser.find(".t.high"))
    assert "high: full update" in browser.run("return document.getElementById('hover').textContent")
