"""LoRA adapters compared with the plain model: forward, training, reference, checkpoints and export."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from egspo_lightning import HFExport, StageTransition
from egspo_lightning.callbacks.phase_checkpoint import PhaseCheckpoint
from egspo_lightning.errors import UserError
from egspo_lightning.models import lora
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.lora_merge import merged
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.estimators import GAE, GroupRelative
from egspo_lightning.ops.objective import Objective
from egspo_lightning.training.adaptive_coefficients import KLReward

SFT_LOSS = "loss/sft"


@pytest.fixture(scope="session")
def with_weights(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model with saved weights."""
    folder = tmp_path_factory.mktemp("with_weights") / "model"
    shutil.copytree(small_model, folder)
    torch.manual_seed(5)
    PolicyConfig(small_model, from_scratch=True).build().lm.save_pretrained(folder)
    return str(folder)


def batch():
    torch.manual_seed(1)
    input_ids = torch.randint(250, (4, 9))
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, 4:8] = True
    return input_ids, mask


def layers(lm):
    return lora.adapted_layers(lm)


def test_new_adapters_do_not_change_the_output(with_weights):
    plain, adapted = PolicyConfig(with_weights).build(), PolicyConfig(with_weights, lora=LoraConfig(rank=4)).build()
    assert torch.equal(plain(*batch()).logprobs, adapted(*batch()).logprobs)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert len(layers(adapted.lm)) == 7  # linear layers of the only block, without the output layer


def test_full_rank_adapter_step_equals_full_fine_tuning_step(with_weights):
    """With A = I, alpha = r and B = 0, the gradient of B is that of W, so one SGD step changes W + B A like W."""
    names = ["q_proj", "down_proj"]
    plain = PolicyConfig(with_weights).build()
    rank = 64  # at least the inputs of either layer
    adapted = PolicyConfig(with_weights, lora=LoraConfig(rank=rank, alpha=rank, target_modules=names)).build()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(any(f"{n}.weight" in name for n in names))
    for layer in layers(adapted.lm).values():
        torch.nn.init.eye_(layer.lora_A["default"].weight)
    before = plain(*batch()).logprobs
    for policy in (plain, adapted):
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
        (-policy(*batch()).logprobs.sum()).backward()
        optimizer.step()
    after = plain(*batch()).logprobs
    assert (after - before).abs().max() > 0.05
    assert torch.allclose(adapted(*batch()).logprobs, after, atol=1e-6)


def test_reference_adapter_is_a_frozen_copy(with_weights):
    policy = PolicyConfig(with_weights, lora=LoraConfig(rank=4)).build(with_reference=True)
    plain = PolicyConfig(with_weights).build()(*batch()).logprobs
    with torch.no_grad():
        for layer in layers(policy.lm).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    trained = policy(*batch()).logprobs
    with lora.as_reference(policy.lm):
        assert torch.equal(policy(*batch()).logprobs, plain)
    lora.copy_to_reference(policy.lm)
    with lora.as_reference(policy.lm):
        assert torch.equal(policy(*batch()).logprobs, trained)
    assert torch.equal(policy(*batch()).logprobs, trained)
    assert not any(p.requires_grad for name, p in policy.named_parameters() if lora.is_reference(name))


