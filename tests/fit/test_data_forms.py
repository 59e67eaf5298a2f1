"""Data as people have it: each form of a file trains, by SFT and rollouts, with its own rows as a benchmark."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from egspo_lightning import DatasetBenchmark, DatasetDemonstrations, DatasetProblems, PromptTemplate, StageTransition
from spies import slow

NUMBERS = range(1, 9)
PLAIN = [{"problem": f"{n}+1=?", "solution": rf"\boxed{{{n + 1}}}", "answer": n + 1} for n in NUMBERS]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": row["problem"]},
            {"role": "assistant", "content": row["solution"]},
        ]
    }
    for row in PLAIN
]
TRL = [{"prompt": row["messages"][:2], "completion": row["messages"][2:]} for row in MESSAGES]
TRL_TEXT = [{"prompt": row["problem"], "completion": row["solution"]} for row in PLAIN]
VERL = [
    {
        "prompt": row["messages"][1:2],
        "reward_model": {"ground_truth": str(n + 1)},
        "extra_info": {"answer": f"#### {n + 1}"},
    }
    for n, row in zip(NUMBERS, MESSAGES, strict=True)
]
NESTED = {"answer_field": "reward_model.ground_truth"}, {"solution_field": "extra_info.answer"}
UNNAMED = {}, {}


def as_json_lines(rows: list[Any], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_json(rows: list[Any], path: Path) -> None:
    path.write_text(json.dumps(rows))


def as_arrow_stream(rows: list[Any], path: Path) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)


def as_arrow_file(rows: list[Any], path: Path) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def as_csv(rows: list[Any], path: Path) -> None:
    datasets.Dataset.from_list(rows).to_csv(path)


def as_parquet(rows: list[Any], path: Path) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


def as_saved_data_set(rows: list[Any], path: Path) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


def as_saved_splits(rows: list[Any], path: Path) -> None:
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=data, test=data).save_to_disk(path)


FORMS = [
    ("a.jsonl", as_json_lines, MESSAGES, UNNAMED),
    ("a.json", as_json, MESSAGES, UNNAMED),
    ("a.parquet", as_parquet, MESSAGES, UNNAMED),
    ("a.parquet", as_parquet, TRL, UNNAMED),
    ("a.parquet", as_parquet, VERL, NESTED),
    ("a.arrow", as_arrow_stream, TRL, UNNAMED),
    ("a.arrow", as_arrow_file, PLAIN, UNNAMED),
    ("a.csv", as_csv, TRL_TEXT, UNNAMED),
    ("a", as_saved_data_set, MESSAGES, UNNAMED),
    ("a", as_saved_splits, TRL, UNNAMED),
]


@pytest.mark.parametrize(("name", "save", "rows", "fields"), [*FORMS[:3], *slow(*FORMS[3:])])
def test_each_form_trains_by_sft_and_rollouts(tiny_run, tmp_path, monkeypatch, caplog, name, save, rows, fields):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "held_out").mkdir()
    path, held_out, (for_problems, for_solutions) = tmp_path / name, tmp_path / "held_out" / name, fields
    save(rows, path)
    save(rows[:2], held_out)
    data = {
        "demonstrations": DatasetDemonstrations(str(path), **for_problems, **for_solutions),
        "problems": DatasetProblems(str(path), **for_problems),
        "benchmarks": [DatasetBenchmark("held_out", str(held_out), **for_problems)],
        "prompt": PromptTemplate(system="Box.", plain="{system}{problem}"),
        "max_prompt_length": 12,
    }
    with caplog.at_level("INFO"):
        run = tiny_run(StageTransition(), data=data, trainer={"max_epochs": 2}).fit()
    assert "Data: 6 demonstrations (dropped: 2 that a benchmark contains" in caplog.text
    assert "because a benchmark contains them: 2;" in caplog.text
    problems = run.data.problems.draw(0, 6)
    assert {(problem.problem, problem.answer) for problem in problems} == {
        (f"{n}+1=?", str(n + 1)) for n in range(3, 9)
    }
    has_system = rows in (MESSAGES, TRL)
    assert {problem.context for problem in problems} == {(("system", "S"),) if has_system else ()}
    encoded = run.data.encoder.encode(problems[0])
    assert bytes(encoded).decode() == ("S" if has_system else "Box.") + problems[0].problem
    assert run.data.phases.pool.demonstrations[0].prompt_ids[:1] == list(b"S" if has_system else b"B")
    assert [problem.answer for problem in run.data.answerer.problems["held_out"]] == ["2", "3"]
    assert "rollout/reward_mean" in run.trainer.callback_metrics
