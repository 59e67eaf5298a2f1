import json

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning import StageTransition
from egspo_lightning.data.dataset_sources import DatasetDemonstrations, DatasetProblems
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import DatasetBenchmark
from egspo_lightning.rewards.format import FormatReward
from egspo_lightning.rewards.functions import CorrectnessReward


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def row(i, text=None):
    return {"id": f"row-{i}", "problem": text or f"{i}+1=?", "solution": f"\\boxed{{{i + 1}}}", "answer": str(i + 1)}


@pytest.fixture
def files(tmp_path):
    """Ten training rows, and a benchmark with three of them, two of which have other spacing."""
    asked = [row(0), row(1, " 1+1=? "), row(2, "2+1=?\n"), row(77)]
    return {
        "train": write(tmp_path / "train.jsonl", [row(i) for i in range(10)]),
        "benchmark": write(tmp_path / "benchmark.jsonl", asked),
    }


def test_training_data_in_a_benchmark_is_dropped_and_counted(tiny_run, files, caplog):
    data = {
        "demonstrations": DatasetDemonstrations(files["train"]),
        "problems": DatasetProblems(files["train"]),
        "benchmarks": [DatasetBenchmark("held_out", files["benchmark"])],
    }
    with caplog.at_level("INFO"):
        run = tiny_run(data=data, trainer={"max_epochs": 1}).fit()
    drawn = {problem.id for problem in run.data.problems.draw(0, 50)}
    assert drawn == {f"row-{i}" for i in range(3, 10)}
    assert "Data: 7 demonstrations (dropped: 3 that a benchmark contains, 0 that are too long, 0 that" in caplog.text
    dropped = "Training problems dropped because a benchmark contains them: 3; because they are too long: 0."
    assert dropped in caplog.text


@pytest.mark.parametrize(
    ("enabled", "reward", "num_kept"),
    [(True, CorrectnessReward(), 1), (True, FormatReward(), 3), (False, CorrectnessReward(), 3)],
    ids=["graded rollouts", "another reward", "SFT only"],
)
def test_demonstrations_without_an_answer_are_dropped_where_rollouts_need_one(
    tiny_run, tmp_path, caplog, enabled, reward, num_kept
):
    """An answer field alone does not end cut-off reasoning."""
    rows = [row(1), *({"problem": "1+1=?", "solution": "<think>1+", "answer": "2"} for _ in range(2))]
    demonstrations = DatasetDemonstrations(write(tmp_path / "train.jsonl", rows))
    data = {"demonstrations": demonstrations, "reward": reward, "max_completion_length": 40}
    with caplog.at_level("INFO"):
        tiny_run(StageTransition(enabled=enabled), data=data, trainer={"max_epochs": 1}).fit()
    counts = f"{3 - num_kept} that the grader marks wrong; without an answer: {num_kept - 1}"
    assert f"Data: {num_kept} demonstrations" in caplog.text
    assert counts in caplog.text


def test_demonstrations_that_the_grader_marks_wrong_are_refused_at_the_start(tiny_run, tmp_path):
    rows = [{"problem": "1+1=?", "solution": "<think>1+1=2, so", "answer": "2"}]
    demonstrations = DatasetDemonstrations(write(tmp_path / "train.jsonl", rows))
    data = {"demonstrations": demonstrations, "reward": CorrectnessReward(), "max_completion_length": 40}
    with pytest.raises(UserError, match=r"data\.demonstrations: the grader of rollouts marks all 1 of them wrong"):
        tiny_run(StageTransition(), data=data).fit()


def test_problems_answered_by_predict_stay_in_training_data(tiny_run, files):
    """Problems given to predict are not a benchmark, so training may use them."""
    data = {
        "demonstrations": DatasetDemonstrations(files["train"]),
        "problems": DatasetProblems(files["train"]),
        "benchmarks": [DatasetBenchmark("held_out", files["benchmark"])],
    }
    run = tiny_run(data=data, trainer={"max_epochs": 1})
    run.trainer.predict(run.module, run.data, return_predictions=False)
    run.fit()
    assert {problem.id for problem in run.data.problems.draw(0, 50)} == {f"row-{i}" for i in range(3, 10)}


