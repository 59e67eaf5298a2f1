"""Merged LoRA adapters compared with the adapted model, for every kind of layer; what cannot be merged is refused."""

import re
import shutil

import pytest
import torch
from peft.tuners.lora import Embedding
from transformers import AutoModelForCausalLM

from architectures import tiny_config
from egspo_lightning import HFExport, StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.models import lora
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.lora_merge import merged, require_mergeable
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.objective import Objective

EXPERTS = ["gate_proj", "up_proj", "down_proj"]  # peft's names of layers that transformers has fused
CASES = {
    "llama": ("llama", False, LoraConfig(rank=2, alpha=3.0)),
    "rank-stabilized": ("llama", True, LoraConfig(rank=3, alpha=3.0, rank_stabilized=True)),
    "embedding": ("llama", False, LoraConfig(rank=2, target_modules=["q_proj", "embed_tokens"])),
    "tied embedding": ("llama", True, LoraConfig(rank=2, target_modules=["q_proj", "embed_tokens"])),
    "scaled embedding": ("gemma3_text", True, LoraConfig(rank=2, target_modules=["embed_tokens"])),
    "Conv1D": ("gpt2", True, LoraConfig(rank=2)),
    "positions": ("gpt2", True, LoraConfig(rank=2, target_modules=["wte", "wpe", "c_fc"])),
    "experts": ("qwen3_moe", False, LoraConfig(rank=2)),
    "tied experts": ("qwen3_moe", True, LoraConfig(rank=2, target_modules=["embed_tokens", "v_proj", *EXPERTS])),
    "experts unknown to peft": ("gpt_oss", False, LoraConfig(rank=2)),
}
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def config_of(repository, tmp_path):
    """The policy config of a tiny architecture, from a folder with its config and tokenizer."""

    def build(model_type, *, is_tied=False, **policy):
        folder = shutil.copytree(repository / "configs" / "tiny_model", tmp_path / "model")
        config = tiny_config(model_type)
        config.tie_word_embeddings = is_tied
        config.save_pretrained(folder)
        return PolicyConfig(str(folder), from_scratch=True, **policy)

    return build


@torch.no_grad()
def randomize(lm):
    for name, parameter in lm.named_parameters():
        if lora.is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def logits_of(lm):
    return lm.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_reloads_in_transformers_and_equals_the_adapted_one(config_of, tmp_path, case):
    model_type, is_tied, adapters = CASES[case]
    config = config_of(model_type, is_tied=is_tied, lora=adapters)
    lm = config.build(with_reference=True).lm
    before = logits_of(lm)
    randomize(lm)
    expected, state = logits_of(lm), {name: value.clone() for name, value in lm.state_dict().items()}
    weights = merged(lm, lm.state_dict())
    plain = AutoModelForCausalLM.from_config(tiny_config(model_type)).state_dict()
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in plain.items()}
    assert all(torch.equal(value, state[name]) for name, value in lm.state_dict().items())
    lm.save_pretrained(tmp_path / "hf", state_dict=weights)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits_of(exported), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.02
    is_untied = exported.get_output_embeddings().weight is not exported.get_input_embeddings().weight
    assert is_untied == (not is_tied or isinstance(lm.get_input_embeddings(), lora._layer_type()))


@pytest.mark.parametrize("case", ["llama", "tied embedding", "Conv1D", "experts"])
def test_half_precision_weights_are_merged_in_float32_and_rounded_once(config_of, case):
    model_type, is_tied, adapters = CASES[case]
    lm = config_of(model_type, is_tied=is_tied, lora=adapters, dtype="bfloat16").build().lm
    randomize(lm)
    state = lm.state_dict()
    assert {value.dtype for name, value in state.items() if lora.is_adapter(name)} == {torch.float32}
    rounded = merged(lm, state)
    exact = merged(lm, {name: value.float() for name, value in state.items()})
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in rounded.items())
    is_rounded = [not torch.equal(value, value.bfloat16().float()) for value in exact.values()]
    assert sum(is_rounded) == len(lora.adapted_layers(lm))


