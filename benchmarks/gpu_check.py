"""GPU check: training, sampling, token statistics, memory and fsdp2 on one GPU, with a model of 0.5 B random weights.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --short

Takes at most eight minutes and needs no download. Each check runs in its own process within its own time budget; a
failing check is reported and the others still run. The exit code is 1 if one has failed. ``--short`` runs the same
checks with a tiny model in float32 on the CPU, to test the script.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from egspo_lightning.cli.main import EgspoCLI
from egspo_lightning.cli.plan import workload as planned_workload
from egspo_lightning.errors import UserError
from egspo_lightning.rollout.scoring import MAX_SAMPLER_GAP
from egspo_lightning.training.memory_plan import plan
from measuring.checks import Check, Range, Record, has_failed, run_checks
from measuring.heads import naive, ours
from measuring.memory import MIB, peak
from measuring.peak_flops import known_peak, measured_peak
from measuring.phase_readings import Phase, PhaseReadings, step_flops
from measuring.report import parse, parser, publish
from measuring.script import exit_code
from measuring.timing import spread
from measuring.workloads import TINY_MODEL, Workload, train
from token_stats_memory import Job, measure

NAME = "gpu_check"
QWEN_SIZES = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
"""Those of Qwen2.5-0.5B. The model has no biases in attention, because its type is that of ``configs/tiny_model``."""
VLLM = 'vLLM is not installed: pip install "egspo-lightning[vllm]"'


class Setting(NamedTuple):
    """Device, model and sizes of all checks."""

    device: str
    workload: Workload
    max_tokens: int
    rounds: int
    threads: int

    @property
    def is_short(self) -> bool:
        """Whether the checks run on the CPU in float32, where speed and memory have no reference."""
        return self.device == "cpu"

    def reference(self, low: float = -float("inf"), high: float = float("inf")) -> Range | None:
        """A reference that holds on a GPU alone."""
        return None if self.is_short else Range(low, high)

    def flags(self) -> list[str]:
        """Flags of `egspo_lightning fit` beside those of the workload."""
        place = ["cpu"] if self.is_short else ["gpu", "--trainer.precision=bf16-mixed"]
        return [
            f"--trainer.accelerator={place[0]}",
            *place[1:],
            "--trainer.devices=1",
            "--model.policy.from_scratch=true",
            "--data.max_prompt_length=16",
            f"--data.max_tokens_per_micro_batch={self.max_tokens}",
        ]

    def fit(self, *flags: str, phases: int | None = None) -> EgspoCLI:
        """Train from random weights through the command line, with ``PhaseReadings``."""
        torch.set_num_threads(self.threads)
        return train(self.workload, phases or self.rounds + 1, *self.flags(), callback_flag(PhaseReadings), *flags)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Check training, sampling, kernels and memory on one GPU in at most eight minutes.", rounds=2)
    flags.add_argument("--short", action="store_true", help="a tiny model in float32 on the CPU, to test this script")
    flags.add_argument("--max_tokens", type=int, default=8192, help="tokens in a micro-batch (8192, for 40 GB)")
    arguments = parse(flags, argv)
    if not arguments.short and not torch.cuda.is_available():
        raise UserError("gpu_check needs a GPU that PyTorch can use; --short tests the script on a CPU.")
    with tempfile.TemporaryDirectory() as folder:
        rows = run_checks(checks(_setting(arguments, Path(folder) / "model")))
    gpu = _gpu(arguments.short)
    publish(NAME, arguments, {f"GPU check, {gpu['name']}": rows}, gpu=gpu, passed=not has_failed(rows))
    return 1 if has_failed(rows) else 0


def _setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    """Write the model's folder, which holds no weights, and choose the sizes."""
    shutil.copytree(TINY_MODEL, folder)
    reward = "measuring.rewards.EverySecond"
    if arguments.short:
        small = Workload(folder, 2, 4, 1, 1, 48, reward=reward)
        return Setting("cpu", small, 256, arguments.rounds, arguments.threads)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | QWEN_SIZES))
    whole = Workload(folder, 16, 16, 1, 1, 176, learning_rate=1e-5, reward=reward)
    return Setting("cuda", whole, arguments.max_tokens, arguments.rounds, arguments.threads)


def checks(setting: Setting) -> list[Check]:
    """All checks; on a GPU the budgets add up to eight minutes."""
    lacks_vllm = VLLM if find_spec("vllm") is None else "not in short form" if setting.is_short else None
    parts: list[tuple[str, Any, float, str | None]] = [
        ("optimizer steps", optimizer_steps, 85, None),
        ("token statistics", token_statistics, 45, None),
        ("sampling", sampling, 75, None),
        ("sampling, vLLM", partial(sampling, engine="VLLMEngine"), 140, lacks_vllm),
        ("memory", memory, 60, None),
        ("fsdp2, one rank", fsdp2, 75, None),
    ]
    scale = 8 if setting.is_short else 1  # CPUs may be busy
    return [Check(name, partial(check, setting), budget * scale, reason) for name, check, budget, reason in parts]


def optimizer_steps(setting: Setting) -> list[Record]:
    """Speed of optimizer steps, in tokens and as a share of the peak.

    At least a tenth of the peak is required: float32 products reach at most 7 % of the bfloat16 peak on an H100.
    """
    cli = setting.fit()
    lm: Any = cli.model.policy.lm
    phases = _recorded(cli)
    top, source = _peak(setting.device)
    shares = [step_flops(lm, phase) / phase.seconds / (top * 1e12) for phase in phases]
    return [
        Record("parameters", sum(p.numel() for p in lm.parameters()) / 1e6, "M"),
        Record("speed", spread([phase.tokens / phase.seconds for phase in phases]).median, "tokens/s"),
        Record(f"peak, {source}", top, "TFLOP/s"),
        Record("share of the peak", spread(shares).median, "", setting.reference(low=0.1)),
    ]


