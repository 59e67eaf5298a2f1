"""VLLMEngine without vLLM: refused settings and the installation message. tests/vllm runs vLLM itself."""

from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning.cli.main import run
from egspo_lightning.errors import UserError
from egspo_lightning.models.lora import LoraConfig, zero_factors
from egspo_lightning.models.lora_merge import merged
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rollout import vllm_engine
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.rollout.vllm_engine import VLLMEngine, stable_seed
from egspo_lightning.rollout.vllm_process import start_vllm


def test_missing_vllm_error_says_what_to_install(monkeypatch, repository):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    arguments = ["fit", "--config=configs/quickstart.yaml", f"--data.engine={VLLMEngine.__module__}.VLLMEngine"]
    with pytest.raises(UserError, match=r'not installed: pip install "egspo-lightning\[vllm\]"'):
        run(arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("kv_cache_gib", 0.0),
        ("kv_cache_gib", "inf"),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
    ],
)
def test_parser_refuses_out_of_range_vllm_settings(field, value):
    with pytest.raises(ArgumentError, match=rf"{field}(.|\n)* {value}"):
        engine_parser().parse_args([f"--engine.{field}={value}"])


def test_parser_accepts_vllm_settings_within_range():
    arguments = ["--engine.gpu_memory_utilization=1.0", "--engine.kv_cache_gib=0.5", "--engine.max_model_len=2"]
    assert engine_parser().parse_args(arguments).engine.max_num_seqs == 256


def engine_parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VLLMEngine, "engine")
    return parser


def test_vllm_with_several_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match="one process as yet, and this run has 4"):
        start_vllm(None, torch.device("cpu"), {})


def test_vllm_on_another_gpu_than_the_first_is_refused():
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        start_vllm(None, torch.device("cuda:1"), {})


def test_stable_seed_is_a_fixed_hash():
    assert stable_seed("abc") == 0xBA7816BF8F01CFEA >> 1  # FIPS 180-2, appendix B.1: SHA-256 of "abc"


@pytest.mark.parametrize(("targets", "num_missing"), [(["q_proj"], 1), (["q_proj", "embed_tokens"], 0)])
def test_copied_weights_are_merged_and_untied_from_an_adapted_embedding(monkeypatch, tiny_model, targets, num_missing):
    """vLLM ties the output layer by the config, and takes no weights for it then."""
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: True)
    lm = PolicyConfig(tiny_model, from_scratch=True, lora=LoraConfig(rank=2, target_modules=targets)).build().lm
    factor = zero_factors(lm).popitem()[1]
    torch.nn.init.normal_(factor)
    taken = {}
    model = SimpleNamespace(load_weights=lambda weights: taken.update(weights), named_parameters=dict)
    VLLMEngine().copy_weights(SimpleNamespace(model=model), lm)
    expected = merged(lm, lm.state_dict())
    assert len(expected) - len(taken) == num_missing
    assert lm.config.tie_word_embeddings == (num_missing == 1)
    assert all(torch.equal(value, expected[name]) for name, value in taken.items())


def test_run_closes_its_engine(tiny_run):
    class Closing(TransformersEngine):
        closed = 0

        def close(self):
            Closing.closed += 1

    tiny_run(data={"engine": Closing()}, module={"initial_stage": "egspo"}, trainer={"max_epochs": 1}).fit()
    assert Closing.closed == 1
