import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from egspo_lightning import MathBenchmark, StageTransition
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.evaluation.report import milestones_table
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.transformers_engine import TransformersEngine

DIGITS = ArithmeticTask(num_digits=1)


def benchmarks() -> dict[str, list[GeneratedBenchmark]]:
    greedy = GeneratedBenchmark("greedy", num_problems=5, task=DIGITS)
    sampled = GeneratedBenchmark("sampled", num_problems=3, task=DIGITS, num_samples=2, temperature=1.0)
    return {"benchmarks": [greedy, sampled], "eval_batch_size": 2}


COMMON = {"length_mean", "truncated_fraction", "grader_timeouts", "grader_crashes", "num_problems"}
NAMES = {
    "greedy": {"avg@1", "avg@1_se", "pass@1", "maj@1"} | COMMON,
    "sampled": {"avg@2", "avg@2_se", "pass@1", "pass@2", "maj@2"} | COMMON,
}


LOGGED = NAMES | {"greedy": NAMES["greedy"] - {"pass@1", "maj@1"}}
"""Of one sample pass@1 and maj@1 equal avg@1."""


def steps(events, trainer, name: str = "eval/greedy/avg@1") -> list[int]:
    return [event.step for event in events(trainer).Scalars(name)]


def test_benchmarks_run_before_training_after_sft_and_at_the_end(tiny_run, events):
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), logger=True).fit()
    assert list(benchmark.milestones) == ["before", "after SFT", "after EGSPO"]
    assert steps(events, run.trainer) == [0, 1, 5]  # two optimizer steps per epoch
    assert steps(events, run.trainer, "loss/total") == [1, 3, 5]  # a phase's metrics and scores share a step
    for results in benchmark.milestones.values():
        assert {name: set(values) for name, values in results.items()} == NAMES
        assert results["greedy"]["num_problems"] == 5
        assert results["sampled"]["num_problems"] == 3


def test_benchmark_metrics_are_in_callback_metrics_and_tensorboard(tiny_run, events):
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), logger=True).fit()
    log = events(run.trainer)
    for name, metrics in LOGGED.items():
        names = {f"eval/{name}/{metric}" for metric in metrics}
        assert {tag for tag in log.Tags()["scalars"] if tag.startswith(f"eval/{name}/")} == names
        assert {tag for tag in run.trainer.callback_metrics if tag.startswith(f"eval/{name}/")} == names
        for metric in metrics:
            value = benchmark.latest[name][metric]
            assert run.trainer.callback_metrics[f"eval/{name}/{metric}"].item() == pytest.approx(value)
            assert log.Scalars(f"eval/{name}/{metric}")[-1].value == pytest.approx(value)


def test_benchmark_metrics_match_naive_loop(tiny_run):
    """After SFT on a few problems some answers are correct. The loop counts them with transformers' generate."""
    data_arguments = benchmarks() | {"sft_batch_size": 8}
    trained = [GeneratedBenchmark("trained", split="train", num_problems=12, task=DIGITS)]
    run = tiny_run(data=data_arguments, trainer={"max_epochs": 45}).fit()
    module, tokenizer = run.module, run.module.tokenizer
    benchmark = MathBenchmark()
    measured = tiny_run(benchmark, data=data_arguments | {"benchmarks": trained})
    measured.trainer.validate(module, measured.data, verbose=False)
    num_correct, num_tokens = 0, 0
    for problem in trained[0].load():
        ids = torch.tensor([tokenizer.encode(problem.problem)])
        output = (
            module.policy.lm.eval()
            .generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=18,
                eos_token_id=256,
                pad_token_id=257,
            )[0, ids.shape[1] :]
            .tolist()
        )
        num_tokens += len(output)
        num_correct += f"\\boxed{{{problem.answer}}}" in tokenizer.decode(output)
    assert 0 < num_correct < 12
    assert benchmark.latest["trained"]["avg@1"] == pytest.approx(num_correct / 12)
    assert benchmark.latest["trained"]["length_mean"] == pytest.approx(num_tokens / 12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 7]),
        ({"at_start": False}, [1, 7]),
        ({"every_n_epochs": 1}, [0, 1, 3, 5, 7]),
        ({"every_n_epochs": 2}, [0, 1, 3, 7]),
        ({"every_n_epochs": 3, "at_start": False}, [1, 5, 7]),
        ({"enabled": False, "every_n_epochs": 1}, []),
    ],
)
def test_benchmark_schedule_has_at_most_one_evaluation_per_step(tiny_run, events, options, expected):
    benchmark = MathBenchmark(**options)
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), trainer={"max_epochs": 4}, logger=True).fit()
    log = events(run.trainer)
    found = [event.step for event in log.Scalars("eval/greedy/avg@1")] if expected else []
    assert found == expected
    assert bool(expected) == any(tag.startswith("eval/") for tag in log.Tags()["scalars"])


