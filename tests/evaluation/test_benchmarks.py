import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from jsonargparse import ArgumentParser

from egspo_lightning.data.generated import GeneratedDemonstrations, GeneratedProblems
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import (
    KNOWN,
    Benchmark,
    GeneratedBenchmark,
    HubBenchmark,
    JsonlBenchmark,
    KnownBenchmark,
)
from egspo_lightning.tasks.arithmetic import ArithmeticTask
from egspo_lightning.tasks.expressions import ExpressionTask
from egspo_lightning.types import Problem

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


class Two(Benchmark):
    def read(self) -> list[Problem]:
        return [Problem("1", "1+1?", "2"), Problem("2", "2+2?", "4")]


class Empty(Benchmark):
    def read(self) -> list[Problem]:
        return []


def test_a_benchmark_of_ones_own():
    benchmark = Two("two", limit=1)
    assert benchmark.load() == [Problem("1", "1+1?", "2")]
    assert (benchmark.num_samples, benchmark.temperature, benchmark.top_p) == (1, 0.0, 1.0)
    assert benchmark.max_completion_length is None
    assert len(Two("two").load()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"limit": 0}, "limit"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"num_samples": 4}, "temperature 0 all samples are the same"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Two(**{"name": "two", **arguments})


def test_several_samples_at_a_temperature():
    assert Two("two", num_samples=4, temperature=0.6).num_samples == 4


def test_no_problems_are_refused():
    with pytest.raises(UserError, match="benchmark 'empty' has no problems"):
        Empty("empty").load()


def test_arithmetic_problems_are_distinct_and_never_trained_on():
    benchmark = {p.problem for p in GeneratedBenchmark().load()}
    assert len(benchmark) == 512
    assert not benchmark & {d.problem for d in GeneratedDemonstrations(num_demonstrations=3000).load()}
    source = GeneratedProblems()
    assert source.prepare(0, frozenset(benchmark)) == 0
    assert not benchmark & {p.problem for p in source.draw(0, 3000)}
    validation = {p.problem for p in GeneratedBenchmark(split="validation").load()}
    assert not benchmark & validation


def test_a_generated_benchmark_is_called_by_its_task_or_by_a_name_of_its_own():
    task = ExpressionTask()
    assert GeneratedBenchmark().name == "arithmetic"
    assert GeneratedBenchmark(task=task).name == "expressions"
    assert GeneratedBenchmark("mine", task=task).name == "mine"
    with pytest.raises(UserError, match="name must be non-empty"):
        GeneratedBenchmark("", task=task)
    assert all(task.contains(p.problem, "validation") for p in GeneratedBenchmark("v", "validation", 9, 0, task).load())


def test_too_small_a_task_is_refused():
    with pytest.raises(UserError, match="512 different problems of split 'test'"):
        GeneratedBenchmark(task=ArithmeticTask(num_digits=1)).load()


def test_jsonl_benchmark(tmp_path):
    path = tmp_path / "b.jsonl"
    rows = [{"id": "x", "problem": "1+1?", "answer": "2", "level": 3, "subject": "Sums"}, {"problem": "2+2?"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.jsonl:2: field 'answer'"):
        JsonlBenchmark("b", str(path)).load()
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    assert JsonlBenchmark("b", str(path)).load() == [Problem("x", "1+1?", "2", "Sums", "3")]


def test_hub_benchmark_of_a_local_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    folder.mkdir()
    row = {"question": "1+1?", "answer": "It is 2.\n#### 2"}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    recipe = KNOWN["gsm8k"]._replace(dataset=str(folder), config=None)
    benchmark = HubBenchmark("gsm8k", *recipe, limit=1)
    assert benchmark.load() == [Problem("gsm:test:0", "1+1?", "2")]
    with pytest.raises(UserError, match="no column 'problem'"):
        HubBenchmark("gsm8k", str(folder)).load()


def test_every_known_benchmark_has_a_name_in_the_config():
    hints = get_type_hints(KnownBenchmark.__init__)
    assert get_args(hints["name"]) == tuple(KNOWN)


def test_known_benchmarks_are_read_by_their_recipes(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, data_files):
        asked.append((name, config, split, data_files))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "It is 2.\n#### 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert KnownBenchmark("gsm8k").load() == [Problem("gsm8k:test:0", "1+1?", "2")]
    assert asked == [("openai/gsm8k", "main", "test", None)]


def test_known_benchmarks():
    benchmark = KnownBenchmark("aime24", num_samples=32, temperature=0.6)
    assert (benchmark.name, benchmark.num_samples, benchmark.temperature) == ("aime24", 32, 0.6)
    with pytest.raises(UserError, match="known are math500, gsm8k"):
        KnownBenchmark("imo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("math500", 500),
        ("aime24", 30),
        ("aime25", 30),
        ("amc23", 40),
        ("gsm8k_test", 1319),
        ("olympiadbench", 675),
    ],
)
def test_real_files(name, count):
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent: real data is kept beside the checkout, not in it")
    problems = JsonlBenchmark(name, str(path)).load()
    assert len({p.id for p in problems}) == len({p.problem for p in problems}) == count
    assert all(p.answer.strip() for p in problems)
    if name == "math500":
        assert {p.level for p in problems} == set("12345")
        assert all(p.subject for p in problems)


def test_benchmarks_and_their_sampling_are_config_values():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--benchmarks", type=list[Benchmark])
    module = "egspo_lightning.evaluation.benchmarks"
    arithmetic = {"task": {"num_terms": 3}, "num_problems": 7, "num_samples": 4, "temperature": 1.0}
    known = {"name": "math500", "limit": 3}
    values = [
        {"class_path": f"{module}.GeneratedBenchmark", "init_args": arithmetic},
        {"class_path": f"{module}.KnownBenchmark", "init_args": known},
    ]
    config = parser.instantiate(parser.parse_object({"benchmarks": values}))
    first, second = config.benchmarks
    assert (first.task, first.num_samples) == (ArithmeticTask(num_terms=3), 4)
    assert len(first.load()) == 7
    assert (second.name, second.limit, second.temperature) == ("math500", 3, 0.0)