def test_merged_weights_equal_adapted_model(with_weights):
    policy = PolicyConfig(with_weights, lora=LoraConfig(rank=4, alpha=3.0, rank_stabilized=True)).build()
    for layer in layers(policy.lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    plain = PolicyConfig(with_weights).build()
    before = plain(*batch()).logprobs
    plain.lm.load_state_dict(merged(policy.lm, policy.lm.state_dict()))
    assert torch.allclose(plain(*batch()).logprobs, policy(*batch()).logprobs, atol=1e-5)
    assert not torch.allclose(plain(*batch()).logprobs, before, atol=1e-2)


def test_unknown_or_output_target_modules_are_refused(with_weights):
    for name, message in (("query", "weight matrix: .*q_proj"), ("lm_head", "output layer.*Leave it out")):
        with pytest.raises(UserError, match=f"target_modules.*{message}"):
            PolicyConfig(with_weights, lora=LoraConfig(target_modules=[name])).build()


# Runs


@pytest.fixture
def adapted_run(tiny_run, with_weights):
    """Builds runs with adapters, a reference policy and a checkpoint for each epoch."""

    def build(folder: Path, *, epochs: int = 3, data: dict | None = None, **module):
        policy = PolicyConfig(with_weights, lora=LoraConfig(rank=4))
        return tiny_run(
            StageTransition(after_epochs=1),
            PhaseCheckpoint(dirpath=folder, save_last=True, save_top_k=-1, filename="{epoch}", every_n_epochs=1),
            HFExport(folder=str(folder / "hf")),
            module={"policy": policy, "objective": Objective(beta=0.01)} | module,
            data=data,
            trainer={"enable_checkpointing": True, "max_epochs": epochs},
        )

    return build


@pytest.mark.parametrize(
    ("targets", "critic"),
    [
        (["q_proj", "embed_tokens"], {}),
        (None, {"critic": CriticConfig("shared"), "advantage": GAE()}),
        (["q_proj", "embed_tokens"], {"critic": CriticConfig("own"), "advantage": GAE()}),
    ],
)
def test_checkpoints_hold_only_adapters_and_resume(adapted_run, with_weights, tmp_path, targets, critic):
    arguments = critic | {"policy": PolicyConfig(with_weights, lora=LoraConfig(rank=4, target_modules=targets))}
    straight = adapted_run(tmp_path / "a", **arguments).fit()
    weights = torch.load(tmp_path / "a" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert weights
    assert all(lora.is_adapter(name) or "value_head" in name for name in weights)
    assert any(lora.is_reference(name) for name in weights)
    resumed = adapted_run(tmp_path / "b", **arguments).fit(ckpt_path=tmp_path / "a" / "epoch=1.ckpt", weights_only=True)
    for (name, theirs), ours in zip(straight.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert straight.module.reference is None


def test_reference_adapter_scores_equal_merged_sft_model(adapted_run, tiny_run, with_weights, tmp_path):
    run = adapted_run(tmp_path / "a").fit()
    assert run.trainer.callback_metrics["loss/kl"] > 0
    input_ids, mask = batch()
    scores = run.module.score(input_ids, mask)
    frozen = PolicyConfig(with_weights).build()
    state = torch.load(tmp_path / "a" / "epoch=0.ckpt", weights_only=True)["state_dict"]  # the end of SFT
    adapters = {name.removeprefix("policy.lm."): value for name, value in state.items()}
    base = run.module.policy.lm.state_dict()
    frozen.lm.load_state_dict(merged(run.module.policy.lm, base | adapters))
    assert torch.allclose(scores.ref_logprobs, frozen(input_ids, mask).logprobs, atol=1e-5)
    assert not torch.allclose(scores.ref_logprobs, scores.logprobs, atol=1e-3)


def test_export_is_a_plain_model_with_merged_adapters(adapted_run, with_weights, tmp_path):
    run = adapted_run(tmp_path / "a", epochs=2).fit()
    names = load_file(tmp_path / "a" / "hf" / "model.safetensors").keys()
    assert names == load_file(Path(with_weights) / "model.safetensors").keys()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "hf").eval()
    input_ids, _ = batch()
    with torch.no_grad():
        assert torch.allclose(exported(input_ids).logits, run.module.policy.lm(input_ids).logits, atol=1e-5)


def test_resume_with_another_lora_rank_is_refused(adapted_run, with_weights, tmp_path):
    adapted_run(tmp_path / "a", epochs=2).fit()
    other = adapted_run(tmp_path / "b", policy=PolicyConfig(with_weights, lora=LoraConfig(rank=2)))
    with pytest.raises(UserError, match=r"model\.policy\.lora"):
        other.fit(ckpt_path=tmp_path / "a" / "epoch=1.ckpt", weights_only=True)


# Without SFT, the reference policy is the base model

RL = {"initial_stage": "egspo"}


class WithCopy(EGSPOModule):
    """A module whose reference policy is a separate frozen model."""

    @property
    def networks(self):
        if not hasattr(self, "copied"):
            self.copied = [PolicyConfig(self.policy_config.name_or_path).build().requires_grad_(False)]
        return replace(super().networks, reference=self.copied[0])


class Losses(Callback):
    """Records the loss of every optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


@pytest.mark.parametrize(
    ("module", "data"),
    [
        ({"objective": Objective(beta=1.0)}, {}),
        ({"objective": Objective(beta=1.0)}, {"max_staleness": 1}),
        ({"kl_reward": KLReward(coefficient=1.0), "advantage": GroupRelative(scale_by_std=False)}, {}),
    ],
)
def test_reference_adapter_gives_losses_of_copied_base_model(tiny_run, with_weights, module, data):
    losses = {}
    for reference in ("adapter", "copy"):
        spy = Losses()
        module_arguments = {"policy": PolicyConfig(with_weights, lora=LoraConfig(rank=4))} | RL | module
        run = tiny_run(spy, module=module_arguments, data=data)
        if reference == "copy":
            run = run._replace(module=WithCopy(**module_arguments, optimizer=run.module._optimizer))
        run.fit()
        losses[reference] = spy.values
    assert len(losses["adapter"]) == 6
    assert losses["adapter"] == pytest.approx(losses["copy"], abs=1e-6)
    scores = run.module.score(*batch())
    assert (scores.ref_logprobs - scores.logprobs).abs().max() > 0.1  # the policy has moved away from the reference


@pytest.mark.parametrize("data", [{}, {"max_staleness": 1}])
def test_run_without_sft_resumes_exactly(adapted_run, tmp_path, data):
    straight = adapted_run(tmp_path / "a", data=data, **RL).fit()
    resumed = adapted_run(tmp_path / "b", data=data, **RL)
    resumed.fit(ckpt_path=tmp_path / "a" / "epoch=1.ckpt", weights_only=True)
    for (name, theirs), ours in zip(straight.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for name in ("loss/total", "loss/kl"):
        assert resumed.trainer.callback_metrics[name] == straight.trainer.callback_metrics[name] != 0


def test_resume_of_a_run_without_sft_can_add_the_reference(adapted_run, tmp_path):
    """Also for checkpoints of earlier versions, which held no reference adapter in this case."""
    adapted_run(tmp_path / "a", epochs=2, objective=Objective(), **RL).fit()
    run = adapted_run(tmp_path / "b", **RL).fit(ckpt_path=tmp_path / "a" / "epoch=1.ckpt", weights_only=True)
    assert run.trainer.callback_metrics["loss/kl"] > 0


@pytest.mark.parametrize(("first", "second"), [({}, RL), (RL, {})], ids=["sft", "without_sft"])
@pytest.mark.parametrize("checkpoint", ["epoch=0.ckpt", "epoch=1.ckpt"])
def test_a_resumed_run_keeps_the_checkpoints_reference_whatever_initial_stage_is(
    adapted_run, tmp_path, first, second, checkpoint
):
    """For checkpoints from the end of SFT and from after it."""
    straight = adapted_run(tmp_path / "a", **first).fit()
    resumed = adapted_run(tmp_path / "b", **second)
    resumed.fit(ckpt_path=tmp_path / "a" / checkpoint, weights_only=True)
    for (name, theirs), ours in zip(straight.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("adapters", [None, LoraConfig(rank=4)])
def test_gradient_checkpointing_does_not_change_losses(tiny_run, with_weights, adapters):
    """In SFT and in optimizer steps on rollouts."""
    metrics = []
    for checkpointing in (False, True):
        policy = PolicyConfig(with_weights, lora=adapters, gradient_checkpointing=checkpointing)
        run = tiny_run(StageTransition(after_epochs=1), module={"policy": policy}).fit()
        assert run.module.policy.lm.is_gradient_checkpointing == checkpointing
        metrics.append({name: float(value) for name, value in run.trainer.callback_metrics.items()})
    names = [name for name in metrics[0] if name.startswith(("loss/", "policy/", "rollout/length", "rollout/reward"))]
    assert {"loss/total", "loss/sft", "loss/egspo"} <= set(names)
    for name in names:
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-6), name
