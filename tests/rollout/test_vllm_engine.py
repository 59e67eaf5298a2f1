"""VLLMEngine without vLLM: refused settings and the installation message. tests/vllm runs vLLM itself."""

import os
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning.cli.main import run
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.models.lora import LoraConfig, zero_factors
from egspo_lightning.models.lora_merge import merged
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rollout import vllm_engine
from egspo_lightning.rollout.engine import stream_samples
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.rollout.vllm_process import Running, launched, start_vllm
from egspo_lightning.rollout.vllm_requests import stable_seed
from egspo_lightning.types import Sampling


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
        ("tensor_parallel_size", 0),
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


GROUPS = {
    "one rank": (2, 1, 0, "must be 1, or a divisor of the number of ranks, 1, which trainer.devices sets, got 2"),
    "other ranks": (2, 3, 0, "must be 1, or a divisor of the number of ranks, 3, which trainer.devices sets, got 2"),
    "heads": (4, 4, 0, "must be 1, or a divisor of the model's number of attention heads, 2, got 4"),
    "ahead": (2, 2, 1, "data.max_staleness = 1 .* Set max_staleness to 0, or tensor_parallel_size to 1"),
}
"""Tensor parallel size, number of ranks, max_staleness, refusal."""


@pytest.mark.parametrize("case", GROUPS)
def test_tensor_parallel_groups_that_do_not_fit_are_refused_before_data_are_read(monkeypatch, tiny_run, case):
    size, num_ranks, max_staleness, message = GROUPS[case]
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: True)
    run = tiny_run(data={"engine": VLLMEngine(tensor_parallel_size=size), "max_staleness": max_staleness})
    monkeypatch.setattr(type(run.trainer), "world_size", num_ranks)
    monkeypatch.setattr(run.data.answerer, "load", lambda encoder: pytest.fail("data were read"))
    with pytest.raises(UserError, match=message):
        run.fit()


def test_evaluation_refuses_groups_too_but_samples_nothing_ahead(monkeypatch, tiny_run):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: True)
    benchmarks = [GeneratedBenchmark(num_problems=4, task=ArithmeticTask(num_digits=1))]
    run = tiny_run(data={"engine": VLLMEngine(tensor_parallel_size=2), "benchmarks": benchmarks})
    with pytest.raises(UserError, match="a divisor of the number of ranks, 1"):
        run.trainer.validate(run.module, run.data, verbose=False)
    engine = VLLMEngine(tensor_parallel_size=3)
    engine.require_run(num_ranks=6, num_heads=3, max_staleness=0)
    VLLMEngine().require_run(num_ranks=2, num_heads=3, max_staleness=1)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_vllm_gets_rank_and_device_and_the_environment_is_restored(monkeypatch, group):
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.delenv("RANK", raising=False)
    with launched(torch.device("cuda:3")):
        assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("0", "3")
    assert (os.environ.get("RANK"), os.environ["LOCAL_RANK"]) == (None, "7")


def test_closing_vllm_keeps_the_process_group_of_the_trainer(group):
    def shut_down():
        torch.distributed.destroy_process_group(own)
        torch.distributed.destroy_process_group()

    own = torch.distributed.new_group([0])
    core = SimpleNamespace(shutdown=shut_down)
    Running(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), owns_group=False).close()
    assert torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="not registered"):
        torch.distributed.get_rank(own)


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


class Recording(TransformersEngine):
    """Records the calls of an engine that has to be started and closed."""

    def __init__(self):
        super().__init__(max_batch_size=64)
        self.calls = []

    def start(self, lm):
        assert not lm.training
        self.calls.append("start")

    def stream(self, lm, requests, *args, **kwargs):
        self.calls.append(len(requests))
        yield from super().stream(lm, requests, *args, **kwargs) if requests else ()

    def close(self):
        self.calls.append("close")


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_run_starts_its_engine_before_training_and_closes_it(tiny_run, max_staleness):
    engine = Recording()
    data = {"engine": engine, "max_staleness": max_staleness}
    tiny_run(data=data, module={"initial_stage": "egspo"}, trainer={"max_epochs": 2}).fit()
    assert engine.calls == ["start", 16, 16, "close"]


def test_evaluation_starts_its_engine_before_it_samples(tiny_run):
    engine = Recording()
    benchmarks = [GeneratedBenchmark(num_problems=4, task=ArithmeticTask(num_digits=1))]
    run = tiny_run(data={"engine": engine, "benchmarks": benchmarks})
    run.trainer.validate(run.module, run.data, verbose=False)
    assert engine.calls == ["start", 4, "close"]


def test_an_error_of_the_run_closes_its_engine(tiny_run):
    engine, data = Recording(), {"reward": lambda completions, golds: 1 / 0}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tiny_run(data={"engine": engine, **data}, module={"initial_stage": "egspo"}).fit()
    assert engine.calls == ["start", 16, "close"]


@pytest.mark.parametrize("takes_shards", [False, True])
def test_an_engine_that_takes_shards_is_called_without_requests(tiny_run, takes_shards):
    """Other ranks have requests, and wait for this one's part in the copy of the weights."""
    engine = Recording()
    engine.takes_shards = takes_shards
    run = tiny_run(trainer={"max_epochs": 1}).fit()
    assert list(stream_samples(run.module, engine, [], 4, Sampling(3))) == []
    assert engine.calls == ([0] if takes_shards else [])
