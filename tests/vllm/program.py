"""Run by the tests in processes of their own, since ``vllm.LLM`` leaves its process changed: ``program.py CASE ARGS``.

Prints a line of JSON, which the tests judge.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from egspo_lightning.cli.main import run
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.types import Sampling

EOS, PAD = [256], 257
LENGTHS = (5, 200)
"""Of prompts: a block of vLLM's cache holds 128 tokens on a CPU, so that only the longer ones have a cached prefix."""


def model(folder: str, *, tied: bool, seed: int = 0) -> Any:
    """Random weights large enough that different ones give different tokens."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shake(lm, seed)
    return lm


@torch.no_grad()
def shake(lm: Any, seed: int) -> None:
    """Other weights, every one of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.parameters():
        parameter.copy_(parameter.new_empty(parameter.shape).normal_(0.0, 0.3, generator=generator))


def requests(num: int = 8) -> list[Request]:
    generator = random.Random(0)
    prompts = [[generator.randrange(200) for _ in range(length)] for length in LENGTHS for _ in range(num // 2)]
    return [Request(prompt, f"stream/{i}") for i, prompt in enumerate(prompts)]


def ask(engine: Any, lm: Any, asked: list[Request], sampling: Sampling) -> list[Any]:
    batches = engine.stream(lm, asked, sampling, eos_ids=EOS, pad_id=PAD)
    return [sample for _, sample in sorted(pair for batch in batches for pair in batch)]


@torch.no_grad()
def forward_logprobs(lm: Any, request: Request, token_ids: list[int], temperature: float) -> torch.Tensor:
    """By one forward pass over prompt and completion, without a cache."""
    whole = torch.tensor([[*request.prompt_ids, *token_ids]])
    logits = lm(input_ids=whole, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)


def compare(engine: VLLMEngine, lm: Any) -> dict[str, Any]:
    """Greedy tokens against the transformers engine's, and log-probabilities of samples against a forward pass."""
    asked, greedy = requests(), Sampling(12, temperature=0.0)
    pairs = zip(ask(engine, lm, asked, greedy), ask(TransformersEngine(), lm, asked, greedy), strict=True)
    sampling = Sampling(12, temperature=0.7)
    gaps = [
        (torch.tensor(sample.logprobs) - forward_logprobs(lm, request, sample.token_ids, 0.7)).abs().max().item()
        for request, sample in zip(asked, ask(engine, lm, asked, sampling), strict=True)
    ]
    half = len(asked) // 2
    same = [ours.token_ids == theirs.token_ids for ours, theirs in pairs]
    return {"same": {LENGTHS[0]: sum(same[:half]), LENGTHS[1]: sum(same[half:])}, "of": half, "gap": max(gaps)}


def agreement(folder: str, tied: str, fault: str) -> list[dict[str, Any]]:
    """At first, after new weights, and with another object of the same shape; ``fault`` is left out after the first."""
    engine, lm = VLLMEngine(max_model_len=512, kv_cache_gib=0.25), model(folder, tied=tied == "tied")
    found = [compare(engine, lm)]
    if fault == "sync":
        engine.copy_weights = lambda *_: None  # type: ignore[method-assign]
    if fault == "reset":
        engine._forget_prefixes = lambda *_: None  # type: ignore[method-assign]
    shake(lm, 1)
    found.append(compare(engine, lm))
    found.append(compare(engine, model(folder, tied=tied == "tied", seed=2)))
    engine.close()
    return found


def adapters(folder: str) -> list[dict[str, Any]]:
    """A policy with adapters, as they are at first and when they have been trained."""
    torch.manual_seed(0)
    lm = PolicyConfig(folder, from_scratch=True, lora=LoraConfig(rank=4)).build().eval().lm
    shake(lm, 0)
    engine, found = VLLMEngine(max_model_len=512, kv_cache_gib=0.25), []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora" in name:
                    parameter.copy_(parameter.new_empty(parameter.shape).normal_(0.0, 0.1, generator=generator))
        found.append(compare(engine, lm))
    return found


def checkpoint(folder: str, root: str, fault: str) -> list[dict[str, Any]]:
    """One engine, through a fit and two checkpoints that are loaded into the same module; ``fault`` as above."""
    VLLMEngine.close = lambda self: None  # type: ignore[method-assign]  # it lives on from one command to the next
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


def manners(folder: str) -> dict[str, Any]:
    """What a sample depends on, how it ends, and what vLLM leaves behind in the process."""
    lm, asked = model(folder, tied=True), requests()
    sampling = Sampling(12, temperature=1.0)
    engine = VLLMEngine(max_model_len=512, kv_cache_gib=0.25)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002  the global one
    expected = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    together = [sample.token_ids for sample in ask(engine, lm, asked, sampling)]
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    alone = [ask(engine, lm, [request], sampling)[0].token_ids for request in asked]
    torch.set_num_threads(2)
    threads = torch.get_num_threads()
    ends = sorted({token for tokens in together for token in tokens[1:]})[:40]
    stream = engine.stream(lm, asked, sampling, eos_ids=ends, pad_id=PAD)
    assert len(next(stream)) < len(asked)
    second = refusal(lambda: ask(engine, lm, asked, sampling))
    stream.close()  # whoever stops in between leaves nothing behind
    again = [sample.token_ids for sample in ask(engine, lm, asked, sampling)]
    engine.close()
    has_group = torch.distributed.is_initialized()
    anew = [sample.token_ids for sample in ask(engine, lm, asked, sampling)]
    stopped = list(engine.stream(lm, asked, sampling, eos_ids=ends, pad_id=PAD))
    engine.close()
    lm.config.eos_token_id = ends[0]  # not one of those that are asked for
    endless = [sample.token_ids for sample in ask(engine, lm, asked, sampling)]
    one, two, three = ask(engine, lm, [asked[0]._replace(seed=seed) for seed in "aba"], sampling)
    longer = refusal(lambda: ask(engine, lm, asked, Sampling(313)))
    cold = refusal(lambda: ask(engine, lm, asked, Sampling(3, temperature=0.001)))
    other = refusal(lambda: ask(engine, model(folder, tied=False), asked, sampling))
    lm.named_parameters = lambda **_: iter(list(torch.nn.Module.named_parameters(lm))[:-1])
    partial = refusal(lambda: ask(engine, lm, asked, sampling))
    return {
        "distinct": len({tuple(tokens) for tokens in together}),
        "alone": alone == together,
        "again": again == together,
        "anew": anew == together,
        "random": drawn == expected,
        "threads": threads,
        "has_group": has_group,
        "endless": endless == together,
        "ends": ends,
        "stopped": [[sample.token_ids, sample.is_truncated] for batch in stopped for _, sample in batch],
        "cut": [[len(sample.token_ids), sample.is_truncated] for sample in (one, two, three)],
        "seeds": [one.token_ids == three.token_ids, one.token_ids == two.token_ids],
        "refusals": [longer, cold, other, second, partial],
    }


def refusal(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


CASES = {case.__name__: case for case in (agreement, adapters, checkpoint, manners)}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(CASES[name](*arguments)), flush=True)
