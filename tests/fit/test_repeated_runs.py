"""Trainer functions one after another, with the same module, datamodule or callbacks."""

import copy
import json
import shutil

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from egspo_lightning import Guards, MathBenchmark, StageTransition
from egspo_lightning.callbacks.phase_checkpoint import PhaseCheckpoint
from egspo_lightning.data.dataset_sources import DatasetProblems
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.estimators import GAE, GroupRelative
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.schedules import ChordMu
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward
from spies import RL

BENCHMARKS = {"benchmarks": [GeneratedBenchmark("sums", num_problems=4)], "max_prompt_length": 12}
BETA = {"objective": Objective(beta=0.1)}
SHARDED = {"strategy": "fsdp2", "devices": 1}
STATEFUL = {
    "objective": Objective(mu=ChordMu(warmup_steps=1, decay_steps=8)),
    "gate": QuantileGate(running_decay=0.5),
    "kl_reward": KLReward(coefficient=0.1, target=0.01, horizon=16),
    "entropy_bonus": EntropyBonus(0.01, target=1.0),
    "advantage": GroupRelative(scale_by_std=False),
}
"""Settings whose parts keep state between rollout batches."""


class Losses(Callback):
    """Records stage and loss of each micro-batch, and the metrics of each phase but for times."""

    def __init__(self):
        self.losses, self.metrics = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert all(network.training for network in pl_module.networks.trained)  # or activations are not recomputed
        self.losses.append((str(batch.stage), float(outputs["loss"])))

    def on_train_epoch_end(self, trainer, pl_module):
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.metrics.append({n: v for n, v in found.items() if not n.startswith("time/") and "per_second" not in n})


class Failure(Callback):
    """Ends an evaluation, and a run between the two micro-batches of an optimizer step of its third phase."""

    def on_test_batch_end(self, *args):
        raise RuntimeError("ended by the test")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2:
            raise RuntimeError("ended by the test")


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture
def with_weights(small_model, tmp_path):
    """The small model with saved weights."""
    folder = tmp_path / "with_weights"
    shutil.copytree(small_model, folder)
    torch.manual_seed(5)
    PolicyConfig(small_model, from_scratch=True).build().lm.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(with_weights):
    """Settings of a full model, or of one with adapters."""
    return lambda is_adapted: {"policy": PolicyConfig(with_weights, lora=LoraConfig(rank=4) if is_adapted else None)}


