"""Tokens a second of the two engines, from the same weights and prompts, in one process.

    python benchmarks/engine_speed.py --size tiny

16 prompts of 16 tokens, 8 completions each, of 48 tokens whatever they are. Each engine has a first call that is not
counted, in which vLLM starts; then the two take turns. vLLM's time has the copy of the weights in it, which is also
given alone. On a CPU it needs the environment of ``tests/vllm/requirements.txt``.
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from egspo_lightning.rollout.engine import Request, RolloutEngine
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.types import Sampling

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
    heads = SIZES[size]["hidden_size"] // 32  # vLLM's CPU kernels have no heads of 24
    config = LlamaConfig(**SIZES[size], num_attention_heads=heads, max_position_embeddings=256)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    engines: dict[str, RolloutEngine] = {"transformers": TransformersEngine(), "vllm": VLLMEngine()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(REPEATS + 1):
        for name, engine in engines.items():
            took = _seconds(engine, lm, number)
            if number > 0:
                seconds[name].append(took)
    tokens = NUM_PROMPTS * NUM_GENERATIONS * LENGTH
    print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters, {tokens} tokens a call")
    for name, taken in seconds.items():
        rates = sorted(tokens / each for each in taken)
        print(f"  {name}: {statistics.median(rates):.0f} tokens/s ({rates[0]:.0f} to {rates[-1]:.0f})")
    vllm = engines["vllm"]
    assert isinstance(vllm, VLLMEngine)
    print(f"  copy of the weights: {statistics.median(_copy(vllm, lm) for _ in range(REPEATS)) * 1e3:.1f} ms")
    vllm.close()


def _seconds(engine: RolloutEngine, lm: Any, number: int) -> float:
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