def test_run_with_one_stage_has_two_milestones(tiny_run):
    for initial, last in (("sft", "after SFT"), ("egspo", "after EGSPO")):
        benchmark = MathBenchmark()
        tiny_run(benchmark, module={"initial_stage": initial}, data=benchmarks(), trainer={"max_epochs": 1}).fit()
        assert list(benchmark.milestones) == ["before", last]


def test_transition_in_the_last_epoch_gives_milestone_after_sft(tiny_run):
    benchmark = MathBenchmark()
    tiny_run(benchmark, StageTransition(after_epochs=2), data=benchmarks(), trainer={"max_epochs": 2}).fit()
    assert list(benchmark.milestones) == ["before", "after SFT"]


def test_math_benchmark_without_benchmarks_does_nothing(tiny_run):
    benchmark = MathBenchmark(every_n_epochs=1)
    tiny_run(benchmark, StageTransition()).fit()
    assert (benchmark.milestones, benchmark.latest) == ({}, {})


def test_resumed_run_keeps_milestones_and_skips_the_initial_evaluation(tiny_run, tmp_path, events):
    first = MathBenchmark()
    run = tiny_run(first, StageTransition(), data=benchmarks(), logger=True).fit()
    second = MathBenchmark()
    resumed = tiny_run(second, StageTransition(), data=benchmarks(), logger=True)
    resumed.fit(ckpt_path=f"{run.trainer.log_dir}/sft.ckpt", weights_only=True)
    assert second.milestones == first.milestones
    assert steps(events, resumed.trainer) == [1, 5]


@pytest.mark.parametrize("task", ["validate", "test"])
def test_validate_and_test_give_the_metrics_of_fit(tiny_run, task, events):
    fitting, benchmark = MathBenchmark(), MathBenchmark()
    run = tiny_run(fitting, data=benchmarks(), trainer={"max_epochs": 1}).fit()
    other = tiny_run(benchmark, data=benchmarks(), logger=True)
    getattr(other.trainer, task)(run.module, other.data, verbose=False)
    assert benchmark.latest == fitting.latest
    assert other.trainer.callback_metrics["eval/sampled/length_mean"].item() == pytest.approx(
        fitting.latest["sampled"]["length_mean"]
    )


def test_benchmark_results_do_not_depend_on_batch_size(tiny_run):
    results = []
    for size in (1, 2, 128):
        benchmark = MathBenchmark()
        data = benchmarks() | {"eval_batch_size": size, "engine": TransformersEngine(max_batch_size=size)}
        tiny_run(benchmark, data=data, trainer={"max_epochs": 1}).fit()
        results.append(benchmark.latest)
    assert results[0] == results[1] == results[2]


