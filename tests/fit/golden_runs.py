"""Four short runs with fixed seeds, whose recorded metrics detect a change of behavior.

    python tests/fit/golden_runs.py PROCESSOR

This command runs them, prints where they differ from the record of this processor (vendor-family-model), and writes the
new values to golden_runs.json. Only a commit that names the cause may do so; its message shows the old and the new
values. The records of other processors are then out of date: make them again, or remove them.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from golden_recorder import FILE
from processes import run_in_group

Recorded = dict[str, Any]
HERE = Path(__file__).resolve().parent
STORED = HERE / "golden_runs.json"
COMMON = [
    "--trainer.callbacks+=golden_recorder.GoldenRecorder",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=false",
    "--data.benchmarks=null",
    "--data.num_problems=16",
    "--data.num_generations=8",
    "--stage_transition.target=0",  # the number of epochs alone ends SFT
]
QUICKSTART = [
    "--config=configs/quickstart.yaml",
    "--data.sft_batch_size=32",
    "--model.optimizer.init_args.lr=2e-3",
    "--stage_transition.after_epochs=10",
    "--trainer.max_epochs=12",  # two phases of EGSPO, of four optimizer steps each
]
RUNS = {
    "quickstart_egspo": [*QUICKSTART, "--config=configs/methods/egspo.yaml"],
    "expressions_chord_phi": [
        "--config=configs/expressions.yaml",
        "--config=configs/methods/chord_phi.yaml",
        "--data.demonstrations.init_args.num_demonstrations=1600",
        "--stage_transition.after_epochs=4",
        "--trainer.max_epochs=6",
    ],
    "quickstart_ppo_critic": [
        *QUICKSTART,
        "--config=configs/methods/ppo_critic.yaml",
        "--model.critic.warmup_steps=2",
    ],
    "quickstart_fsdp2": [
        *QUICKSTART,
        "--config=configs/methods/egspo.yaml",
        "--trainer.strategy=fsdp2",
        "--trainer.devices=2",
    ],
}
"""Name of a run to its arguments, the same in all checkouts."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # x86 machines differ in vector instructions, and so in rounding; these settings make most of them agree.
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CUDA_VISIBLE_DEVICES": "",
}


def record(name: str, checkout: Path) -> Recorded:
    """Run the command line of a checkout with the recorder of this one; return the steps and the hash of the weights.

    Raises:
        RuntimeError: the run failed; the message has its output.
    """
    path = os.pathsep.join([str(checkout.resolve()), str(HERE)])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "egspo_lightning", "fit", *RUNS[name], *COMMON]
        command.append(f"--trainer.default_root_dir={folder}")
        output, code = run_in_group(command, checkout, 600, **ENVIRONMENT, PYTHONPATH=path)
        if code != 0 or not (Path(folder) / FILE).is_file():
            raise RuntimeError(f"Run {name} in {checkout} ended with exit code {code}.\n{output}")
        recorded: Recorded = json.loads((Path(folder) / FILE).read_text())
        return recorded


def record_all(runs: Iterable[tuple[str, Path]], jobs: int) -> Iterator[Recorded]:
    """Record runs, each a name and a checkout, ``jobs`` at a time; yield the results in order."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda run: record(*run), runs)


def main(processor: str) -> None:
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    results = record_all([(name, HERE.parents[1]) for name in RUNS], jobs=2)
    new = {name: recorded["steps"] for name, recorded in zip(RUNS, results, strict=True)}
    for run, steps in new.items():
        before = stored.get(run, {}).get(processor, [])
        for i, step in enumerate(steps):
            old = before[i] if i < len(before) else {}
            for name in sorted(step.keys() | old.keys()):
                if step.get(name) != old.get(name):
                    print(f"{run}, step {i + 1}, {name}: {old.get(name)} -> {step.get(name)}")
        stored.setdefault(run, {})[processor] = steps
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