@pytest.mark.parametrize(
    ("is_adapted", "module", "flags"),
    [
        (True, BETA, {}),
        (True, BETA | RL, {}),
        (False, BETA, {}),
        (False, {"advantage": GAE(), "critic": CriticConfig("shared")}, {}),
        (False, {"advantage": GAE(), "critic": CriticConfig("own")}, {}),
        (False, BETA | {"advantage": GAE(), "critic": CriticConfig("own")}, SHARDED),
    ],
    ids=["lora", "lora_without_sft", "reference", "value_head", "critic", "sharded"],
)
def test_evaluation_before_fit_does_not_change_the_run(tiny_run, policy, tmp_path, is_adapted, module, flags):
    (tmp_path / "problems.jsonl").write_text(json.dumps({"id": "1", "problem": "1+2=?", "answer": "3"}))
    data = BENCHMARKS | {"problems": DatasetProblems(str(tmp_path / "problems.jsonl")), "num_minibatches": 1}
    spies = []
    for is_evaluated in (False, True):
        spies.append(Losses())
        run = tiny_run(
            StageTransition(save_checkpoint=False),
            spies[-1],
            module=policy(is_adapted) | module,
            data=data,
            trainer=flags,
        )
        if is_evaluated:
            run.trainer.test(run.module, run.data)
            with pytest.raises(RuntimeError, match="ended by the test"):
                tiny_run(Failure(), trainer=flags).trainer.test(run.module, run.data)
            run.trainer.predict(run.module, run.data)
        run.fit()
    assert spies[1].losses == spies[0].losses
    if module.get("objective"):
        first_of_egspo = next(metrics for metrics in spies[1].metrics if metrics["stage"] == 1)
        assert first_of_egspo["loss/kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("is_adapted", "module", "more", "ends_early"),
    [
        (False, STATEFUL, {}, False),
        (False, STATEFUL | RL, {}, True),
        (False, RL, {"data": {"max_staleness": 1}}, False),
        (True, BETA | RL, {}, False),
        (True, BETA, {}, False),
        (False, BETA, {"trainer": SHARDED}, False),
    ],
    ids=["stateful", "after_an_error", "ahead", "lora_without_sft", "lora", "sharded"],
)
def test_second_fit_equals_a_fresh_run_from_the_same_weights(tiny_run, policy, is_adapted, module, more, ends_early):
    def run(*callbacks):
        settings = {"data": BENCHMARKS | more.get("data", {})}
        settings["trainer"] = {"accumulate_grad_batches": 2, "max_epochs": 4} | more.get("trainer", {})
        return tiny_run(*callbacks, module=policy(is_adapted) | copy.deepcopy(module), **settings)

    def callbacks():
        stages = StageTransition(after_epochs=2, save_checkpoint=False)
        return stages, Guards(num_zero_rewards=1), MathBenchmark(every_n_epochs=2)

    used = callbacks()
    first = run(*used, *[Failure()] * ends_early)
    if ends_early:
        with pytest.raises(RuntimeError, match="ended by the test"):
            first.fit()
    else:
        first.fit()
        first.trainer.test(first.module, first.data)
    weights = {name: _whole(value).clone() for name, value in first.module.policy.state_dict().items()}
    again, anew = Losses(), Losses()
    run(*used, again)._replace(module=first.module, data=first.data).fit()
    fresh = run(*callbacks(), anew)
    fresh.module.configure_model()
    fresh.module.policy.load_state_dict(weights)
    fresh.fit()
    assert again.losses == anew.losses
    is_sharded = more.get("trainer") == SHARDED  # also networks that were built without a trainer
    assert all(isinstance(network, FSDPModule) == is_sharded for network in fresh.module.networks.trained)
    for ours, theirs in zip(again.metrics, anew.metrics, strict=True):
        assert ours == pytest.approx(theirs, nan_ok=True)


def test_second_fit_of_a_trainer_continues_its_run(tiny_run):
    """Lightning counts epochs and steps on; the optimizer starts anew, at the learning rate of the stage."""
    module, metrics = {"objective": Objective(mu=ChordMu(warmup_steps=1, decay_steps=8))}, []
    for ends in ([4], [2, 4]):
        spy = Losses()
        run = tiny_run(StageTransition(learning_rate=1e-3), spy, module=module)
        for run.trainer.fit_loop.max_epochs in ends:
            run.fit()
        metrics.append([[phase.get(name) for name in ("stage", "policy/mu")] for phase in spy.metrics])
        assert run.data.phases.num_rollout_batches == 3
        assert run.trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert metrics[1] == metrics[0]


def test_data_is_encoded_again_for_another_tokenizer(tiny_run, small_model, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(small_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (7 * i + 3) % 256 for token, i in vocabulary.items() if i < 256}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    first, again, anew = tiny_run(StageTransition()).fit(), Losses(), Losses()
    settings = {"module": {"policy": PolicyConfig(str(folder), from_scratch=True)}}
    reused = tiny_run(StageTransition(), again, **settings)._replace(data=first.data).fit()
    tokenizer = reused.module.tokenizer
    for item in reused.data.phases.pool.demonstrations:
        text = tokenizer.decode(item.completion_ids, skip_special_tokens=True)
        assert text == item.demonstration.solution
    tiny_run(StageTransition(), anew, **settings).fit()
    assert again.losses == anew.losses


def test_a_checkpoint_callback_of_an_earlier_run_saves_this_runs_weights(tiny_run, tmp_path):
    checkpoint = PhaseCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    for seed in (1, 2):
        flags = {"enable_checkpointing": True, "max_epochs": 1}
        run = tiny_run(checkpoint, module=RL, data={"seed": seed}, trainer=flags).fit()
        for path in (checkpoint.last_model_path, checkpoint.best_model_path):
            saved = torch.load(path, weights_only=True)["state_dict"]
            for name, weights in run.module.state_dict().items():
                assert torch.equal(saved[name], weights), (seed, path, name)