def sampling(setting: Setting, engine: str = "TransformersEngine") -> list[Record]:
    """Speed of an engine within training, and distance between its log-probabilities and the scorer's."""
    scores = "--model.objective.beta=0.001"  # a reference policy: rollouts are then scored in float32 as well
    readings = find_callback(setting.fit(f"--data.engine={engine}", scores), PhaseReadings)
    return [
        Record("speed", readings.median("rollout/tokens_per_second"), "tokens/s", Range(low=1.0)),
        Record("sampler gap", readings.median("rollout/sampler_gap"), "nats/token", Range(high=MAX_SAMPLER_GAP)),
    ]


def token_statistics(setting: Setting) -> list[Record]:
    """Time, memory and errors of log-probabilities, entropies and backward pass, relative to materialized logits."""
    sizes = (64, 500, 16) if setting.is_short else (2048, QWEN_SIZES["vocab_size"], QWEN_SIZES["hidden_size"])
    jobs = {name: Job(name, *sizes, setting.threads, setting.device, True) for name in ("naive", "ours")}
    found = {}
    for name, job in jobs.items():
        measure(job)  # loads the kernels
        found[name] = measure(job)
    time, mib = found["ours"].reading.wall / found["naive"].reading.wall, found["ours"].mib / found["naive"].mib
    return [
        Record("time over naive", time, "", setting.reference(high=1.2)),
        Record("memory over naive", mib, "", setting.reference(high=1 / 8)),
        *_errors(setting.device, *sizes),
    ]


def _errors(device: str, num_tokens: int, vocabulary: int, hidden: int) -> list[Record]:
    """Largest difference to float32 products of the same inputs.

    Logits below 8 in size have an error of at most 2^-6 in bfloat16, half a unit in the last place, and so has the
    logarithm of their normalizer. Both may add up.
    """
    dtype, limit = (torch.float32, 1e-4) if device == "cpu" else (torch.bfloat16, 2 * 2**-6)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_tokens, hidden, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.03).to(device, dtype)
    ids = torch.randint(vocabulary, (num_tokens,), generator=generator).to(device)
    with torch.no_grad():
        found, expected = ours(states, weight, ids), naive(states.float(), weight.float(), ids)
    pairs = zip(("log-probabilities", "entropies"), found, expected, strict=True)
    errors = [(name, _distance(mine, theirs)) for name, mine, theirs in pairs]
    return [Record(f"error of {name}", error, "nats", Range(high=limit)) for name, error in errors]


def _distance(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert mine is not None
    assert theirs is not None
    return (mine - theirs).abs().max().item()


def memory(setting: Setting) -> list[Record]:
    """Peak of a run relative to the plan; demonstrations are left out, because plan assumes their greatest length."""
    runs: list[EgspoCLI] = []
    torch.zeros(1, device=setting.device)  # memory statistics exist once CUDA has started
    mib = peak(lambda: runs.append(setting.fit("--model.objective.mu=0", phases=2)), setting.device)
    module, data, flags = runs[0].model, runs[0].datamodule, runs[0].config["fit"].trainer
    planned = plan(planned_workload(module, data, flags, 1), 1).peak / MIB
    return [
        Record("peak of plan", planned, "MiB"),
        Record("peak of the run", mib, "MiB"),
        Record("run over plan", mib / planned, "", setting.reference(0.85, 1.15)),
    ]


def fsdp2(setting: Setting) -> list[Record]:
    """A phase of SFT under fsdp2, whose mean loss must be that of an unsharded run, and one with rollouts.

    In bfloat16 the two differ by rounding, because fsdp2 gathers all weights in bfloat16.
    """
    sft = ["--model.initial_stage=sft", "--data.demonstrations.init_args.num_demonstrations=64"]
    sft += ["--data.sft_batch_size=16", "--stage_transition.monitor=null", "--stage_transition.target=null"]
    sft += ["--model.optimizer.init_args.lr=1e-5"]  # larger ones would amplify rounding
    whole = find_callback(setting.fit(*sft, "--stage_transition.enabled=false", phases=1), PhaseReadings)
    then = ["--stage_transition.after_epochs=1", "--stage_transition.save_checkpoint=false"]
    sharded = find_callback(setting.fit(*sft, *then, "--trainer.strategy=fsdp2", phases=2), PhaseReadings)
    loss, expected = (phases[0].metrics["loss/sft"] for phases in (sharded.phases, whole.phases))
    limit = 1e-4 if setting.is_short else 0.01
    return [
        Record("SFT loss over unsharded", loss / expected, "", Range(1 - limit, 1 + limit)),
        Record("sampling speed", sharded.median("rollout/tokens_per_second"), "tokens/s", Range(low=1.0)),
    ]


def _recorded(cli: EgspoCLI) -> list[Phase]:
    readings = find_callback(cli, PhaseReadings)
    return readings.phases[readings.warmup :]


def _peak(device: str) -> tuple[float, str]:
    """TFLOP/s in the dtype of the products, and where the number comes from."""
    if device == "cpu":
        return measured_peak(device, torch.float32, 256), "float32, measured"
    known = known_peak(torch.cuda.get_device_name(0))
    if known is not None:
        return known, "bfloat16, data sheet"
    return measured_peak(device, torch.bfloat16, 8192), "bfloat16, measured"


def _gpu(is_short: bool) -> dict[str, str]:
    """Name, driver and CUDA version of the GPU."""
    if is_short:
        return {"name": "short form on a CPU"}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {"name": torch.cuda.get_device_name(0), "driver": driver, "cuda": str(torch.version.cuda)}


if __name__ == "__main__":
    sys.exit(exit_code(main))