def test_each_evaluation_in_fit_writes_one_json_line(tiny_run):
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), logger=True).fit()
    folder = Path(run.trainer.log_dir)
    rows = [json.loads(line) for line in (folder / "benchmarks.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 6]
    assert [part["benchmark"] for part in rows[-1]["benchmarks"]] == ["greedy", "sampled"]
    assert {part["benchmark"]: part["metrics"] for part in rows[-1]["benchmarks"]} == benchmark.latest
    assert not (folder / "evaluation").exists()


def test_save_completions_writes_answers_during_fit(tiny_run):
    benchmark = MathBenchmark(save_completions=True, at_start=False)
    run = tiny_run(benchmark, data=benchmarks(), trainer={"max_epochs": 1}, logger=True).fit()
    folders = sorted(Path(run.trainer.log_dir, "evaluation").iterdir())
    assert [re.sub(r"-[0-9a-f]{12}$", "", folder.name) for folder in folders] == ["greedy-step-2", "sampled-step-2"]
    assert [len((folder / "completions.jsonl").read_text().splitlines()) for folder in folders] == [5, 6]
    metrics = json.loads((folders[1] / "metrics.json").read_text())
    assert metrics["metrics"] == benchmark.latest["sampled"]
    assert (metrics["step"], metrics["ckpt_path"]) == (2, None)


def test_validate_writes_answers_with_verdicts_and_scores(tiny_run, tmp_path):
    """The scores can be recomputed from the completions file."""
    trained = GeneratedBenchmark("trained", split="train", num_problems=12, task=DIGITS, num_samples=4, temperature=0.7)
    data = {"benchmarks": [trained], "sft_batch_size": 8, "eval_batch_size": 5}
    run = tiny_run(data=data, trainer={"max_epochs": 30}).fit()
    benchmark = MathBenchmark()
    measured = tiny_run(benchmark, data=data)
    measured.trainer.validate(run.module, measured.data, verbose=False)
    (folder,) = benchmark.written
    assert folder.parent == tmp_path / "evaluation"
    assert re.fullmatch(r"trained-[0-9a-f]{12}", folder.name)
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    problems = trained.load()
    assert [(row["id"], row["sample"]) for row in rows] == [(p.id, i) for p in problems for i in range(4)]
    answers = {problem.id: problem.answer for problem in problems}
    assert all(row["correct"] == (row["extracted"] == answers[row["id"]]) for row in rows)  # the answers are integers
    assert 0 < sum(row["correct"] for row in rows) < 48
    for row in rows:
        assert (row["answer_class"] is None) == (row["extracted"] is None) == (row["status"] == "no_answer")
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["metrics"] == benchmark.latest["trained"]
    assert stored["metrics"]["avg@4"] == pytest.approx(sum(row["correct"] for row in rows) / 48)
    assert stored["metrics"]["length_mean"] == pytest.approx(sum(row["length"] for row in rows) / 48)
    low, high = stored["avg@4_interval_95"]
    assert low < stored["metrics"]["avg@4"] < high
    assert stored["settings"]["temperature"] == 0.7
    assert stored["settings"] == json.loads((folder / "settings.json").read_text())


def validate_twice(tiny_run, tmp_path, *, second: dict, module=None, root="same"):
    """Folders and metrics of two evaluations in one root folder, and the number of samples of the second."""
    data = benchmarks()
    folders, calls = [], []
    for options in ({}, second):
        callback = MathBenchmark()
        run = tiny_run(callback, data=data | options, trainer={"default_root_dir": str(tmp_path / root)})
        stream = run.data.engine.stream
        calls = []
        run.data.engine.stream = lambda *args, of=stream, to=calls, **kw: to.append(len(args[1])) or of(*args, **kw)
        module = module or run.module
        run.trainer.validate(module, run.data, verbose=False)
        folders.append((callback.written, callback.latest))
    return folders, sum(calls)


def test_repeated_evaluation_samples_nothing(tiny_run, tmp_path):
    ((first, before), (second, after)), num_sampled = validate_twice(tiny_run, tmp_path, second={})
    assert first == second
    assert before == after
    assert num_sampled == 0


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"max_completion_length": 17}, {"prompt": PromptTemplate(plain="{problem} ")}],
    ids=["seed", "length", "prompt"],
)
def test_evaluation_with_other_settings_has_its_own_folder(tiny_run, tmp_path, change):
    ((first, _), (second, _)), num_sampled = validate_twice(tiny_run, tmp_path, second=change)
    assert not set(first) & set(second)
    assert num_sampled == 5 + 2 * 3


def test_other_weights_get_their_own_folder_and_are_refused_in_a_given_folder(tiny_run, tmp_path):
    run = tiny_run(data=benchmarks(), trainer={"max_epochs": 1}).fit()
    untrained, trained, chosen = MathBenchmark(), MathBenchmark(), str(tmp_path / "chosen")
    fresh = tiny_run(data=benchmarks()).module
    for callback in (untrained, MathBenchmark(folder=chosen)):
        first = tiny_run(callback, data=benchmarks())
        first.trainer.validate(fresh, first.data, verbose=False)
    assert sorted(path.name for path in Path(chosen).iterdir()) == ["greedy", "sampled"]
    later = tiny_run(trained, data=benchmarks())
    later.trainer.validate(run.module, later.data, verbose=False)
    assert not set(untrained.written) & set(trained.written)
    refused = tiny_run(MathBenchmark(folder=chosen), data=benchmarks())
    with pytest.raises(UserError, match=r"chosen/greedy holds answers under other settings: weights\."):
        refused.trainer.validate(run.module, refused.data, verbose=False)


