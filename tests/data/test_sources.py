import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning.data.answer_formats import normalize_problem
from egspo_lightning.data.dataset_sources import DatasetDemonstrations, DatasetProblems
from egspo_lightning.data.generated_sources import GeneratedDemonstrations, GeneratedProblems
from egspo_lightning.data.reader import read_rows
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems, ProblemSource
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.expressions import ExpressionTask
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.types import Problem


class Letters(FiniteProblems):
    def load(self) -> list[Problem]:
        return [Problem(str(i), f"Letter  {letter}?", letter) for i, letter in enumerate("abcdefg")]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestFiniteProblems:
    def test_each_pass_holds_every_problem_once_in_a_new_order(self):
        source = Letters()
        assert source.prepare(0, frozenset()) == 0
        passes = [source.draw(7 * i, 7) for i in range(5)]
        assert all(sorted(p) == source.load() for p in passes)
        assert len({tuple(p) for p in passes}) == 5

    def test_draw_depends_only_on_seed_and_position(self):
        source, other = Letters(), Letters()
        source.prepare(3, frozenset())
        other.prepare(3, frozenset())
        random.seed(0)
        whole = source.draw(0, 40)
        random.seed(1)
        assert other.draw(17, 23) == whole[17:]
        assert other.draw(0, 17) == whole[:17]
        other.prepare(4, frozenset())
        assert other.draw(0, 40) != whole

    def test_excluded_problems_are_left_out_and_counted(self):
        source = Letters()
        excluded = frozenset({normalize_problem("LETTER a?\n"), normalize_problem("letter c?"), "other"})
        assert source.prepare(0, excluded) == 2
        assert Counter(p.answer for p in source.draw(0, 10)) == dict.fromkeys("bdefg", 2)

    def test_excluding_all_problems_is_refused_with_counts(self):
        everything = frozenset(normalize_problem(p.problem) for p in Letters().load())
        with pytest.raises(UserError, match=r"Letters has no problem.*7 were loaded, and 7 of them"):
            Letters().prepare(0, everything)

    def test_draw_before_prepare_raises_runtime_error(self):
        with pytest.raises(RuntimeError, match="before prepare"):
            Letters().draw(0, 1)


