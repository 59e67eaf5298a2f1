"""Asynchronous sampling: the next rollout batch is sampled from a snapshot while the policy trains."""

import copy
import threading
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from egspo_lightning import Guards, MathBenchmark, PhaseCheckpoint, StageTransition
from egspo_lightning.cli.main import main
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.ops.objective import Objective
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from processes import SHORT_QUICKSTART, compare_metrics
from spies import METHODS, slow

RL = {"initial_stage": "egspo"}
AHEAD = {"max_staleness": 1}
FROZEN = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}


class Recorder(Callback):
    """Records the weights at the start of each phase, its rollout batch, policy versions, losses and metrics."""

    def __init__(self):
        self.weights, self.rollouts, self.metrics = [], [], []
        self.versions, self.losses = [], {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.rollout is not None:
            self.versions.append(batch.rollout.policy_version)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[(trainer.current_epoch, batch_idx)] = outputs["loss"].item()

    def on_train_epoch_end(self, trainer, pl_module):
        self.rollouts.append(trainer.datamodule.phases.rollouts)
        self.metrics.append(dict(trainer.callback_metrics))


class ThreadRecorder(TransformersEngine):
    """Records the thread that samples each rollout batch."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "threads", [])

    def stream(self, *args, **kwargs):
        self.threads.append(threading.current_thread().name)
        yield from super().stream(*args, **kwargs)


def ahead_threads():
    for thread in threading.enumerate():
        if thread.name == "sampling-ahead":
            thread.join(1.0)  # it may be about to end
    return [thread for thread in threading.enumerate() if thread.name.startswith("sampling-ahead")]


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


def assert_equal_rollouts(one, other):
    """Compare bit for bit, apart from the policy version."""
    for name, value in one._asdict().items():
        theirs = getattr(other, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs, rtol=0, atol=0, equal_nan=True, msg=name)  # NaN: not sampled
        elif name != "policy_version":
            assert value == theirs, name


# Policy version of the rollouts


def test_all_rollout_batches_but_the_first_are_one_phase_stale(tiny_run):
    recorder, engine = Recorder(), ThreadRecorder()
    data = AHEAD | {"engine": engine, "num_ppo_epochs": 2}
    tiny_run(recorder, module=RL, data=data, trainer={"max_epochs": 4}).fit()
    assert recorder.versions == [0] * 4 + [0] * 4 + [4] * 4 + [8] * 4
    assert [metrics["rollout/staleness"] for metrics in recorder.metrics] == [0, 4, 4, 4]  # in optimizer steps
    assert engine.threads[0] == "MainThread"
    assert all(name.startswith("sampling-ahead") for name in engine.threads[1:])
    assert len(engine.threads) == 4  # none for a phase after the last
    assert ahead_threads() == []


def test_without_staleness_nothing_is_sampled_ahead(tiny_run):
    recorder, engine = Recorder(), ThreadRecorder()
    run = tiny_run(recorder, module=RL, data={"engine": engine}).fit()
    assert recorder.versions == [0, 0, 2, 2, 4, 4]
    assert [metrics["rollout/staleness"] for metrics in recorder.metrics] == [0, 0, 0]
    assert set(engine.threads) == {"MainThread"}
    assert run.module._snapshot is None
    assert "time/wait" not in recorder.metrics[-1]


@pytest.mark.parametrize("flags", [{"max_steps": 4, "max_epochs": -1}, {"max_epochs": 2}])
def test_nothing_is_sampled_for_a_phase_after_the_last(tiny_run, flags):
    engine = ThreadRecorder()
    tiny_run(module=RL, data=AHEAD | {"engine": engine}, trainer=flags).fit()
    assert len(engine.threads) == 2


def test_the_first_rollout_batch_after_sft_is_not_stale(tiny_run):
    recorder, engine = Recorder(), ThreadRecorder()
    data = AHEAD | {"engine": engine}
    tiny_run(StageTransition(after_epochs=2), recorder, data=data, trainer={"max_epochs": 5}).fit()
    assert recorder.versions == [4, 4, 4, 4, 6, 6]
    assert engine.threads[0] == "MainThread"
    assert len(engine.threads) == 3


CRITIC = {"advantage": GAE(), "critic": CriticConfig("own")}


@pytest.mark.parametrize("module", [{}, CRITIC], ids=["sampled", "scored"])
def test_stale_rollouts_come_from_the_weights_of_the_phase_before(tiny_run, module):
    """Tokens, log-probabilities and entropies equal those of the weights at the start of the phase before."""
    recorder, module = Recorder(), RL | {"temperature": 0.8} | module
    run = tiny_run(recorder, module=module, data=AHEAD, trainer={"max_epochs": 4}).fit()
    collector = run.data.phases.collector
    for number in range(1, 4):
        again = {}
        for age in (0, 1):
            run.module.load_state_dict(recorder.weights[number - age])
            collector.num_drawn = 4 * number
            groups = collector.sample_and_grade(run.module, collector.draw_problems(number, 0, 1).prompts).groups
            again[age] = tokens_of(completion for group in groups for completion in group.completions)
            scores = run.module.score(*recorder.rollouts[number].batch[:2])
            rollout = recorder.rollouts[number].batch
            gaps = (
                (scores.logprobs - rollout.old_logprobs).abs().max(),
                (scores.entropies - rollout.entropies).abs().max(),
            )
            assert all(gap < 1e-5 for gap in gaps) if age == 1 else all(gap > 1e-3 for gap in gaps)
        found = tokens_of(recorder.rollouts[number].completions)
        assert found == again[1]
        assert found != again[0]


VARIANTS = {
    "plain": {},
    "bfloat16": {"trainer": {"precision": "bf16-mixed"}},
    "own_critic": {
        "module": {"advantage": GAE(), "critic": CriticConfig("own"), "objective": Objective(beta=0.1, mu=0.0)}
    },
    "shared_critic": {"module": {"advantage": GAE(), "critic": CriticConfig("shared"), "objective": Objective(mu=0.0)}},
    "lora": {"policy": {"lora": LoraConfig(rank=2)}, "module": {"objective": Objective(beta=0.1)}},
    "checkpointing": {"policy": {"gradient_checkpointing": True}},
    "experts": {"data": {"expert_fraction": 0.5}},
    "resampling": {"data": {"max_resampling": 2, "num_generations": 2}},
}


@pytest.mark.parametrize("variant", ["plain", *slow(*list(VARIANTS)[1:])])
def test_a_frozen_policy_has_the_same_rollouts_and_losses_with_and_without_staleness(tiny_run, small_model, variant):
    chosen = VARIANTS[variant]
    runs = []
    for staleness in (0, 1):
        recorder = Recorder()
        policy = PolicyConfig(small_model, from_scratch=True, **chosen.get("policy", {}))
        module = RL | FROZEN | {"policy": policy} | chosen.get("module", {})
        data = {"max_staleness": staleness} | chosen.get("data", {})
        run = tiny_run(recorder, module=module, data=data, trainer={"max_epochs": 3} | chosen.get("trainer", {})).fit()
        runs.append((recorder, run))
    (off, _), (on, run) = runs
    assert off.losses == on.losses
    assert on.versions != off.versions
    for one, other in zip(off.rollouts, on.rollouts, strict=True):
        assert_equal_rollouts(one.batch, other.batch)
        assert tokens_of(one.completions) == tokens_of(other.completions)
        assert [c.text for c in one.completions] == [c.text for c in other.completions]
        assert one.numbers == other.numbers
    if variant == "lora":  # the snapshot shares the frozen base model
        trained = {id(p) for p in run.module.policy.parameters() if p.requires_grad}
        copied = {id(p) for p in run.module._snapshot._networks.policy.parameters()}
        assert not trained & copied
        assert {id(p) for p in run.module.policy.parameters()} - trained <= copied


def test_the_snapshot_is_neither_trained_nor_saved(tiny_run):
    run = tiny_run(module=RL, data=AHEAD).fit()
    assert run.module._snapshot is not None
    assert not [name for name in run.module.state_dict() if "snapshot" in name]
    alone = sum(p.numel() for p in run.module.policy.parameters())
    assert sum(p.numel() for p in run.module.parameters()) == alone


def test_benchmarks_do_not_change_training(tiny_run):
    """They sample from the trained policy while the thread samples from the snapshot."""
    ended = []
    for every in (0, 1):
        benchmark = MathBenchmark(every_n_epochs=every, enabled=every > 0)
        data = AHEAD | {"benchmarks": [GeneratedBenchmark(num_problems=8)], "max_prompt_length": 16}
        run = tiny_run(benchmark, module=RL, data=data, trainer={"max_epochs": 4}).fit()
        assert len(benchmark.latest) == every
        ended.append(run.module.state_dict())
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_benchmarks_wait_for_an_engine_that_is_not_reentrant(tiny_run, is_reentrant):
    class Slow(TransformersEngine):
        most, now = 0, 0

        def stream(self, *args, **kwargs):
            Slow.now += 1
            Slow.most = max(Slow.most, Slow.now)
            time.sleep(0.3)
            yield from super().stream(*args, **kwargs)
            Slow.now -= 1

    Slow.is_reentrant = is_reentrant
    data = AHEAD | {"engine": Slow(), "benchmarks": [GeneratedBenchmark(num_problems=8)], "max_prompt_length": 16}
    tiny_run(MathBenchmark(every_n_epochs=1), module=RL, data=data, trainer={"max_epochs": 3}).fit()
    assert Slow.most == (2 if is_reentrant else 1)


# Limit of staleness


@pytest.mark.parametrize(("staleness", "version"), [(0, 2), (1, 0), (1, 6)])
def test_rollouts_beyond_the_limit_are_refused(tiny_run, staleness, version):
    """The third phase begins at step 4; the oldest allowed version is 4 without staleness, and 2 with it."""
    run = tiny_run(module=RL, data={"max_staleness": staleness})
    to_batch = run.module.add_advantages_and_gate

    def change(rollouts, measurements):
        admitted = to_batch(rollouts, measurements)
        return admitted._replace(policy_version=version) if run.data.phases.num_rollout_batches == 2 else admitted

    run.module.add_advantages_and_gate = change
    with pytest.raises(RuntimeError, match=f"Stale rollouts: they were sampled by the policy after {version} optimi"):
        run.fit()
    assert run.trainer.global_step == 4
    assert ahead_threads() == []


def test_rollouts_of_the_sft_policy_are_refused(tiny_run):
    """They are one phase stale, but come from another stage."""
    run = tiny_run(StageTransition(after_epochs=2), data=AHEAD)
    to_batch = run.module.add_advantages_and_gate
    run.module.add_advantages_and_gate = lambda rollouts, measurements: to_batch(rollouts, measurements)._replace(
        policy_version=2
    )
    with pytest.raises(
        RuntimeError, match=r"after 2 optimizer steps\. In this phase data\.max_staleness allows for 4\."
    ):
        run.fit()


def test_the_first_ratio_is_checked_in_the_first_rollout_batch(tiny_run, monkeypatch):
    """That batch is not stale, so an engine with wrong log-probabilities is detected."""

    class Wrong(TransformersEngine):
        def stream(self, lm, *args, **kwargs):
            for sample in super().stream(lm, *args, **kwargs):
                yield [(i, s._replace(logprobs=[value - 0.5 for value in s.logprobs])) for i, s in sample]

    with pytest.raises(RuntimeError, match="the training forward pass disagrees"):
        tiny_run(module=RL, data=AHEAD | {"engine": Wrong()}).fit()
    recorder = Recorder()
    tiny_run(recorder, module=RL, data=AHEAD).fit()
    assert recorder.metrics[1]["policy/ratio_max"] > 1.01  # stale ratios differ from 1


def test_sharded_policies_are_refused(repository, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(repository)
    flags = ["--trainer.strategy=fsdp2", "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config=configs/quickstart.yaml", "--data.max_staleness=1", *flags])
    assert ended.value.code == 2
    assert "trainer.strategy fsdp2 each rank holds" in capsys.readouterr().err


# Errors and early exits


class FromSecondBatch:
    """Reward that calls ``act`` from the second rollout batch on."""

    def __init__(self, act):
        self.num, self.act = 0, act

    def __call__(self, completions, golds):
        self.num += len(completions)
        if self.num > 16:
            self.act()
        return [float(len(text) % 2) for text in completions]


@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_in_the_thread_ends_the_run(tiny_run, is_late):
    """It is raised at the next optimizer step, or when the rollout batch is needed."""

    def fail():
        if is_late:
            time.sleep(1.0)
        raise ZeroDivisionError("mine")

    class Wait(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not is_late:
                assert ahead_threads() == []

    run = tiny_run(Wait(), module=RL, data=AHEAD | {"reward": FromSecondBatch(fail), "num_ppo_epochs": 2})
    with pytest.raises(RuntimeError, match=r"data\.reward") as error:
        run.fit()
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert run.trainer.global_step == (4 if is_late else 1)
    assert ahead_threads() == []


class Endless(TransformersEngine):
    """Never finishes the second rollout batch."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "begun", threading.Event())

    def stream(self, lm, *args, **kwargs):
        if threading.current_thread().name.startswith("sampling-ahead"):
            self.begun.set()
            while True:
                lm(input_ids=torch.tensor([[1, 2]]))
        yield from super().stream(lm, *args, **kwargs)


def test_an_error_in_training_ends_the_thread(tiny_run):
    engine = Endless()

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert engine.begun.wait(10)
            raise ZeroDivisionError

    run = tiny_run(Stop(), module=RL, data=AHEAD | {"engine": engine})
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert ahead_threads() == []
    assert run.data.phases.collector.num_drawn == 4  # the second batch does not count


def test_should_stop_does_not_wait_for_the_thread(tiny_run):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    run = tiny_run(Stop(), module=RL, data=AHEAD | {"engine": Endless()}, trainer={"max_epochs": 9}).fit()
    assert run.trainer.global_step == 2
    assert ahead_threads() == []


# Resuming


def make_run(tiny_run, folder, recorder, module, data=AHEAD, **checkpoint):
    save = PhaseCheckpoint(dirpath=folder, save_top_k=-1, **checkpoint)
    trainer = {"max_epochs": 5, "enable_checkpointing": True, "logger": CSVLogger(folder)}
    return tiny_run(StageTransition(after_epochs=1), recorder, save, module=module, data=data, trainer=trainer)


@pytest.mark.parametrize(
    ("method", "when"),
    [
        ("egspo", {"every_n_train_steps": 1}),
        *slow(("egspo", {"every_n_epochs": 1}), ("ppo", {"every_n_train_steps": 1}), ("kl", {"every_n_epochs": 1})),
    ],
)
def test_resuming_from_every_checkpoint_is_bit_identical(tiny_run, tmp_path, method, when):
    module, whole = METHODS[method], Recorder()
    run = make_run(tiny_run, tmp_path / "whole", whole, module, **when).fit()
    expected = copy.deepcopy(run.module.state_dict())
    saved = sorted((tmp_path / "whole").glob("epoch*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    assert len(saved) == (10 if "every_n_train_steps" in when else 5)
    num_with_pending = 0
    for path in saved[:-1]:
        recorder = Recorder()
        rest = make_run(tiny_run, tmp_path / path.stem, recorder, module, every_n_epochs=1)
        torch.manual_seed(99)
        rest.fit(ckpt_path=path, weights_only=True)
        assert all(torch.equal(value, expected[name]) for name, value in rest.module.state_dict().items()), path.stem
        assert recorder.losses == {key: value for key, value in whole.losses.items() if key in recorder.losses}
        assert recorder.versions == whole.versions[-len(recorder.versions) :]
        num_with_pending += "ahead" in torch.load(path, weights_only=True)["HybridDataModule"]
    assert num_with_pending == (6 if "every_n_train_steps" in when else 3)  # phases 2 to 4 of 5, two steps each


def test_guards_accept_a_resumed_run_without_a_first_ratio(tiny_run, tmp_path):
    """A resumed run lacks the metrics of earlier phases."""
    make_run(tiny_run, tmp_path / "whole", Recorder(), {}, every_n_epochs=1).fit()
    path = next((tmp_path / "whole").glob("epoch=2-*.ckpt"))
    run = make_run(tiny_run, tmp_path / "rest", Guards(), {}, every_n_epochs=1).fit(ckpt_path=path, weights_only=True)
    assert run.trainer.callback_metrics["guard/ratio_after_sampling"] == 0
    assert "policy/first_ratio_gap" not in run.trainer.callback_metrics


def test_resuming_without_staleness_samples_the_pending_rollout_batch_again(tiny_run, tmp_path):
    make_run(tiny_run, tmp_path / "whole", Recorder(), {}, every_n_epochs=1).fit()
    path = next((tmp_path / "whole").glob("epoch=2-*.ckpt"))
    assert "ahead" in torch.load(path, weights_only=True)["HybridDataModule"]
    recorder = Recorder()
    run = make_run(tiny_run, tmp_path / "rest", recorder, {}, data={}, every_n_epochs=1)
    run.fit(ckpt_path=path, weights_only=True)
    assert recorder.versions == [6, 6, 8, 8]
    assert run.data.phases.collector.num_drawn == 4 * 4  # each problem is drawn once


# Ranks


@pytest.mark.slow
def test_a_short_quickstart_learns(run_ranks, tmp_path):
    quickstart = ["--data.max_staleness=1", *SHORT_QUICKSTART]
    rows = run_ranks(tmp_path, {"quickstart": quickstart}, num_ranks=1)["quickstart"]
    accuracy = [float(row["eval/arithmetic/avg@1"]) for row in rows if row.get("eval/arithmetic/avg@1")]
    assert accuracy[0] < 0.05 < accuracy[1] + 0.08 < accuracy[2]
    staleness = [float(row["rollout/staleness"]) for row in rows if row["rollout/staleness"]]
    assert len(staleness) > 40
    assert staleness == [0.0, *[4.0] * (len(staleness) - 1)]


@pytest.mark.slow
def test_two_ranks_equal_one_process(run_ranks, tmp_path):
    runs = {"ahead": ["--data.max_staleness=1", "--trainer.max_epochs=6"]}
    alone = run_ranks(tmp_path / "one", runs, num_ranks=1)["ahead"]
    ranks = run_ranks(tmp_path / "two", {"ahead": [*runs["ahead"], "--trainer.strategy=ddp", "--trainer.devices=2"]})
    assert compare_metrics(ranks["ahead"], alone) > 100
    assert [row["rollout/staleness"] for row in alone if row["rollout/staleness"]] == ["0.0", *["4.0"] * 4]
