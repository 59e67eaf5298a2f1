"""Test cases for vLLM, each in its own process, because ``vllm.LLM`` changes global state: ``program.py CASE ARGS``.

A case prints one line of JSON, which the test checks.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.cli.main import run
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.types import Sampling

EOS, PAD = [256], 257
LENGTHS = (5, 200)
"""Prompt lengths. A block of vLLM's cache holds 128 tokens on a CPU, so only longer prompts have a cached prefix."""


def model(folder: str, *, tied: bool, seed: int = 0) -> Any:
    """A model whose random weights are so large that other weights sample other tokens."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(lm, seed)
    return lm


@torch.no_grad()
def randomize(lm: Any, seed: int) -> None:
    """Replace all weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.parameters():
        parameter.copy_(parameter.new_empty(parameter.shape).normal_(0.0, 0.3, generator=generator))


def make_requests(num: int = 8) -> list[Request]:
    generator = random.Random(0)
    prompts = [[generator.randrange(200) for _ in range(length)] for length in LENGTHS for _ in range(num // 2)]
    return [Request(prompt, f"stream/{i}") for i, prompt in enumerate(prompts)]


def sample(
    engine: Any, lm: Any, requests: list[Request], sampling: Sampling, eos_ids: Sequence[int] = EOS
) -> list[Any]:
    batches = engine.stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=PAD)
    return [completion for _, completion in sorted(pair for batch in batches for pair in batch)]


@torch.no_grad()
def forward_logprobs(lm: Any, request: Request, token_ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of one forward pass over prompt and completion, without a cache."""
    whole = torch.tensor([[*request.prompt_ids, *token_ids]])
    logits = lm(input_ids=whole, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)


def compare(engine: VLLMEngine, lm: Any, prompts: list[Request] | None = None) -> dict[str, Any]:
    """Compare greedy tokens with the transformers engine, and log-probabilities of samples with a forward pass."""
    prompts, greedy = prompts or make_requests(), Sampling(12, temperature=0.0)
    pairs = zip(sample(engine, lm, prompts, greedy), sample(TransformersEngine(), lm, prompts, greedy), strict=True)
    sampling = Sampling(12, temperature=0.7)
    gaps = [
        (torch.tensor(found.logprobs) - forward_logprobs(lm, request, found.token_ids, 0.7)).abs().max().item()
        for request, found in zip(prompts, sample(engine, lm, prompts, sampling), strict=True)
    ]
    half = len(prompts) // 2
    same = [ours.token_ids == theirs.token_ids for ours, theirs in pairs]
    return {"same": {LENGTHS[0]: sum(same[:half]), LENGTHS[1]: sum(same[half:])}, "of": half, "gap": max(gaps)}


def agreement(folder: str, tied: str, fault: str) -> list[dict[str, Any]]:
    """Compare with the first weights, with new weights, and with another model of the same shape.

    After the first comparison the engine no longer syncs weights (``fault`` "sync") or clears its cache ("reset").
    """
    engine, lm = VLLMEngine(max_model_len=512, kv_cache_gib=0.25), model(folder, tied=tied == "tied")
    found = [compare(engine, lm)]
    if fault == "sync":
        engine.copy_weights = lambda *_: None  # type: ignore[method-assign]
    if fault == "reset":
        engine._forget_prefixes = lambda *_: None  # type: ignore[method-assign]
    randomize(lm, 1)
    found.append(compare(engine, lm))
    found.append(compare(engine, model(folder, tied=tied == "tied", seed=2)))
    engine.close()
    return found


def save(folder: str, root: str) -> None:
    """Save models with random weights: tied; untied with a large vocabulary; tied with an even number of heads."""
    sizes = {
        "tied": {},
        "untied": {"vocab_size": 4096},
        "even": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4},
    }
    for name, size in sizes.items():
        config = Path(root) / f"{name}_config"
        AutoConfig.from_pretrained(folder, **size).save_pretrained(config)
        model(str(config), tied=name != "untied").save_pretrained(Path(root) / name)
        AutoTokenizer.from_pretrained(folder).save_pretrained(Path(root) / name)


def adapters(folder: str) -> list[dict[str, Any]]:
    """Compare a policy with LoRA adapters, for two sets of adapter weights."""
    torch.manual_seed(0)
    lm = PolicyConfig(folder, from_scratch=True, lora=LoraConfig(rank=4)).build().eval().lm
    randomize(lm, 0)
    engine, found = VLLMEngine(max_model_len=512, kv_cache_gib=0.25), []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora" in name:
                    parameter.copy_(parameter.new_empty(parameter.shape).normal_(0.0, 0.1, generator=generator))
        found.append(compare(engine, lm))
    return found


def pretrained(name: str, file: str) -> list[dict[str, Any]]:
    """A real model with prompts of its own chat template: as it is, and with adapters that change it."""
    config = PolicyConfig(name, gguf_file=file)
    tokenizer, found = config.load_tokenizer(), []
    prompts = [
        Request(PromptTemplate(system=system).encode(tokenizer, f"What is {number} times 7?"), f"stream/{number}")
        for system in ("Calculate.", "Explain every step of the calculation in full sentences. " * 20)
        for number in range(11, 15)
    ]
    for adapters in (None, LoraConfig(rank=4)):
        lm = replace(config, lora=adapters).build().eval().lm
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lm.parameters():
                if adapters is not None and parameter.requires_grad:
                    parameter.copy_(parameter.new_empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
        engine = VLLMEngine(max_model_len=512, kv_cache_gib=0.25)
        found.append(compare(engine, lm, prompts))
        engine.close()
    return found


def checkpoint(folder: str, root: str, fault: str) -> list[dict[str, Any]]:
    """Compare after a fit and after loading two checkpoints into the same module; ``fault`` as in ``agreement``."""
    VLLMEngine.close = lambda self: None  # type: ignore[method-assign]  # keep the engine for the next command
    cli = run(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            f"--model.policy.name_or_path={folder}",
            "--trainer.max_epochs=3",
            f"--trainer.default_root_dir={root}",
            "--trainer.enable_progress_bar=false",
            "--stage_transition={after_epochs: 2, monitor: null, target: null, learning_rate: 1e-3}",
            "--data.demonstrations.init_args.num_demonstrations=128",
            "--data.benchmarks.init_args.num_problems=16",
            "--data.num_problems=4",
            "--data.reward.num_workers=1",
            "--token_records.every_n_rollout_batches=0",
            "--data.engine=egspo_lightning.rollout.vllm_engine.VLLMEngine",
            "--data.engine.max_model_len=512",
        ]
    )
    engine, module, log = cli.datamodule.engine, cli.model, Path(cli.trainer.log_dir)
    found = [compare(engine, module.policy.eval().lm)]
    if fault == "sync":
        engine.copy_weights = lambda *_: None
    for path in (log / "sft.ckpt", log / "checkpoints" / "last.ckpt"):
        cli.trainer.validate(module, cli.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        found.append(compare(engine, module.policy.eval().lm))
    return found


def isolation(folder: str) -> dict[str, Any]:
    """Check what a sample depends on, how it ends, what is refused, and which global state vLLM leaves behind."""
    lm, prompts = model(folder, tied=True), make_requests()
    sampling = Sampling(12, temperature=1.0)
    engine = VLLMEngine(max_model_len=512, kv_cache_gib=0.25)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002  the global generator
    expected = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    together = [found.token_ids for found in sample(engine, lm, prompts, sampling)]
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    alone = [sample(engine, lm, [request], sampling)[0].token_ids for request in prompts]
    torch.set_num_threads(2)
    threads = torch.get_num_threads()
    ends = sorted({token for tokens in together for token in tokens[1:]})[:40]
    stream = engine.stream(lm, prompts, sampling, eos_ids=ends, pad_id=PAD)
    assert len(next(stream)) < len(prompts)
    second = refusal(lambda: sample(engine, lm, prompts, sampling))
    stream.close()  # an unfinished stream must leave no state behind
    again = [found.token_ids for found in sample(engine, lm, prompts, sampling)]
    engine.close()
    has_group = torch.distributed.is_initialized()
    restarted = [found.token_ids for found in sample(engine, lm, prompts, sampling)]
    stopped = list(engine.stream(lm, prompts, sampling, eos_ids=ends, pad_id=PAD))
    many = len(sample(engine, lm, make_requests(128), Sampling(2)))  # more tokens than vLLM takes in one step
    engine.close()
    lm.config.eos_token_id = ends[0]  # not among the requested EOS ids
    endless = [found.token_ids for found in sample(engine, lm, prompts, sampling)]
    one, two, three = sample(engine, lm, [prompts[0]._replace(seed=seed) for seed in "aba"], sampling)
    longer = refusal(lambda: sample(engine, lm, prompts, Sampling(313)))
    cold = refusal(lambda: sample(engine, lm, prompts, Sampling(3, temperature=0.001)))
    other = refusal(lambda: sample(engine, model(folder, tied=False), prompts, sampling))
    lm.named_parameters = lambda **_: iter(list(torch.nn.Module.named_parameters(lm))[:-1])
    partial = refusal(lambda: sample(engine, lm, prompts, sampling))
    return {
        "distinct": len({tuple(tokens) for tokens in together}),
        "alone": alone == together,
        "again": again == together,
        "restarted": restarted == together,
        "random": drawn == expected,
        "many": many,
        "threads": threads,
        "has_group": has_group,
        "endless": endless == together,
        "ends": ends,
        "stopped": [[found.token_ids, found.is_truncated] for batch in stopped for _, found in batch],
        "cut": [[len(found.token_ids), found.is_truncated] for found in (one, two, three)],
        "seeds": [one.token_ids == three.token_ids, one.token_ids == two.token_ids],
        "refusals": [longer, cold, other, second, partial],
    }


def refusal(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


CASES = {case.__name__: case for case in (agreement, save, adapters, pretrained, checkpoint, isolation)}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(CASES[name](*arguments)), flush=True)