class TestJsonLinesDemonstrations:
    def test_gsm8k_annotations_are_removed_and_the_answer_is_boxed(self, tmp_path):
        solution = "He sold 48/2 = <<48/2=24>>24.\nIn all $<<1000+80=1080>>1,080.\n#### 1,080"
        path = write(tmp_path / "a.jsonl", {"problem": "How many?", "solution": solution})
        for solution_format in ("auto", "gsm8k"):
            (demonstration,) = DatasetDemonstrations(path, solution_format=solution_format).load()
            assert demonstration.solution == "He sold 48/2 = 24.\nIn all $1,080.\n\\boxed{1080}"
            assert demonstration.id == "a.jsonl:1"

    def test_auto_keeps_boxes_and_appends_answers(self, tmp_path):
        rows = [
            {"id": 5, "problem": "p", "solution": "So \\boxed{\\frac{1}{2}}.", "answer": "0.5"},
            {"problem": "p", "solution": "So it is two.", "answer": "$2$"},
            {"problem": "p", "solution": "So it is three.", "answer": 3},
        ]
        loaded = DatasetDemonstrations(write(tmp_path / "a.jsonl", *rows)).load()
        assert [d.solution for d in loaded] == [
            "So \\boxed{\\frac{1}{2}}.",
            "So it is two.\n\\boxed{2}",
            "So it is three.\n\\boxed{3}",
        ]
        assert [d.id for d in loaded] == ["5", "a.jsonl:2", "a.jsonl:3"]

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ("0.00005", "0.00005"),
            ("5e-05", "0.00005"),
            ("1.50", "1.50"),
            ("6.02e23", "602000000000000000000000"),
            ("0", "0"),
            ('["3", "4"]', "3, 4"),
            ("[3, 0.5]", "3, 0.5"),
        ],
    )
    def test_problem_and_demonstration_read_an_answer_alike(self, tmp_path, answer, text):
        path = tmp_path / "a.jsonl"
        path.write_text(f'{{"problem": "p", "solution": "So.", "answer": {answer}}}', encoding="utf-8")
        (problem,) = DatasetProblems(str(path)).load()
        (demonstration,) = DatasetDemonstrations(str(path)).load()
        assert (problem.answer, demonstration.solution) == (text, f"So.\n\\boxed{{{text}}}")

    @pytest.mark.parametrize(
        "answer", ["true", '{"value": "7"}', "NaN", "Infinity", "1e999999999", "[]", '["3", null]']
    )
    def test_answer_that_is_neither_text_nor_number_is_refused_with_its_row(self, tmp_path, answer):
        path = tmp_path / "a.jsonl"
        path.write_text(f'{{"problem": "p", "solution": "So.", "answer": {answer}}}', encoding="utf-8")
        for source in (DatasetProblems(str(path)), DatasetDemonstrations(str(path))):
            with pytest.raises(UserError, match=r"a\.jsonl:1: field 'answer' must be non-empty text"):
                source.load()

    def test_float_column_is_written_in_digits(self, tmp_path):
        import datasets

        path = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"problem": ["p"], "solution": ["So."], "answer": [5e-05]}).to_parquet(path)
        (problem,) = DatasetProblems(str(path)).load()
        (demonstration,) = DatasetDemonstrations(str(path)).load()
        assert (problem.answer, demonstration.solution) == ("0.00005", "So.\n\\boxed{0.00005}")

    @pytest.mark.parametrize(
        ("solution_format", "row"),
        [
            ("auto", {"solution": "no end"}),
            ("auto", {"solution": "no end", "answer": "  "}),
            ("boxed", {"solution": "#### 5", "answer": "5"}),
            ("gsm8k", {"solution": "\\boxed{5}", "answer": "5"}),
            ("plain", {"solution": "\\boxed{5}"}),
        ],
    )
    def test_demonstration_without_answer_is_refused_with_line_number(self, tmp_path, solution_format, row):
        path = write(
            tmp_path / "b.jsonl",
            {"problem": "p", "solution": "\\boxed{1}\n#### 1", "answer": 1},
            {"problem": "p", **row},
        )
        with pytest.raises(UserError, match=r"b\.jsonl:2: a demonstration must end in its answer"):
            DatasetDemonstrations(path, solution_format=solution_format).load()

    def test_demonstration_fields_can_be_renamed_and_limited(self, tmp_path):
        rows = [{"question": f"q{i}", "response": f"\\boxed{{{i}}}"} for i in range(5)]
        path = write(tmp_path / "a.jsonl", *rows)
        loaded = DatasetDemonstrations(path, problem_field="question", solution_field="response", limit=2).load()
        assert [d.problem for d in loaded] == ["q0", "q1"]
        with pytest.raises(UserError, match=r"a\.jsonl:1: field 'solution'.*question, response"):
            DatasetDemonstrations(path).load()

    def test_solution_field_named_answer_does_not_supply_the_answer(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"problem": "p", "answer": "So it is two."})
        with pytest.raises(UserError, match="neither the solution nor an answer field gives the answer"):
            DatasetDemonstrations(path, solution_field="answer").load()


class TestJsonLinesProblems:
    def test_problem_keeps_subject_and_level(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"problem": "p", "answer": 7, "subject": "Algebra", "level": 3})
        assert DatasetProblems(path).load() == [Problem("a.jsonl:1", "p", "7", "Algebra", "3")]

    def test_problem_without_answer_is_refused_with_line_number(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"problem": "p", "answer": "1"}, {"problem": "p"})
        with pytest.raises(UserError, match=r"a\.jsonl:2: field 'answer'"):
            DatasetProblems(path).prepare(0, frozenset())

    @pytest.mark.parametrize(("extractor", "answer"), [("boxed", "\\frac{1}{2}"), ("gsm8k", "1080"), ("none", None)])
    def test_answer_extractor_reads_the_answer_from_a_solution(self, tmp_path, extractor, answer):
        solution = "\\boxed{1} and then \\boxed{\\frac{1}{2}}\n#### 1,080"
        path = write(tmp_path / "a.jsonl", {"problem": "p", "solution": solution})
        (problem,) = DatasetProblems(path, answer_field="solution", answer_extractor=extractor).load()
        assert problem.answer == (answer or solution)

    @pytest.mark.parametrize("extractor", ["boxed", "gsm8k"])
    def test_solution_without_extractable_answer_is_refused_with_line_number(self, tmp_path, extractor):
        path = write(tmp_path / "a.jsonl", {"problem": "p", "answer": "unfinished \\boxed{1 ####"})
        with pytest.raises(UserError, match=rf"a\.jsonl:1: answer_extractor='{extractor}' finds no answer"):
            DatasetProblems(path, answer_extractor=extractor).load()


