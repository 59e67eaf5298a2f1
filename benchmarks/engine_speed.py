"""Sampling speed of the transformers and vLLM engines in tokens per second, with the same weights and prompts.

    python benchmarks/engine_speed.py --size tiny

Each call samples 8 completions of exactly 48 tokens for 16 prompts of 16 tokens. The first call of each engine is a
warm-up, in which vLLM starts; then the engines alternate. vLLM's time includes the copy of the weights, which is also
printed alone. On a CPU, vLLM needs the environment of ``tests/vllm/requirements.txt``.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from egspo_lightning.rollout.engine import Request, RolloutEngine
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.types import Sampling
from measuring.timing import interleave

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 258, "hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 2},
    "small": {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
}
NUM_PROMPTS, NUM_GENERATIONS, PROMPT_LENGTH, LENGTH, REPEATS = 16, 8, 16, 48, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    size = parser.parse_args().size
    torch.manual_seed(0)
    heads = SIZES[size]["hidden_size"] // 32  # vLLM's CPU kernels do not support a head size of 24
    config = LlamaConfig(**SIZES[size], num_attention_heads=heads, max_position_embeddings=256)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    vllm = VLLMEngine()
    engines: dict[str, RolloutEngine] = {"transformers": TransformersEngine(), "vllm": vllm}
    calls = {name: partial(_seconds, engine, lm, itertools.count()) for name, engine in engines.items()}
    tokens = NUM_PROMPTS * NUM_GENERATIONS * LENGTH
    print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters, {tokens} tokens per call")
    for name, taken in interleave(calls, REPEATS, warmup=1).items():
        rates = sorted(tokens / each for each in taken)
        print(f"  {name}: {statistics.median(rates):.0f} tokens/s ({rates[0]:.0f} to {rates[-1]:.0f})")
    print(f"  copy of the weights: {statistics.median(_copy(vllm, lm) for _ in range(REPEATS)) * 1e3:.1f} ms")
    vllm.close()


def _seconds(engine: RolloutEngine, lm: Any, numbers: Iterator[int]) -> float:
    """Time one call; the number of the call seeds the prompts, so both engines get the same ones."""
    number = next(numbers)
    generator = random.Random(number)
    prompts = [[generator.randrange(250) for _ in range(PROMPT_LENGTH)] for _ in range(NUM_PROMPTS)]
    requests = [Request(prompt, f"{number}/{i}") for prompt in prompts for i in range(NUM_GENERATIONS)]
    started = time.perf_counter()
    batches = list(engine.stream(lm, requests, Sampling(LENGTH), eos_ids=[], pad_id=0))
    taken = time.perf_counter() - started
    assert sum(len(sample.token_ids) for batch in batches for _, sample in batch) == len(requests) * LENGTH
    return taken


def _copy(engine: VLLMEngine, lm: Any) -> float:
    assert engine.running is not None
    started = time.perf_counter()
    engine.copy_weights(engine.running, lm)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
