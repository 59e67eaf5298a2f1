import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning.data.generated_sources import GeneratedDemonstrations, GeneratedProblems
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.expressions import ExpressionTask
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.answers import AnswerSampling
from egspo_lightning.evaluation.benchmark_recipes import KNOWN
from egspo_lightning.evaluation.benchmarks import (
    Benchmark,
    DatasetBenchmark,
    GeneratedBenchmark,
    KnownBenchmark,
)
from egspo_lightning.types import Problem

MODULE = "egspo_lightning.evaluation.benchmarks"


class Two(Benchmark):
    def read(self) -> list[Problem]:
        return [Problem("1", "1+1?", "2"), Problem("2", "2+2?", "4")]


class Empty(Benchmark):
    def read(self) -> list[Problem]:
        return []


def test_custom_benchmark():
    benchmark = Two("two", limit=1)
    assert benchmark.load() == [Problem("1", "1+1?", "2")]
    assert benchmark.sampling == AnswerSampling(num_samples=1, temperature=0.0, top_p=1.0, max_completion_length=None)
    assert len(Two("two").load()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"num_samples": 4}, "temperature 0 all samples are the same"),
    ],
)
def test_invalid_names_and_sampling_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Two(**{"name": "two", **arguments})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GeneratedBenchmark", {}),
        ("DatasetBenchmark", {"name": "two", "path": "two.jsonl"}),
        ("KnownBenchmark", {"name": "aime24"}),
    ],
)
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_samples", 0), ("limit", 0), ("max_completion_length", 0), ("temperature", -0.1), ("temperature", ".nan"),
     ("top_p", 0.0), ("top_p", 1.1)],
)  # fmt: skip
def test_parser_refuses_out_of_range_sampling_values(name, arguments, field, value):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--benchmark", type=Benchmark)
    given = {"class_path": f"{MODULE}.{name}", "init_args": arguments | {field: value}}
    with pytest.raises(ArgumentError, match=f"(?s){field}.*{value}"):
        parser.parse_object({"benchmark": given})


@pytest.mark.parametrize(("field", "value", "message"), [
    ("num_problems", 0, "num_problems.*0"), ("split", "dev", "train.*validation.*test.*dev"),
])  # fmt: skip
def test_parser_refuses_unknown_split_and_zero_problems(field, value, message):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--benchmark", type=Benchmark)
    given = {"class_path": f"{MODULE}.GeneratedBenchmark", "init_args": {field: value}}
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        parser.parse_object({"benchmark": given})


def test_several_samples_are_accepted_with_positive_temperature():
    assert Two("two", num_samples=4, temperature=0.6).num_samples == 4


def test_benchmark_without_problems_is_refused():
    with pytest.raises(UserError, match="benchmark 'empty' has no problems"):
        Empty("empty").load()


def test_generated_benchmark_is_distinct_and_disjoint_from_training():
    benchmark = {p.problem for p in GeneratedBenchmark().load()}
    assert len(benchmark) == 512
    assert not benchmark & {d.problem for d in GeneratedDemonstrations(num_demonstrations=3000).load()}
    source = GeneratedProblems()
    assert source.prepare(0, frozenset(benchmark)) == 0
    assert not benchmark & {p.problem for p in source.draw(0, 3000)}
    validation = {p.problem for p in GeneratedBenchmark(split="validation").load()}
    assert not benchmark & validation


def test_generated_benchmark_is_named_after_its_task_by_default():
    task = ExpressionTask()
    assert GeneratedBenchmark().name == "arithmetic"
    assert GeneratedBenchmark(task=task).name == "expressions"
    assert GeneratedBenchmark("mine", task=task).name == "mine"
    with pytest.raises(UserError, match="name must be non-empty"):
        GeneratedBenchmark("", task=task)
    assert all(task.contains(p.problem, "validation") for p in GeneratedBenchmark("v", "validation", 9, 0, task).load())


def test_task_with_too_few_problems_is_refused():
    with pytest.raises(UserError, match="512 different problems of split 'test'"):
        GeneratedBenchmark(task=ArithmeticTask(num_digits=1)).load()