def test_problem_longer_than_max_prompt_length_is_refused(tiny_run, tmp_path):
    write(tmp_path / "long.jsonl", [row(5, "5 and then 1 makes how many?")])
    data = {"problems": DatasetProblems(str(tmp_path / "long.jsonl")), "max_prompt_length": 5}
    message = r"data.max_prompt_length = 5 is shorter than the prompt of problem 'row-5', which has 28 tokens"
    with pytest.raises(UserError, match=message):
        tiny_run(module={"initial_stage": "egspo"}, data=data).fit()


def test_long_problems_drop_removes_and_counts_long_problems(tiny_run, files, tmp_path, caplog):
    write(tmp_path / "long.jsonl", [row(5, "5 and then 1 makes how many?"), row(6), row(7)])
    data = {
        "demonstrations": DatasetDemonstrations(files["train"]),
        "problems": DatasetProblems(str(tmp_path / "long.jsonl")),
        "max_prompt_length": 5,
        "long_problems": "drop",
    }
    with caplog.at_level("INFO"):
        run = tiny_run(data=data, trainer={"max_epochs": 1}).fit()
    assert {problem.id for problem in run.data.problems.draw(0, 20)} == {"row-6", "row-7"}
    assert "because they are too long: 1." in caplog.text


def test_too_long_benchmark_problem_is_refused_before_training(tiny_run, files):
    data = {"benchmarks": [DatasetBenchmark("held_out", files["benchmark"])], "max_prompt_length": 5}
    with pytest.raises(UserError, match=r"is shorter than the prompt of problem 'row-\d+'"):
        tiny_run(data=data).fit()


SIZES = [
    "sft_batch_size",
    "expert_batch_size",
    "num_problems",
    "num_generations",
    "num_ppo_epochs",
    "num_minibatches",
    "max_tokens_per_micro_batch",
    "max_prompt_length",
    "max_completion_length",
    "eval_batch_size",
]


@pytest.fixture(scope="module")
def parser():
    """Command-line parser for the scalar arguments of the datamodule."""
    parser = ArgumentParser(exit_on_error=False)
    parts = {"demonstrations", "problems", "benchmarks", "engine", "reward", "evaluation_grader"}
    parser.add_class_arguments(HybridDataModule, "data", skip=parts)
    return parser


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in SIZES for value in (0, -1, 10**8 + 1)]
    + [("max_resampling", -1), ("max_staleness", 2), ("max_staleness", -1)]
    + [("expert_fraction", -0.1), ("expert_fraction", 1.1)],
)
def test_parser_refuses_out_of_range_values_by_field(parser, field, value):
    with pytest.raises(ArgumentError, match=rf"data\.{field}"):
        parser.parse_args([f"--data.{field}={value}"])


def test_parser_accepts_values_at_the_bounds(parser):
    others = {"max_resampling": 0, "max_staleness": 1, "expert_fraction": 1.0}
    for value in (1, 10**8):
        bounds = dict.fromkeys(SIZES, value) | others
        parsed = parser.parse_args([f"--data.{field}={bound}" for field, bound in bounds.items()])
        assert {field: parsed[f"data.{field}"] for field in bounds} == bounds


def test_more_minibatches_than_completions_are_refused(tiny_run):
    with pytest.raises(UserError, match=r"data\.num_minibatches must be at most 16.* got 17"):
        tiny_run(data={"num_minibatches": 17}).fit()


def test_train_dataloader_has_length_and_does_not_sample_when_created(tiny_run):
    run = tiny_run(module={"initial_stage": "egspo"}, data={"num_ppo_epochs": 3}, trainer={"max_epochs": 1}).fit()
    loader = run.data.train_dataloader()
    assert len(loader) == 3 * 2
    assert run.data.phases.num_rollout_batches == 1  # creating the loader samples nothing
