"""Tiny random models of many architectures: right from SFT to the first rollout batch, or refused by name at the start.

transformers decides what they compute, so another version of it may move an architecture from one list to the other.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import EOS, PAD, tiny_config
from egspo_lightning.callbacks.stage_transition import StageTransition
from egspo_lightning.data.generated_sources import GeneratedDemonstrations
from egspo_lightning.data.sources import FiniteProblems
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.errors import UserError
from egspo_lightning.models import batched_forward
from egspo_lightning.models.policy import Policy
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.batching import pad_right
from egspo_lightning.types import Problem

REPOSITORY = Path(__file__).parents[2]
# fmt: off
IN_LOOP = [
    "afmoe", "apertus", "arcee", "bitnet", "bloom", "codegen", "cwm", "deepseek_v2", "deepseek_v3", "diffllama",
    "doge", "ernie4_5", "exaone4", "falcon", "gemma", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama",
    "llama4_text", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
]
"""Decoded by the engine's loop."""
PACKED = [
    "afmoe", "apertus", "arcee", "bitnet", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "gemma",
    "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
]
"""Those in whose passes a prompt stands once."""
BY_GENERATE = [
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "minimax", "nemotron_h", "olmo_hybrid", "openai-gpt", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
]
"""Decoded by transformers' generate."""
# fmt: on
REFUSED = {
    "gemma2": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping",
    "cohere": "logit_scale",
    "minicpm3": "logits_scaling",
    "bert": "changes its logits after the output layer",
    "bert-generation": "the engine gives log-probabilities",  # tokens see later ones
    "cpmant": "the engine gives log-probabilities",
    "xlm": "the engine gives log-probabilities",
    "rwkv": "the engine gives log-probabilities",  # transformers mixes up the states of rows
    "moshi": "the engine gives log-probabilities",  # the window is kept with a cache alone
    "xlstm": "the engine gives log-probabilities",  # computes in bfloat16
}
"""Architecture to a part of the message."""


class Sums(FiniteProblems):
    """Problems whose prompts have different lengths."""

    def load(self):
        return [Problem(str(i), f"{10**i}+1=?", str(10**i + 1)) for i in range(4)]


@pytest.fixture
def run_of(tiny_run, tmp_path):
    """Builds a run of one step of SFT and one rollout batch."""

    def build(model_type):
        folder = shutil.copytree(REPOSITORY / "configs" / "tiny_model", tmp_path / "model")
        tiny_config(model_type).save_pretrained(folder)
        demonstrations = GeneratedDemonstrations(num_demonstrations=8, task=ArithmeticTask(num_digits=1))
        data = {"demonstrations": demonstrations, "problems": Sums(), "sft_batch_size": 8, "num_minibatches": 1}
        return tiny_run(
            StageTransition(save_checkpoint=False),
            module={"policy": PolicyConfig(str(folder), from_scratch=True)},
            data=data,
            trainer={"max_epochs": 2},
        )

    return build


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*IN_LOOP, *BY_GENERATE])
def test_a_supported_architecture_is_sampled_from_as_it_is_trained(run_of, model_type):
    run = run_of(model_type).fit()
    assert run.trainer.global_step == 2
    assert torch.isfinite(run.trainer.callback_metrics["loss/total"])
    assert run.trainer.callback_metrics["policy/first_ratio_gap"] < 1e-3


@pytest.mark.parametrize("model_type", PACKED)
def test_a_shared_prompt_changes_neither_log_probabilities_nor_gradients(model_type, monkeypatch):
    """Prompts of 10, 14 and 3 tokens and windows of 8, where the config has them."""
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 4)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(3)  # attention then matters
    policy = Policy(lm)
    assert policy.passes.shares_prompts
    draw = lambda number: torch.randint(EOS, (number,)).tolist()  # noqa: E731
    prompts = {10: [20, 13, 7], 14: [9, 9], 3: [12, 1]}
    ids, mask = pad_right([(p, draw(n)) for p, ns in ((draw(k), ns) for k, ns in prompts.items()) for n in ns], PAD)
    found = []
    for shares in (True, False):
        policy.passes.shares_prompts = shares
        logprobs = policy(ids, mask).logprobs
        loss = (logprobs * torch.linspace(0.5, 1.5, logprobs.numel()).view_as(logprobs)).sum()
        trained = [p for p in lm.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        found.append((logprobs, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])))
    (shared, gradient), (apart, other) = found
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)
    assert (gradient - other).norm() < 1e-5 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_an_unsupported_architecture_is_refused_by_name_before_a_step(run_of, model_type, reason):
    run = run_of(model_type)
    with pytest.raises(UserError, match=r"model\.policy\.name_or_path") as caught:
        run.fit()
    assert reason in str(caught.value)
    assert run.trainer.global_step == 0


def test_the_guide_names_every_checked_architecture():
    guide = (REPOSITORY / "docs" / "guides" / "models.md").read_text(encoding="utf-8")
    assert [name for name in [*IN_LOOP, *BY_GENERATE, *REFUSED] if f"`{name}`" not in guide] == []
