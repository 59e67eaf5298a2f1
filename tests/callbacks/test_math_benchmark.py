import pytest
import torch
from rich.console import Console

from egspo_lightning.callbacks import MathBenchmark, StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.tasks.arithmetic import ArithmeticTask

DIGITS = ArithmeticTask(num_digits=1)


def benchmarks() -> dict[str, list[GeneratedBenchmark]]:
    greedy = GeneratedBenchmark("greedy", num_problems=5, task=DIGITS)
    sampled = GeneratedBenchmark("sampled", num_problems=3, task=DIGITS, num_samples=2, temperature=1.0)
    return {"benchmarks": [greedy, sampled], "eval_batch_size": 2}


NAMES = {
    "greedy": {"avg@1", "pass@1", "maj@1", "length_mean", "truncated_fraction", "grader_timeouts", "num_problems"},
    "sampled": {"avg@2", "pass@2", "maj@2", "length_mean", "truncated_fraction", "grader_timeouts", "num_problems"},
}


def steps(events, trainer, name: str = "eval/greedy/avg@1") -> list[int]:
    return [event.step for event in events(trainer).Scalars(name)]


def test_it_measures_before_training_after_sft_and_at_the_end(tiny_run, events):
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), logger=True).fit()
    assert list(benchmark.milestones) == ["before", "after SFT", "after EGSPO"]
    assert steps(events, run.trainer) == [0, 2, 6]  # two updates a phase
    for results in benchmark.milestones.values():
        assert {name: set(values) for name, values in results.items()} == NAMES
        assert results["greedy"]["num_problems"] == 5
        assert results["sampled"]["num_problems"] == 3


def test_metrics_stand_in_callback_metrics_and_in_tensorboard(tiny_run, events):
    benchmark = MathBenchmark()
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), logger=True).fit()
    log = events(run.trainer)
    for name, metrics in NAMES.items():
        for metric in metrics:
            value = benchmark.latest[name][metric]
            assert run.trainer.callback_metrics[f"eval/{name}/{metric}"].item() == pytest.approx(value)
            assert log.Scalars(f"eval/{name}/{metric}")[-1].value == pytest.approx(value)


def test_the_values_are_those_of_a_naive_loop(tiny_run):
    """After enough SFT on few problems some answers are right; count them with transformers' generate."""
    in_data = benchmarks() | {"sft_batch_size": 8}
    trained = [GeneratedBenchmark("trained", split="train", num_problems=12, task=DIGITS)]
    run = tiny_run(data=in_data, trainer={"max_epochs": 30}).fit()
    module, tokenizer = run.module, run.module.tokenizer
    benchmark = MathBenchmark()
    measured = tiny_run(benchmark, data=in_data | {"benchmarks": trained})
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
        ({}, [0, 2, 8]),
        ({"at_start": False}, [2, 8]),
        ({"every_n_epochs": 1}, [0, 2, 4, 6, 8]),
        ({"every_n_epochs": 2}, [0, 2, 4, 8]),
        ({"every_n_epochs": 3, "at_start": False}, [2, 6, 8]),
        ({"enabled": False, "every_n_epochs": 1}, []),
    ],
)
def test_when_it_measures_and_never_twice_at_a_step(tiny_run, events, options, expected):
    benchmark = MathBenchmark(**options)
    run = tiny_run(benchmark, StageTransition(), data=benchmarks(), trainer={"max_epochs": 4}, logger=True).fit()
    log = events(run.trainer)
    found = [event.step for event in log.Scalars("eval/greedy/avg@1")] if expected else []
    assert found == expected
    assert bool(expected) == any(tag.startswith("eval/") for tag in log.Tags()["scalars"])


def test_runs_of_one_stage_have_two_milestones(tiny_run):
    for initial, last in (("sft", "after SFT"), ("egspo", "after EGSPO")):
        benchmark = MathBenchmark()
        tiny_run(benchmark, module={"initial_stage": initial}, data=benchmarks(), trainer={"max_epochs": 1}).fit()
        assert list(benchmark.milestones) == ["before", last]


def test_a_transition_in_the_last_epoch_is_the_end_of_sft(tiny_run):
    benchmark = MathBenchmark()
    tiny_run(benchmark, StageTransition(after_epochs=2), data=benchmarks(), trainer={"max_epochs": 2}).fit()
    assert list(benchmark.milestones) == ["before", "after SFT"]


def test_without_benchmarks_it_does_nothing(tiny_run):
    benchmark = MathBenchmark(every_n_epochs=1)
    tiny_run(benchmark, StageTransition()).fit()
    assert (benchmark.milestones, benchmark.latest) == ({}, {})


def test_a_resumed_run_keeps_its_milestones_and_does_not_measure_the_start_again(tiny_run, tmp_path, events):
    first = MathBenchmark()
    run = tiny_run(first, StageTransition(), data=benchmarks(), logger=True).fit()
    second = MathBenchmark()
    resumed = tiny_run(second, StageTransition(), data=benchmarks(), logger=True)
    resumed.fit(ckpt_path=f"{run.trainer.log_dir}/sft.ckpt", weights_only=True)
    assert second.milestones == first.milestones
    assert steps(events, resumed.trainer) == [2, 6]


@pytest.mark.parametrize("task", ["validate", "test"])
def test_validate_and_test_measure_the_same(tiny_run, task, events):
    fitting, benchmark = MathBenchmark(), MathBenchmark()
    run = tiny_run(fitting, data=benchmarks(), trainer={"max_epochs": 1}).fit()
    other = tiny_run(benchmark, data=benchmarks(), logger=True)
    getattr(other.trainer, task)(run.module, other.data, verbose=False)
    assert benchmark.latest == fitting.latest
    assert other.trainer.callback_metrics["eval/sampled/length_mean"].item() == pytest.approx(
        fitting.latest["sampled"]["length_mean"]
    )


def test_the_results_do_not_depend_on_batch_sizes(tiny_run):
    results = []
    for size in (1, 2, 128):
        benchmark = MathBenchmark()
        data = benchmarks() | {"eval_batch_size": size, "engine": TransformersEngine(max_batch_size=size)}
        tiny_run(benchmark, data=data, trainer={"max_epochs": 1}).fit()
        results.append(benchmark.latest)
    assert results[0] == results[1] == results[2]


def test_tables_show_the_milestones_and_every_metric(tiny_run):
    benchmark = MathBenchmark()
    tiny_run(benchmark, StageTransition(), data=benchmarks()).fit()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(benchmark.summary())
    console.print(benchmark.details())
    text = console.export_text()
    for word in ("greedy", "sampled", "before", "after SFT", "after EGSPO", "avg@1", "avg@2", "length_mean", "pass@2"):
        assert word in text


def test_a_negative_period_is_refused():
    with pytest.raises(UserError, match=r"math_benchmark.every_n_epochs must be at least 0, got -1"):
        MathBenchmark(every_n_epochs=-1)


def test_a_run_that_starts_from_another_measures_its_own_benchmarks(tiny_run, tmp_path):
    """The checkpoint brings results of a benchmark that this run does not have, at the very same step."""

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