@pytest.mark.parametrize("case", ["tied embedding", "positions", "tied experts"])
def test_the_reference_copies_every_kind_of_adapter(config_of, case):
    model_type, is_tied, adapters = CASES[case]
    lm = config_of(model_type, is_tied=is_tied, lora=adapters).build(with_reference=True).lm
    base = logits_of(lm)
    randomize(lm)
    trained = logits_of(lm)
    lora.copy_to_reference(lm)
    for factor in lora.zero_factors(lm).values():
        torch.nn.init.zeros_(factor)
    assert torch.equal(logits_of(lm), base)
    with lora.as_reference(lm):
        assert torch.equal(logits_of(lm), trained)


# Runs


@pytest.mark.parametrize("case", ["experts", "tied embedding"])
def test_training_moves_every_adapter_and_exports_the_trained_model(tiny_run, config_of, tmp_path, case):
    model_type, is_tied, adapters = CASES[case]
    config = config_of(model_type, is_tied=is_tied, lora=adapters)
    run = tiny_run(
        StageTransition(after_epochs=1, save_checkpoint=False),
        HFExport(folder=str(tmp_path / "hf")),
        module={"policy": config, "objective": Objective(beta=0.01)},
        trainer={"max_epochs": 2},
    )
    run.module.configure_model()
    before = {name: p.detach().clone() for name, p in run.module.policy.lm.named_parameters()}
    lm = run.fit().module.policy.lm
    moved = {name for name, p in lm.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if lora.is_adapter(name)}  # the reference's by the copy after SFT
    assert run.trainer.callback_metrics["policy/first_ratio_gap"] < 1e-3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits_of(exported), logits_of(lm), atol=1e-5, rtol=1e-5)


# Refusals, before training


@pytest.mark.parametrize(
    ("model_type", "targets", "message"),
    [
        ("jamba", None, r"JambaForCausalLM, adapters of 'dt_proj' have no effect.*\[.*in_proj, k_proj.*x_proj\]"),
        ("phimoe", None, r"'router' fail with AttributeError.*\[k_proj, o_proj, q_proj, v_proj\]"),
        ("mamba", None, r"'out_proj' is incompatible with Mamba.*weight matrix: \[dt_proj, embeddings, in_proj"),
        ("opt", ["embed_positions", "fc1"], r"'embed_positions' fail with RuntimeError.*\[fc1\]"),
        ("qwen3_moe", ["gate_proj"], r"gate_proj without also targeting up_proj"),
        ("llama", ["norm"], r"target_modules: .*RMSNorm.* is not supported"),
        ("llama", ["q_proj", "wq", "qkv"], r"no layers named \['wq', 'qkv'\]"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_layers_that_remain(config_of, model_type, targets, message):
    with pytest.raises(UserError, match=r"^model\.policy\.lora\.target_modules: ") as caught:
        config_of(model_type, lora=LoraConfig(rank=2, target_modules=targets)).build()
    assert re.search(message, str(caught.value)), caught.value


def test_a_merge_that_computes_something_else_is_refused(config_of, monkeypatch):
    computed = Embedding.get_delta_weight
    monkeypatch.setattr(Embedding, "get_delta_weight", lambda self, adapter: 2 * computed(self, adapter))
    with pytest.raises(UserError, match=r"adapters of 'embed_tokens' compute something else.*are \[v_proj\]"):
        config_of("llama", lora=LoraConfig(target_modules=["v_proj", "embed_tokens"])).build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_changes_no_weight_no_mode_and_no_random_state(dtype):
    lm = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=dtype)
    LoraConfig(rank=2).inject(lm, with_reference=True)
    state, generator = {name: value.clone() for name, value in lm.state_dict().items()}, torch.get_rng_state()
    require_mergeable(lm)
    assert all(torch.equal(value, state[name]) for name, value in lm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert lm.training


def test_adapters_of_fused_experts_are_not_sampled_ahead(tiny_run, config_of):
    config = config_of("qwen3_moe", lora=LoraConfig(rank=2))
    run = tiny_run(module={"policy": config}, data={"max_staleness": 1})
    with pytest.raises(UserError, match=r"data\.max_staleness = 1 .*fused experts.*target_modules"):
        run.fit()
    assert run.trainer.global_step == 0