def test_benchmark_longer_than_model_positions_is_refused(tiny_run):
    long = GeneratedBenchmark("long", num_problems=2, task=DIGITS, max_completion_length=4096)
    run = tiny_run(MathBenchmark(), data={"benchmarks": [long]})
    message = r"max_completion_length of benchmark 'long' = 8 \+ 4096 is more than the 4096 positions"
    with pytest.raises(UserError, match=message):
        run.trainer.validate(run.module, run.data, verbose=False)


def test_benchmark_longer_than_model_positions_is_refused_before_training(tiny_run):
    short, long = (
        GeneratedBenchmark(name, num_problems=2, task=DIGITS, max_completion_length=length)
        for name, length in (("short", 4088), ("long", 4089))
    )
    tiny_run(MathBenchmark(enabled=False), data={"benchmarks": [short]}, trainer={"max_epochs": 1}).fit()
    run = tiny_run(MathBenchmark(at_start=False), data={"benchmarks": [short, long]})
    message = r"max_completion_length of benchmark 'long' = 8 \+ 4089 is more than the 4096 positions.* Lower one"
    with pytest.raises(UserError, match=message):
        run.fit()
    assert run.trainer.global_step == 0


def test_evaluation_grader_can_be_set_and_is_closed(tiny_run):
    grader = MathGrader(num_workers=2, extraction="lenient")
    run = tiny_run(MathBenchmark(), data=benchmarks() | {"evaluation_grader": grader})
    assert run.data.answerer.grader is grader
    run.trainer.validate(run.module, run.data, verbose=False)
    assert grader.worker_pids() == []  # closed with the run


def test_milestones_table_shows_benchmarks_and_milestones(tiny_run):
    benchmark = MathBenchmark()
    tiny_run(benchmark, StageTransition(), data=benchmarks()).fit()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(milestones_table(benchmark.latest, benchmark.milestones))
    text = console.export_text()
    for word in ("greedy", "sampled", "before", "after SFT", "after EGSPO", "avg@1", "avg@2"):
        assert word in text


def test_run_from_a_checkpoint_evaluates_its_own_benchmarks(tiny_run, tmp_path):
    """The checkpoint holds results of another benchmark at the same step."""

    def benchmark(name):
        return GeneratedBenchmark(name, num_problems=4, task=ArithmeticTask(num_digits=1))

    tiny_run(
        MathBenchmark(every_n_epochs=1),
        StageTransition(),
        data={"benchmarks": [benchmark("old")]},
        trainer={"max_epochs": 1},
        logger=True,
    ).fit()
    (start,) = tmp_path.rglob("sft.ckpt")
    ours = MathBenchmark()
    run = tiny_run(ours, StageTransition(), data={"benchmarks": [benchmark("new")]}, trainer={"max_epochs": 2})
    run.fit(ckpt_path=start)
    assert set(ours.milestones) == {"after SFT", "after EGSPO"}
    assert all(set(results) == {"new"} for results in ours.milestones.values())
    off = MathBenchmark(enabled=False)
    tiny_run(off, StageTransition(), data={"benchmarks": [benchmark("old")]}, trainer={"max_epochs": 2}).fit(
        ckpt_path=start
    )
    assert off.milestones == {}


def test_remote_checkpoint_is_evaluated_and_recorded(tiny_run, tmp_path):
    """The path is on fsspec's in-memory file system."""
    fitted = tiny_run(data=benchmarks(), trainer={"max_epochs": 1}).fit()
    remote = "memory://bucket/trained.ckpt"
    fitted.trainer.save_checkpoint(remote)
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, data=benchmarks())
    run.trainer.test(run.module, run.data, ckpt_path=remote, weights_only=True, verbose=False)
    for folder in benchmark.written:
        stored = json.loads((folder / "metrics.json").read_text())
        assert (stored["ckpt_path"], stored["step"]) == (remote, 2)


@pytest.mark.parametrize("name", ["validate", "test"])
def test_validate_and_test_return_the_metrics_of_all_benchmarks(tiny_run, name):
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, data=benchmarks())
    returned = getattr(run.trainer, name)(run.module, run.data)
    expected = {f"eval/{n}/{metric}": benchmark.latest[n][metric] for n, names in LOGGED.items() for metric in names}
    assert returned == [expected, expected]