def test_dataset_benchmark_reads_json_lines(tmp_path):
    path = tmp_path / "b.jsonl"
    rows = [{"id": "x", "problem": "1+1?", "answer": "2", "level": 3, "subject": "Sums"}, {"problem": "2+2?"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.jsonl:2: field 'answer'"):
        DatasetBenchmark("b", str(path)).load()
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    assert DatasetBenchmark("b", str(path)).load() == [Problem("x", "1+1?", "2", "Sums", "3")]


def test_dataset_benchmark_reads_a_local_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    folder.mkdir()
    row = {"question": "1+1?", "answer": "It is 2.\n#### 2"}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    columns = {"problem_field": "question", "answer_extractor": "gsm8k"}
    benchmark = DatasetBenchmark("gsm8k", str(folder), **columns, limit=1)
    assert benchmark.load() == [Problem("gsm:test:0", "1+1?", "2")]
    with pytest.raises(UserError, match=r"field 'quest' is missing\. Did you mean question\?"):
        DatasetBenchmark("gsm8k", str(folder), problem_field="quest").load()


# Published benchmarks


HUB = {
    "math500": (
        "HuggingFaceH4/MATH-500",
        {"default": "test.jsonl"},
        {
            "problem": "1+1?",
            "solution": "$\\boxed{2}$",
            "answer": "2",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "u/7",
        },
        Problem("u/7", "1+1?", "2", "Algebra", "3"),
    ),
    "gsm8k": (
        "openai/gsm8k",
        {"main": "main/test-00000-of-00001.jsonl", "socratic": "socratic/test-00000-of-00001.jsonl"},
        {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"},
        Problem("gsm8k:test:0", "1+1?", "1002"),
    ),
    "minerva": (
        "math-ai/minervamath",
        {"default": "test.jsonl"},
        {"question": "Mass?", "answer": "1.6 \\times 10^{-19}"},
        Problem("minervamath:test:0", "Mass?", "1.6 \\times 10^{-19}"),
    ),
    "olympiadbench": (
        "math-ai/olympiadbench",
        {"default": "test.jsonl"},
        {
            "id": 1606,
            "question": "Roots?",
            "solution": ["s"],
            "final_answer": ["$\\frac{1}{2}$", "$3$"],
            "is_multiple_answer": True,
            "subfield": "Number Theory",
            "subject": "Math",
        },
        Problem("1606", "Roots?", "\\frac{1}{2}, 3", "Number Theory"),
    ),
    "aime24": (
        "HuggingFaceH4/aime_2024",
        {"default": "train.jsonl"},
        {"id": 60, "problem": "1+1?", "solution": "2", "answer": "002", "url": "u", "year": "2024"},
        Problem("60", "1+1?", "002"),
    ),
    "aime25": (
        "math-ai/aime25",
        {"default": "test.jsonl"},
        {"problem": "1+1?", "answer": "2", "id": "0"},
        Problem("0", "1+1?", "2"),
    ),
    "amc23": (
        "math-ai/amc23",
        {"default": "test.jsonl"},
        {"id": 0, "question": "1+1?", "answer": "27.0", "url": "u"},
        Problem("0", "1+1?", "27.0"),
    ),
}
"""For each benchmark: its name on the Hub, its configurations and files, a row with the Hub's columns, the problem."""


def hub_folder(root: Path, name: str) -> Path:
    """Write the data set to a folder in the layout of the Hub."""
    dataset, files, row, _ = HUB[name]
    cards = [
        {"config_name": config, "data_files": [{"split": Path(file).name.split(".")[0].split("-")[0], "path": file}]}
        for config, file in files.items()
    ]
    for file in files.values():
        (root / dataset / file).parent.mkdir(parents=True, exist_ok=True)
        (root / dataset / file).write_text(json.dumps(row) + "\n", encoding="utf-8")
    (root / dataset / "README.md").write_text(f"---\n{json.dumps({'configs': cards})}\n---\n", encoding="utf-8")
    return root / dataset


@pytest.mark.parametrize("name", KNOWN)
def test_known_benchmarks_are_read_from_folders_in_the_hubs_layout(name, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # the datasets library prefers a local folder of that name
    assert hub_folder(tmp_path, name).relative_to(tmp_path) == Path(KNOWN[name].rows.path)
    assert KnownBenchmark(name).load() == [HUB[name][-1]]


@pytest.mark.parametrize("name", KNOWN)
def test_known_benchmarks_are_read_from_files_with_the_hubs_columns_or_plain_ones(name, tmp_path):
    problem = HUB[name][-1]
    (tmp_path / "hub.jsonl").write_text(json.dumps(HUB[name][2] | {"id": problem.id}), encoding="utf-8")
    assert KnownBenchmark(name, str(tmp_path / "hub.jsonl")).load() == [problem]
    plain = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
    (tmp_path / "plain.jsonl").write_text(json.dumps(plain), encoding="utf-8")
    assert KnownBenchmark(name, str(tmp_path / "plain.jsonl")).load() == [problem._replace(subject="", level="")]


def test_known_benchmarks_have_standard_sampling_settings():
    competition = AnswerSampling(num_samples=32, temperature=0.6, top_p=0.95, max_completion_length=32768)
    once = AnswerSampling(num_samples=1, temperature=0.0, top_p=1.0, max_completion_length=2048)
    assert {name: KnownBenchmark(name).sampling for name in KNOWN} == {  # type: ignore[arg-type]
        "math500": once,
        "gsm8k": once,
        "minerva": once,
        "olympiadbench": once,
        "aime24": competition,
        "aime25": competition,
        "amc23": competition,
    }


def test_sampling_of_known_benchmarks_can_be_overridden():
    changed = {"num_samples": 4, "temperature": 1.0, "top_p": 0.7, "max_completion_length": 99}
    for name in ("math500", "aime24"):
        benchmark = KnownBenchmark(name, **changed, limit=3)
        assert (benchmark.name, benchmark.sampling, benchmark.limit) == (name, AnswerSampling(**changed), 3)
    greedy = KnownBenchmark("aime24", num_samples=1, temperature=0.0)
    assert greedy.sampling == AnswerSampling(1, 0.0, 0.95, 32768)
    with pytest.raises(UserError, match="benchmark 'aime24': num_samples is 32, but at temperature 0"):
        KnownBenchmark("aime24", temperature=0.0)


def test_config_accepts_exactly_the_known_benchmark_names():
    hints = get_type_hints(KnownBenchmark.__init__)
    assert get_args(hints["name"]) == tuple(KNOWN)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--benchmark", type=Benchmark)
    with pytest.raises(ArgumentError, match="(?s)" + ".*".join([*KNOWN, "imo"])):
        parser.parse_object({"benchmark": {"class_path": f"{MODULE}.KnownBenchmark", "init_args": {"name": "imo"}}})


def test_invalid_row_of_known_benchmark_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": 1, "problem": "1+1?", "answer": "2"}\n{"id": 2, "problem": "2+2?"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.jsonl:2: field 'answer' is missing"):
        KnownBenchmark("aime24", str(path)).load()
    path.write_text('{"id": 1, "question": "1+1?", "final_answer": ["2", null]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.jsonl:1: field 'final_answer' must be non-empty text, got None"):
        KnownBenchmark("olympiadbench", str(path)).load()


def test_duplicate_problem_ids_are_refused(tmp_path):
    row = {"id": "a", "problem": "1+1?", "answer": "2"}
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps(row) for _ in range(2)), encoding="utf-8")
    with pytest.raises(UserError, match="benchmark 'b': 2 problems have the id 'a'"):
        DatasetBenchmark("b", str(path)).load()
    assert len(DatasetBenchmark("b", str(path), limit=1).load()) == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("math500", 500),
        ("aime24", 30),
        ("aime25", 30),
        ("amc23", 40),
        ("gsm8k", 1319),
        ("olympiadbench", 675),
    ],
)
def test_known_benchmarks_read_the_real_files(shared_file, name, count):
    path = shared_file(f"data/{'gsm8k_test' if name == 'gsm8k' else name}.jsonl")
    problems = KnownBenchmark(name, str(path)).load()
    assert len({p.id for p in problems}) == len({p.problem for p in problems}) == count
    assert all(p.answer.strip() for p in problems)
    assert not any("$" in p.answer.replace("\\$", "") for p in problems)
    if name == "math500":
        assert {p.level for p in problems} == set("12345")
        assert all(p.subject for p in problems)


def test_benchmarks_are_built_from_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--benchmarks", type=list[Benchmark])
    arithmetic = {"task": {"num_terms": 3}, "num_problems": 7, "num_samples": 4, "temperature": 1.0}
    known = {"name": "math500", "limit": 3}
    values = [
        {"class_path": f"{MODULE}.GeneratedBenchmark", "init_args": arithmetic},
        {"class_path": f"{MODULE}.KnownBenchmark", "init_args": known},
    ]
    config = parser.instantiate(parser.parse_object({"benchmarks": values}))
    first, second = config.benchmarks
    assert (first.task, first.num_samples) == (ArithmeticTask(num_terms=3), 4)
    assert len(first.load()) == 7
    assert (second.name, second.limit, second.sampling.max_completion_length) == ("math500", 3, 2048)
