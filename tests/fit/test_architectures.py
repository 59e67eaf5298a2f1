"""Tiny random models of many architectures: right from SFT to the first rollout batch, or refused by name at the start.

transformers decides what they compute, so another version of it may move an architecture from one list to the other.
"""

import shutil
from pathlib import Path

import pytest
import torch

from architectures import tiny_config
from egspo_lightning.callbacks.stage_transition import StageTransition
from egspo_lightning.data.generated_sources import GeneratedDemonstrations
from egspo_lightning.data.sources import FiniteProblems
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.errors import UserError
from egspo_lightning.models.policy_config import PolicyConfig
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
