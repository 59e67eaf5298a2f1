import io

import pytest
import torch
from rich.console import Console

from egspo_lightning.evaluation.report import headline, milestones_table, report, score_tables
from egspo_lightning.types import Problem

PROBLEMS = [
    Problem(str(i), f"{i}?", "1", subject, str(level))
    for i, (subject, level) in enumerate([("Algebra", 1), ("Algebra", 5), ("Geometry", 5)])
]
# seen, correct, majority, tokens, truncated, timeouts, crashes
FOUR = torch.tensor([[1, 4, 1, 40, 0, 0, 0], [1, 1, 0.5, 80, 1, 2, 0], [1, 0, 0, 120, 2, 0, 1]], dtype=torch.float64)
ONE = torch.tensor([[1, 1, 1, 7, 0, 0, 0], [1, 0, 0, 8, 0, 0, 0], [1, 1, 1, 9, 1, 0, 0]], dtype=torch.float64)


def shown(*tables) -> list[list[str]]:
    """The cells of each printed table row."""
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(*tables)
    lines = console.export_text().splitlines()
    rows = [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]
    return [row for row in rows if row[0] and not set(row[0]) & set("━─┏┡└")]


def test_score_tables_in_full():
    several = report("aime24", PROBLEMS, 4, FOUR)
    single = report("mine", [p._replace(subject="", level="") for p in PROBLEMS], 1, ONE)
    heads = ["problems", "avg@4", "pass@4", "maj@4", "length", "truncated"]
    assert shown(*score_tables([several, single])) == [
        ["Benchmarks"],
        ["benchmark", "problems", "n", "avg", "pass", "maj", "length", "truncated"],
        ["aime24", "3", "4", "0.417 ± 0.300", "0.667", "0.500", "20.0", "25.0%"],
        ["mine", "3", "1", "0.667 ± 0.333", "0.667", "0.667", "8.0", "33.3%"],
        ["± is the standard error over problems. Counted as wrong: 2 timeouts and 1 crashes"],
        ["of the grader."],
        ["At least one of k samples is correct"],
        ["benchmark", "pass@1", "pass@2", "pass@4"],
        ["aime24", "0.417", "0.500", "0.667"],
        ["aime24 by subject"],
        ["subject", *heads],
        ["Algebra", "2", "0.625 ± 0.375", "1.000", "0.750", "15.0", "12.5%"],
        ["Geometry", "1", "0.000", "0.000", "0.000", "30.0", "50.0%"],
        ["aime24 by level"],
        ["level", *heads],
        ["1", "1", "1.000", "1.000", "1.000", "10.0", "0.0%"],
        ["5", "2", "0.125 ± 0.125", "0.500", "0.250", "25.0", "37.5%"],
    ]


def test_single_sample_report_has_one_table():
    (only,) = score_tables([report("mine", [p._replace(subject="", level="") for p in PROBLEMS], 1, ONE)])
    assert only.caption == "± is the standard error over problems."


def test_milestones_without_scores_are_dashes():
    metrics = report("mine", PROBLEMS, 1, ONE).metrics
    assert headline(metrics) == "avg@1"
    table = milestones_table({"mine": metrics}, {"before": {}, "after SFT": {"mine": metrics}})
    assert shown(table)[1:] == [
        ["benchmark", "problems", "metric", "before", "after SFT"],
        ["mine", "3", "avg@1", "-", "0.667"],
    ]
    assert metrics["avg@1_se"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("num_reports", [1, 2])
def test_tables_fit_eighty_columns_and_show_every_number(num_reports):
    """With a long benchmark name, which wraps, and with realistically large counts and lengths."""
    name = "my_company_olympiad_problems_of_the_year_2026_without_pictures"
    counts = torch.tensor([[1, 4, 1, 4 * 32768, 4, 0, 0], [1, 1, 1, 4 * 32768, 4, 0, 0]], dtype=torch.float64)
    long = report(name, PROBLEMS[:2], 4, counts)
    long = long._replace(metrics=long.metrics | {"num_problems": 12345.0})
    console = Console(width=80, force_terminal=True, record=True, file=io.StringIO())
    reports = [long, report("mine", PROBLEMS, 1, ONE)][:num_reports]
    metrics = long.metrics
    console.print(*score_tables(reports))
    milestones = {milestone: {name: metrics} for milestone in ("before", "after SFT", "after EGSPO")}
    console.print(milestones_table({name: metrics}, milestones))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for number in ("12345", "0.625 ± 0.375", "1.000", "32768.0", "100.0%"):
        assert number in text
    first_table = text.split("At least one of")[0].splitlines()
    first = [line.split("│")[1].strip() for line in first_table if line.startswith("│")]
    assert "".join(first).startswith(name)
