"""Rollouts that are sampled from a snapshot while the policy trains on those before them."""

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
from processes import SHORT_QUICKSTART, told_apart
from spies import METHODS

RL = {"initial_stage": "egspo"}
AHEAD = {"max_staleness": 1}
STILL = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}


class Watch(Callback):
    """Weights at the start of each phase, its collection, versions and losses."""

    def __init__(self):
        self.weights, self.collections, self.metrics = [], [], []
        self.versions, self.losses = [], {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.rollout is not None:
            self.versions.append(batch.rollout.policy_version)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[(trainer.current_epoch, batch_idx)] = outputs["loss"].item()

    def on_train_epoch_end(self, trainer, pl_module):
        self.collections.append(trainer.datamodule.phases.rollouts)
        self.metrics.append(dict(trainer.callback_metrics))


class Calls(TransformersEngine):
    """Counts collections, and notes which thread samples each."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "threads", [])

    def stream(self, *args, **kwargs):
        self.threads.append(threading.current_thread().name)
        yield from super().stream(*args, **kwargs)


def ahead_threads():
    for thread in threading.enumerate():
        if thread.name == "sampling-ahead":
            thread.join(1.0)  # its last breath
    return [thread for thread in threading.enumerate() if thread.name.startswith("sampling-ahead")]


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


def rollouts_equal(one, other):
    """Bit for bit, but for the version of the policy."""
    for name, value in one._asdict().items():
        theirs = getattr(other, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs, rtol=0, atol=0, equal_nan=True, msg=name)  # NaN: not sampled
        elif name != "policy_version":
            assert value == theirs, name


# Whose rollouts they are


def test_each_collection_but_the_first_is_one_behind_and_says_so(tiny_run):
    watch, engine = Watch(), Calls()
    data = AHEAD | {"engine": engine, "num_ppo_epochs": 2}
    tiny_run(watch, module=RL, data=data, trainer={"max_epochs": 4}).fit()
    assert watch.versions == [0] * 4 + [0] * 4 + [4] * 4 + [8] * 4
    assert [metrics["rollout/staleness"] for metrics in watch.metrics] == [0, 4, 4, 4]  # updates a collection
    assert engine.threads[0] == "MainThread"
    assert all(name.startswith("sampling-ahead") for name in engine.threads[1:])
    assert len(engine.threads) == 4  # none for a phase that does not come
    assert ahead_threads() == []


def test_off_nothing_is_sampled_ahead(tiny_run):
    watch, engine = Watch(), Calls()
    run = tiny_run(watch, module=RL, data={"engine": engine}).fit()
    assert watch.versions == [0, 0, 2, 2, 4, 4]
    assert [metrics["rollout/staleness"] for metrics in watch.metrics] == [0, 0, 0]
    assert set(engine.threads) == {"MainThread"}
    assert run.module._snapshot is None
    assert "time/wait" not in watch.metrics[-1]


@pytest.mark.parametrize("flags", [{"max_steps": 4, "max_epochs": -1}, {"max_epochs": 2}])
def test_nothing_is_sampled_for_a_phase_that_will_not_come(tiny_run, flags):
    engine = Calls()
    tiny_run(module=RL, data=AHEAD | {"engine": engine}, trainer=flags).fit()
    assert len(engine.threads) == 2


def test_the_first_collection_after_sft_is_sampled_by_the_policy_that_sft_has_made(tiny_run):
    watch, engine = Watch(), Calls()
    data = AHEAD | {"engine": engine}
    tiny_run(StageTransition(after_epochs=2), watch, data=data, trainer={"max_epochs": 5}).fit()
    assert watch.versions == [4, 4, 4, 4, 6, 6]
    assert engine.threads[0] == "MainThread"
    assert len(engine.threads) == 3


CRITIC = {"advantage": GAE(), "critic": CriticConfig("own")}


@pytest.mark.parametrize("module", [{}, CRITIC], ids=["told", "scored"])
def test_what_is_sampled_ahead_is_what_those_weights_sample(tiny_run, module):
    """Tokens, log-probabilities, entropies and values are those of the networks at the start of the phase before."""
    watch, module = Watch(), RL | {"temperature": 0.8} | module
    run = tiny_run(watch, module=module, data=AHEAD, trainer={"max_epochs": 4}).fit()
    collector = run.data.phases.collector
    for number in range(1, 4):
        again = {}
        for age in (0, 1):
            run.module.load_state_dict(watch.weights[number - age])
            collector.num_drawn = 4 * number
            groups = collector.sample_and_grade(run.module, collector.draw_problems(number, 0, 1).prompts).groups
            again[age] = tokens_of(completion for group in groups for completion in group.completions)
            scores = run.module.score(*watch.collections[number].batch[:2])
            rollout = watch.collections[number].batch
            gaps = (
                (scores.logprobs - rollout.old_logprobs).abs().max(),
                (scores.entropies - rollout.entropies).abs().max(),
            )
            assert all(gap < 1e-5 for gap in gaps) if age == 1 else all(gap > 1e-3 for gap in gaps)
        found = tokens_of(watch.collections[number].completions)
        assert found == again[1]
        assert found != again[0]


WAYS = {
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


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_that_stands_still_has_the_same_rollouts_and_losses_either_way(tiny_run, small_model, way):
    chosen = WAYS[way]
    runs = []
    for staleness in (0, 1):
        watch = Watch()
        policy = PolicyConfig(small_model, from_scratch=True, **chosen.get("policy", {}))
        module = RL | STILL | {"policy": policy} | chosen.get("module", {})
        data = {"max_staleness": staleness} | chosen.get("data", {})
        run = tiny_run(watch, module=module, data=data, trainer={"max_epochs": 3} | chosen.get("trainer", {})).fit()
        runs.append((watch, run))
    (off, _), (on, run) = runs
    assert off.losses == on.losses
    assert on.versions != off.versions
    for one, other in zip(off.collections, on.collections, strict=True):
        rollouts_equal(one.batch, other.batch)
        assert tokens_of(one.completions) == tokens_of(other.completions)
        assert [c.text for c in one.completions] == [c.text for c in other.completions]
        assert one.numbers == other.numbers
    if way == "lora":  # the frozen model is there once
        trained = {id(p) for p in run.module.policy.parameters() if p.requires_grad}
        copied = {id(p) for p in run.module._snapshot._networks.policy.parameters()}
        assert not trained & copied
        assert {id(p) for p in run.module.policy.parameters()} - trained <= copied


def test_the_snapshot_is_no_part_of_what_is_trained_or_saved(tiny_run):
    run = tiny_run(module=RL, data=AHEAD).fit()
    assert run.module._snapshot is not None
    assert not [name for name in run.module.state_dict() if "snapshot" in name]
    alone = sum(p.numel() for p in run.module.policy.parameters())
    assert sum(p.numel() for p in run.module.parameters()) == alone


def test_benchmarks_in_between_change_nothing(tiny_run):
    """They sample from the policy in training while the snapshot samples in its thread."""
    ended = []
    for every in (0, 1):
        benchmark = MathBenchmark(every_n_epochs=every, enabled=every > 0)
        data = AHEAD | {"benchmarks": [GeneratedBenchmark(num_problems=8)], "max_prompt_length": 16}
        run = tiny_run(benchmark, module=RL, data=data, trainer={"max_epochs": 4}).fit()
        assert len(benchmark.latest) == every
        ended.append(run.module.state_dict())
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_benchmarks_wait_for_an_engine_that_does_one_thing_at_a_time(tiny_run, is_reentrant):
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


# Bounds


@pytest.mark.parametrize(("staleness", "version"), [(0, 2), (1, 0), (1, 6)])
def test_rollouts_beyond_the_bound_are_refused(tiny_run, staleness, version):
    """In the third phase, which begins after 4 updates, the bound is 4, or 2."""
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


def test_rollouts_of_the_policy_in_sft_are_refused(tiny_run):
    """They are one phase old, and of another stage."""
    run = tiny_run(StageTransition(after_epochs=2), data=AHEAD)
    to_batch = run.module.add_advantages_and_gate
    run.module.add_advantages_and_gate = lambda rollouts, measurements: to_batch(rollouts, measurements)._replace(
        policy_version=2
    )
    with pytest.raises(
        RuntimeError, match=r"after 2 optimizer steps\. In this phase data\.max_staleness allows for 4\."
    ):
        run.fit()


def test_the_first_ratio_is_judged_where_it_can_be(tiny_run, monkeypatch):
    """An engine that samples from other weights is caught in the first collection, which is not stale."""

    class Wrong(TransformersEngine):
        def stream(self, lm, *args, **kwargs):
            for sample in super().stream(lm, *args, **kwargs):
                yield [(i, s._replace(logprobs=[value - 0.5 for value in s.logprobs])) for i, s in sample]

    with pytest.raises(RuntimeError, match="the training forward pass disagrees"):
        tiny_run(module=RL, data=AHEAD | {"engine": Wrong()}).fit()
    watch = Watch()
    tiny_run(watch, module=RL, data=AHEAD).fit()
    assert watch.metrics[1]["policy/ratio_max"] > 1.01  # of the updates before, which the clip counts


def test_sharded_policies_are_refused(repository, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(repository)
    flags = ["--trainer.strategy=fsdp2", "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config=configs/quickstart.yaml", "--data.max_staleness=1", *flags])
    assert ended.value.code == 2
    assert "trainer.strategy fsdp2 each rank holds" in capsys.readouterr().err


# Ends


class Second:
    """A reward that is fine for the first collection, and then does something."""

    def __init__(self, act):
        self.num, self.act = 0, act

    def __call__(self, completions, golds):
        self.num += len(completions)
        if self.num > 16:
            self.act()
        return [float(len(text) % 2) for text in completions]


@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_in_the_thread_ends_the_run_with_that_error(tiny_run, is_late):
    """At the next update, or where the collection is needed."""

    def fail():
        if is_late:
            time.sleep(1.0)
        raise ZeroDivisionError("mine")

    class Wait(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not is_late:
                assert ahead_threads() == []

    run = tiny_run(Wait(), module=RL, data=AHEAD | {"reward": Second(fail), "num_ppo_epochs": 2})
    with pytest.raises(RuntimeError, match=r"data\.reward") as error:
        run.fit()
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert run.trainer.global_step == (4 if is_late else 1)
    assert ahead_threads() == []


class Endless(TransformersEngine):
    """Decodes the second collection for ever."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "begun", threading.Event())

    def stream(self, lm, *args, **kwargs):
        if threading.current_thread().name.startswith("sampling-ahead"):
            self.begun.set()
            while True:
                lm(input_ids=torch.tensor([[1, 2]]))
        yield from super().stream(lm, *args, **kwargs)


def test_a_run_that_ends_early_ends_what_is_sampled_ahead(tiny_run):
    engine = Endless()

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert engine.begun.wait(10)
            raise ZeroDivisionError

    run = tiny_run(Stop(), module=RL, data=AHEAD | {"engine": engine})
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert ahead_threads() == []
    assert run.data.phases.collector.num_drawn == 4  # as if the second had not been begun


def test_a_run_that_is_told_to_stop_does_not_wait_for_what_nobody_needs(tiny_run):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    run = tiny_run(Stop(), module=RL, data=AHEAD | {"engine": Endless()}, trainer={"max_epochs": 9}).fit()
    assert run.trainer.global_step == 2
    assert ahead_threads() == []


# Resuming


def resumable(tiny_run, folder, watch, module, data=AHEAD, **checkpoint):
    save = PhaseCheckpoint(dirpath=folder, save_top_k=-1, **checkpoint)
    trainer = {"max_epochs": 5, "enable_checkpointing": True, "logger": CSVLogger(folder)}
    return tiny_run(StageTransition(after_epochs=1), watch, save, module=module, data=data, trainer=trainer)


@pytest.mark.parametrize(
    ("method", "when"),
    [
        ("egspo", {"every_n_train_steps": 1}),
        ("egspo", {"every_n_epochs": 1}),
        ("ppo", {"every_n_train_steps": 1}),
        ("kl", {"every_n_epochs": 1}),
    ],
)
def test_every_checkpoint_leads_to_the_same_end(tiny_run, tmp_path, method, when):
    module, whole = METHODS[method], Watch()
    run = resumable(tiny_run, tmp_path / "whole", whole, module, **when).fit()
    expected = copy.deepcopy(run.module.state_dict())
    saved = sorted((tmp_path / "whole").glob("epoch*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    assert len(saved) == (10 if "every_n_train_steps" in when else 5)
    num_with_pending = 0
    for path in saved[:-1]:
        watch = Watch()
        rest = resumable(tiny_run, tmp_path / path.stem, watch, module, every_n_epochs=1)
        torch.manual_seed(99)
        rest.fit(ckpt_path=path, weights_only=True)
        assert all(torch.equal(value, expected[name]) for name, value in rest.module.state_dict().items()), path.stem
        assert watch.losses == {key: value for key, value in whole.losses.items() if key in watch.losses}
        assert watch.versions == whole.versions[-len(watch.versions) :]
        num_with_pending += "ahead" in torch.load(path, weights_only=True)["HybridDataModule"]
    assert num_with_pending == (6 if "every_n_train_steps" in when else 3)  # in phases 2 to 4 of 5, of two updates


def test_guards_go_on_where_no_first_ratio_was_logged(tiny_run, tmp_path):
    """A resumed run has the metrics of its own phases alone."""
    resumable(tiny_run, tmp_path / "whole", Watch(), {}, every_n_epochs=1).fit()
    path = next((tmp_path / "whole").glob("epoch=2-*.ckpt"))
    run = resumable(tiny_run, tmp_path / "rest", Guards(), {}, every_n_epochs=1).fit(ckpt_path=path, weights_only=True)
    assert run.trainer.callback_metrics["guard/ratio_after_sampling"] == 0
    assert "policy/first_ratio_gap" not in run.trainer.callback_metrics


def test_rollouts_ahead_of_a_checkpoint_are_sampled_anew_where_staleness_is_not_wanted_any_more(tiny_run, tmp_path):
    resumable(tiny_run, tmp_path / "whole", Watch(), {}, every_n_epochs=1).fit()
    path = next((tmp_path / "whole").glob("epoch=2-*.ckpt"))
    assert "ahead" in torch.load(path, weights_only=True)["HybridDataModule"]
    watch = Watch()
    run = resumable(tiny_run, tmp_path / "rest", watch, {}, data={}, every_n_epochs=1)
    run.fit(ckpt_path=path, weights_only=True)
    assert watch.versions == [6, 6, 8, 8]
    assert run.data.phases.collector.num_drawn == 4 * 4  # each problem once, none left out


# Ranks


@pytest.mark.slow
def test_the_quickstart_in_short_form_learns(run_ranks, tmp_path):
    """From SFT on, as in the quickstart itself."""
    quickstart = ["--data.max_staleness=1", *SHORT_QUICKSTART]
    rows = run_ranks(tmp_path, {"quickstart": quickstart}, num_ranks=1)["quickstart"]
    accuracy = [float(row["eval/arithmetic/avg@1"]) for row in rows if row.get("eval/arithmetic/avg@1")]
    assert accuracy[0] < 0.05 < accuracy[1] + 0.08 < accuracy[2]
    staleness = [float(row["rollout/staleness"]) for row in rows if row["rollout/staleness"]]
    assert len(staleness) > 40
    assert staleness == [0.0, *[4.0] * (len(staleness) - 1)]


@pytest.mark.slow
def test_two_ranks_are_one_process(run_ranks, tmp_path):
    runs = {"ahead": ["--data.max_staleness=1", "--trainer.max_epochs=6"]}
    alone = run_ranks(tmp_path / "one", runs, num_ranks=1)["ahead"]
    ranks = run_ranks(tmp_path / "two", {"ahead": [*runs["ahead"], "--trainer.strategy=ddp", "--trainer.devices=2"]})
    assert told_apart(ranks["ahead"], alone) > 100
    assert [row["rollout/staleness"] for row in alone if row["rollout/staleness"]] == ["0.0", *["4.0"] * 4]