class TestHub:
    @pytest.fixture(autouse=True)
    def private_cache(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def folder(self, tmp_path) -> str:
        folder = tmp_path / "sums"
        folder.mkdir()
        rows = [
            {"question": f"{i}+{i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in (1, 2, 3)
        ]
        write(folder / "train.jsonl", *rows)
        return str(folder)

    def test_local_folder_gives_problems_and_demonstrations(self, folder):
        arguments = {"problem_field": "question", "limit": 2}
        problems = DatasetProblems(folder, answer_extractor="gsm8k", **arguments).load()
        assert problems == [Problem("sums:train:0", "1+1?", "2"), Problem("sums:train:1", "2+2?", "4")]
        demonstrations = DatasetDemonstrations(folder, solution_field="answer", **arguments).load()
        assert [d.solution for d in demonstrations] == ["1+1=2\n\\boxed{2}", "2+2=4\n\\boxed{4}"]

    def test_json_file_and_split_slices_are_read(self, folder):
        rows = [row for _, row in read_rows(f"{folder}/train.jsonl")]
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        arguments = {"problem_field": "question", "answer_extractor": "gsm8k"}
        source = DatasetProblems(f"{folder}/rows.json", **arguments)
        assert source.prepare(0, frozenset({"1+1?"})) == 1
        assert sorted(p.answer for p in source.draw(0, 2)) == ["4", "6"]
        part = DatasetProblems(f"{folder}/rows.json", split="test[1:]", **arguments).load()
        assert [(p.id, p.answer) for p in part] == [("rows.json:test[1:]:0", "4"), ("rows.json:test[1:]:1", "6")]

    def test_folder_of_parquet_files_is_read(self, tmp_path):
        import datasets

        (tmp_path / "p").mkdir()
        datasets.Dataset.from_dict({"problem": ["1+1?"], "answer": ["2"]}).to_parquet(tmp_path / "p" / "test.parquet")
        assert DatasetProblems(str(tmp_path / "p"), split="test").load() == [Problem("p:test:0", "1+1?", "2")]

    def test_glob_patterns_read_files_in_name_order(self, tmp_path):
        import datasets

        for i in (2, 1):
            datasets.Dataset.from_dict({"problem": [f"{i}?"], "answer": [i]}).to_parquet(tmp_path / f"{i}.parquet")
            write(tmp_path / f"{i}.jsonl", {"problem": f"{i}?", "answer": i})
        lines, tables = (DatasetProblems(f"{tmp_path}/*.{suffix}").load() for suffix in ("jsonl", "parquet"))
        assert [p.id for p in lines] == ["1.jsonl:1", "2.jsonl:1"]
        assert [p[1:3] for p in lines] == [p[1:3] for p in tables] == [("1?", "1"), ("2?", "2")]

    def test_folders_written_by_save_to_disk_are_read(self, tmp_path):
        import datasets

        one = datasets.Dataset.from_dict({"problem": ["1+1?", "2+2?"], "answer": ["2", "4"]})
        one.save_to_disk(tmp_path / "one")
        datasets.DatasetDict(train=one.select([1]), test=one).save_to_disk(tmp_path / "two")
        assert [p.answer for p in DatasetProblems(str(tmp_path / "one")).load()] == ["2", "4"]
        assert [p.answer for p in DatasetProblems(str(tmp_path / "two")).load()] == ["4"]
        assert [p.answer for p in DatasetProblems(str(tmp_path / "two"), split="test[:1]").load()] == ["2"]

    def test_csv_keeps_leading_zeros_and_errors_name_the_line(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text('problem,answer,level\n"Two\nlines?",007,\nHow much?,1.10,3\n', encoding="utf-8-sig")
        assert DatasetProblems(str(path)).load() == [
            Problem("a.csv:3", "Two\nlines?", "007"),
            Problem("a.csv:4", "How much?", "1.10", level="3"),
        ]
        path.write_text("problem,answer\n1?,1\n2?\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"a\.csv:3: field 'answer' must be non-empty text, got None"):
            DatasetProblems(str(path)).load()
        path.write_bytes(b"problem,answer\n\xff?,1\n")
        with pytest.raises(UserError, match=r"a\.csv:\d+: not valid CSV in UTF-8"):
            DatasetProblems(str(path)).load()

    def test_missing_file_is_refused(self, tmp_path):
        for name in ("none.csv", "none.jsonl", "none.parquet", "none.arrow", "none.json", "*.parquet", "none"):
            with pytest.raises(UserError, match=rf"{re.escape(name)}: no such file"):
                DatasetProblems(str(tmp_path / name)).load()

    @pytest.mark.parametrize(("given", "there"), [("trian.parquet", "train.parquet"), ("saved_train", "saved_trian")])
    def test_similar_path_is_named(self, tmp_path, monkeypatch, given, there):
        (tmp_path / there).mkdir()
        with pytest.raises(UserError, match=rf"Did you mean {re.escape(str(tmp_path / there))}\?"):
            DatasetProblems(str(tmp_path / given)).load()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=rf"Did you mean {there}\?"):  # on the Hub it would have a name like this
            DatasetProblems(given).load()

    def test_nul_in_a_table_is_refused_with_row(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps([{"problem": "1?", "answer": ["1", "\0"]}]), encoding="utf-8")
        with pytest.raises(UserError, match=r"a\.json:train:0: field 'answer' holds the character NUL"):
            DatasetProblems(str(tmp_path / "a.json")).load()

    def test_unknown_column_is_refused_with_available_columns(self, folder):
        known = r"'{}' is missing\. Did you mean {}\? The row has the fields .*{}_field"
        with pytest.raises(UserError, match=known.format("questions", "question", "problem")):
            DatasetProblems(folder, problem_field="questions").load()
        with pytest.raises(UserError, match=known.format("answers", "answer", "solution")):
            DatasetDemonstrations(folder, solution_field="answers").load()
        with pytest.raises(UserError, match=known.format("answers", "answer", "answer")):
            DatasetProblems(folder, answer_field="answers").load()

    def test_row_without_answer_is_refused_with_row(self, folder):
        with pytest.raises(UserError, match="sums:train:0: answer_extractor='boxed'"):
            DatasetProblems(folder, problem_field="question", answer_extractor="boxed").load()

    def test_unknown_split_or_folder_is_refused_with_remedy(self, folder, tmp_path):
        with pytest.raises(UserError, match=r"split 'dev'.*could not be loaded"):
            DatasetProblems(folder, split="dev").load()
        with pytest.raises(UserError, match="nothing-here: no such file"):
            DatasetProblems(str(tmp_path / "nothing-here")).load()

    def test_connection_error_is_reported_with_remedy(self, monkeypatch):
        import datasets

        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\ndetails")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(UserError, match=r"'openai/gsm8k'.*Couldn't reach.*Without a network, download it"):
            DatasetProblems("openai/gsm8k", "main").load()


TASKS = "egspo_lightning.data.tasks"


class TestConfig:
    """Each source can be given by class_path and init_args where the datamodule expects its type."""

    @pytest.mark.parametrize(
        ("kind", "class_path", "init_args", "expected"),
        [
            (DemonstrationSource, "generated_sources.GeneratedDemonstrations", {"task": {"num_terms": 3}},
             GeneratedDemonstrations(task=ArithmeticTask(num_terms=3))),
            (ProblemSource, "generated_sources.GeneratedProblems", {}, GeneratedProblems()),
            (ProblemSource, "generated_sources.GeneratedProblems",
             {"task": {"class_path": f"{TASKS}.expressions.ExpressionTask", "init_args": {"num_operators": 3}}},
             GeneratedProblems(ExpressionTask(num_operators=3))),
            (DemonstrationSource, "dataset_sources.DatasetDemonstrations", {"path": "a", "solution_format": "gsm8k"},
             DatasetDemonstrations("a", solution_format="gsm8k")),
            (ProblemSource, "dataset_sources.DatasetProblems", {"path": "a", "limit": 5},
             DatasetProblems("a", limit=5)),
            (DemonstrationSource, "dataset_sources.DatasetDemonstrations", {"path": "n"}, DatasetDemonstrations("n")),
            (ProblemSource, "dataset_sources.DatasetProblems", {"path": "n", "config": "main"},
             DatasetProblems("n", "main")),
        ],
    )  # fmt: skip
    def test_sources_are_built_from_config(self, kind, class_path, init_args, expected):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--source", type=kind)
        value = {"class_path": f"egspo_lightning.data.{class_path}", "init_args": init_args}
        assert parser.instantiate(parser.parse_object({"source": value})).source == expected

    @pytest.mark.parametrize(
        ("kind", "name", "init_args", "message"),
        [
            (ProblemSource, "DatasetProblems", {"limits": 5}, "limits"),
            (ProblemSource, "DatasetProblems", {"limit": 0}, "limit"),
            (ProblemSource, "DatasetProblems", {"answer_extractor": "last"}, "none.*boxed.*gsm8k.*olympiadbench.*last"),
            (DemonstrationSource, "DatasetDemonstrations", {"limit": 0}, "limit"),
            (DemonstrationSource, "GeneratedDemonstrations", {"num_demonstrations": 0}, "num_demonstrations"),
            (DemonstrationSource, "GeneratedDemonstrations", {"task": {"operators": "*"}}, "operators"),
            (DemonstrationSource, "DatasetDemonstrations", {"solution_format": "latex"}, "auto.*boxed.*plain.*latex"),
        ],
    )
    def test_unknown_or_out_of_range_source_arguments_are_refused(self, kind, name, init_args, message):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--source", type=kind)
        module, required = ("dataset", {"path": "a"}) if name.startswith("Dataset") else ("generated", {})
        value = {"class_path": f"egspo_lightning.data.{module}_sources.{name}", "init_args": required | init_args}
        with pytest.raises(ArgumentError, match=f"(?s){message}"):
            parser.parse_object({"source": value})


class TestRealFiles:
    def test_gsm8k_demonstrations_have_boxed_answers(self, shared_file):
        path = str(shared_file("data/gsm8k_train.jsonl"))
        demonstrations = DatasetDemonstrations(path).load()
        answers = [row["answer"].replace(",", "") for _, row in read_rows(path)]
        assert len(demonstrations) == 7473
        assert [extract_boxed(d.solution) for d in demonstrations] == answers
        assert not any("<<" in d.solution or "####" in d.solution for d in demonstrations)

    def test_math_demonstrations_are_unchanged(self, shared_file):
        path = str(shared_file("data/math_demos.jsonl"))
        demonstrations = DatasetDemonstrations(path).load()
        solutions = [row["solution"].strip() for _, row in read_rows(path)]
        assert [d.solution for d in demonstrations] == solutions
        assert all(extract_boxed(d.solution) for d in demonstrations)

    def test_olympiad_answers_are_appended_without_dollars(self, shared_file):
        demonstrations = DatasetDemonstrations(str(shared_file("data/olympiadbench.jsonl"))).load()
        answers = [extract_boxed(d.solution) for d in demonstrations]
        assert len(answers) == 675
        assert all(answers)
        assert not any(re.fullmatch(r"\$[^$]*\$", answer) for answer in answers if answer)

    def test_prepare_excludes_math500_problems_from_math(self, shared_file):
        benchmark = DatasetProblems(str(shared_file("data/math500.jsonl"))).load()
        excluded = frozenset(normalize_problem(p.problem) for p in benchmark)
        leaky = DatasetProblems(str(shared_file("data/math500.jsonl")), limit=500)
        with pytest.raises(UserError, match="500 were loaded, and 500 of them"):
            leaky.prepare(0, excluded)
        assert DatasetProblems(str(shared_file("data/math_demos.jsonl"))).prepare(0, excluded) < 20


@pytest.mark.parametrize(
    "split", ["train", "train[:3]", "train[3:]", "train[2:5]", "train[-2:]", "train[:30%]", "train[50%:]"]
)
def test_a_part_of_json_lines_is_that_of_parquet(tmp_path, split):
    """The datasets library cuts Parquet files."""
    rows = [{"problem": f"{n}?", "answer": str(n)} for n in range(10)]
    lines, table = write(tmp_path / "a.jsonl", *rows), str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), table)
    problems = [[problem.problem for problem in DatasetProblems(path, split=split).load()] for path in (lines, table)]
    assert problems[0] == problems[1]


def test_a_malformed_part_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "1?", "answer": "1"})
    with pytest.raises(UserError, match=r"split = 'train\[3\]': write a part as"):
        DatasetProblems(path, split="train[3]").load()
