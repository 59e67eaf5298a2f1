"""Short runs with vLLM, one after another, on the ranks of torchrun.

    python ranks_program.py FOLDER '{"NAME": [ARGUMENT, ...], ...}'

At the end of each run every rank compares vLLM with transformers and writes its findings to
FOLDER/NAME/RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from allocations import peak_bytes
from lightning.pytorch import Callback
from program import LENGTHS, PAD, forward_logprobs, make_requests, refusal, sample
from short_runs import SHORT, fit_all

from egspo_lightning.rollout.engine import Request, stream_samples
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling

RUN = [
    *SHORT,
    "--trainer.max_epochs=3",
    "--trainer.enable_checkpointing=false",
    "--model.policy.from_scratch=false",
    "--stage_transition={after_epochs: 1, monitor: null, target: null, learning_rate: 1e-3}",
    "--data.reward.num_workers=1",
    "--data.engine=egspo_lightning.rollout.vllm_engine.VLLMEngine",
    "--data.engine.max_model_len=512",
    "--data.engine.kv_cache_gib=0.25",
    "--trainer.callbacks+=ranks_program.Compare",
]
ALL = make_requests()


def uneven(rank: int, world_size: int) -> list[Request]:
    """All requests on the first rank, and five on others."""
    return ALL if rank == 0 else ALL[-5:]


def last_alone(rank: int, world_size: int) -> list[Request]:
    """All requests on the last rank, and none on others."""
    return ALL if rank == world_size - 1 else []


def everywhere(rank: int, world_size: int) -> list[Request]:
    """The same requests on every rank."""
    return ALL


class Compare(Callback):
    """Compares after training, after a change of all weights, and after others without the reset or the copy."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        engine = trainer.datamodule.engine
        found: dict[str, Any] = {"trained": compare(pl_module, engine, uneven(*place()))}
        found["memory"] = memory(pl_module, engine)
        change(pl_module)
        found["changed"] = compare(pl_module, engine, last_alone(*place()))
        engine._forget_prefixes = lambda *_: None
        change(pl_module)
        found["no reset"] = compare(pl_module, engine, everywhere(*place()))
        del engine._forget_prefixes
        engine.copy_weights = lambda *_: None
        change(pl_module)
        found["no copy"] = compare(pl_module, engine, everywhere(*place()))
        del engine.copy_weights
        if getattr(engine, "tensor_parallel_size", 1) > 1:
            found |= {"stopped": stopped_early(pl_module, engine), "disagreement": disagreement(pl_module, engine)}
        file = Path(trainer.default_root_dir) / f"{trainer.global_rank}.json"
        file.write_text(json.dumps(found))


def compare(module: Any, engine: Any, requests: list[Request]) -> dict[str, Any]:
    """Compare greedy tokens with the transformers engine, and log-probabilities of samples with a forward pass."""
    greedy, sampling = Sampling(12, temperature=0.0), Sampling(12, temperature=0.7)
    with module.sampling(whole=False) as lm:
        ours, drawn = (sample(engine, lm, requests, each) for each in (greedy, sampling))
    with module.sampling() as lm:
        theirs = sample(TransformersEngine(), lm, requests, greedy) if requests else []
        pairs = list(zip(requests, drawn, strict=True))
        gaps = [
            (torch.tensor(found.logprobs) - forward_logprobs(lm, request, found.token_ids, 0.7)).abs().max().item()
            for request, found in pairs
        ]
    same = [one.token_ids == other.token_ids for one, other in zip(ours, theirs, strict=True)]
    by_length = {
        n: [is_same for is_same, request in zip(same, requests, strict=True) if len(request.prompt_ids) == n]
        for n in LENGTHS
    }
    return {"same": by_length, "gap": max(gaps, default=0.0), "tokens": {r.seed: s.token_ids for r, s in pairs}}


def stopped_early(module: Any, engine: Any) -> bool:
    """Whether the samples stay the same on the last rank where the first one takes only a part of its own."""
    requests, sampling, ends = uneven(*place()), Sampling(12, temperature=0.7), range(0, 256, 8)
    with module.sampling(whole=False) as lm:
        expected = sample(engine, lm, requests, sampling, ends)
        batches = engine.stream(lm, requests, sampling, eos_ids=ends, pad_id=PAD)
        if torch.distributed.get_rank() == 0:
            assert 0 < len(next(batches)) < len(requests)
            batches.close()
            return True
        return expected == [found for _, found in sorted(pair for batch in batches for pair in batch)]


def disagreement(module: Any, engine: Any) -> str:
    """The error where each rank samples with other seeds. Samples of one token end in the same step."""
    add, rank = engine._add, torch.distributed.get_rank()

    def add_others(vllm: Any, requests: list[Request], *settings: Any) -> Any:
        return add(vllm, [request._replace(seed=f"{rank}/{request.seed}") for request in requests], *settings)

    engine._add = add_others
    with module.sampling(whole=False) as lm:
        error = refusal(lambda: sample(engine, lm, ALL, Sampling(1, temperature=0.7)))
    del engine._add
    return error


def place() -> tuple[int, int]:
    """This rank, and the number of ranks."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@torch.no_grad()
def change(module: Any) -> None:
    """Change all weights, whole or in shards, in the same way on all ranks."""
    for parameter in module.policy.lm.parameters():
        parameter.add_(torch.sin(parameter * 997), alpha=0.2)


def memory(module: Any, engine: Any) -> dict[str, int]:
    """Bytes of the weights, and the peak of allocated bytes while the engine copies them and while all are gathered."""
    lm = module.policy.lm
    blocks = [sum(map(num_bytes, block.parameters())) for block in lm.model.layers]
    return {
        "all": sum(map(num_bytes, lm.parameters())),
        "largest": max([*blocks, *map(num_bytes, lm.parameters())]),
        "copied": peak_bytes(lambda: list(stream_samples(module, engine, [], 1, Sampling(1, 0.0)))),
        "gathered": peak_bytes(lambda: gather(module)),
    }


def gather(module: Any) -> None:
    """Hold all weights, as for the default engine."""
    with module.sampling():
        pass


def num_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a whole parameter."""
    return parameter.numel() * parameter.element_size()


if __name__ == "__main__":
    root, runs = sys.argv[1], json.loads(sys.argv[2])
    fit_all(root, {name: [*RUN, *arguments] for name, arguments in runs.items()})
