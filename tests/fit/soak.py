"""Soak test program: a long run with random faults, at most one per rollout batch.

    python soak.py FOLDER NUM_ROLLOUT_BATCHES -- ARGUMENTS

runs ``fit ARGUMENTS`` in three processes, one after another: SIGTERM ends the first, a full disk ends the second, and
the third finishes. FOLDER/faults.jsonl gets one row per phase of each process: the fault, the metrics, and the resident
memory.
"""

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from functools import wraps
from pathlib import Path

from lightning.pytorch import Callback

from egspo_lightning.module import EGSPOModule
from egspo_lightning.rewards.functions import CorrectnessReward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.training.trainer import RunTrainer
from processes import run_forked

KINDS = ("nan_loss", "infinite_gradient", "flat", "truncated", "empty", "timeout", "crash")
SHARE = 0.25
"""Share of rollout batches with a fault."""
UNDECIDED = "\\boxed{x^2+2x+1}", "(x+1)^2"
"""A pair that only a worker can grade."""


def fault_of(rollout_batch: int) -> str | None:
    """The fault of a rollout batch, a pure function of its number."""
    draw = random.Random(f"soak/{rollout_batch}")
    return draw.choice(KINDS) if draw.random() < SHARE else None


class Faults(Callback):
    """Injects the fault of each rollout batch. ``ending`` (sigterm, disk) ends the process at rollout batch ``at``."""

    def __init__(self, folder: str, ending: str | None = None, at: int = 10**9) -> None:
        self.folder, self.ending, self.at = Path(folder), ending, at
        self.fault: str | None = None
        self.is_injected = self.is_sampling = False
        self.number = -1

    def on_train_start(self, trainer, pl_module):
        """Patch the classes in which faults occur; the process has no other run."""
        faults = self
        grade, reward, stream = MathGrader.grade, CorrectnessReward.__call__, TransformersEngine.stream
        step, save = EGSPOModule.training_step, RunTrainer.save_checkpoint

        def graded(grader, texts, golds, *extraction):
            for kind in ("timeout", "crash"):
                if faults.is_sampling and faults.first(kind):
                    texts, golds = [UNDECIDED[0], *texts[1:]], [UNDECIDED[1], *golds[1:]]
                    stop_workers(grader, grade, dies=kind == "crash")
            return grade(grader, texts, golds, *extraction)

        @wraps(reward)  # the parser checks signatures when it dumps the config
        def rewarded(*args, **kwargs):
            values = reward(*args, **kwargs)
            return [1.0] * len(values) if faults.is_on("flat") else values

        @wraps(stream)
        def streamed(*args, **kwargs):
            for batch in stream(*args, **kwargs):
                yield faults.cut(batch) if faults.is_sampling else batch

        def stepped(*args):
            loss = step(*args)
            return loss * float("nan") if faults.first("nan_loss") else loss

        def saved(*args, **kwargs):
            if faults.ending == "disk" and faults.number >= faults.at:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(*args, **kwargs)

        MathGrader.grade, CorrectnessReward.__call__, TransformersEngine.stream = graded, rewarded, streamed
        EGSPOModule.training_step, RunTrainer.save_checkpoint = stepped, saved

    def on_train_epoch_start(self, trainer, pl_module):
        self.is_sampling = pl_module.stage == "egspo"
        self.number = trainer.datamodule.phases.num_rollout_batches if self.is_sampling else -1
        self.fault, self.is_injected = fault_of(self.number) if self.is_sampling else None, False
        if self.ending == "sigterm" and self.number == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_sampling = False  # later samples and grades belong to benchmarks

    def on_after_backward(self, trainer, pl_module):
        if self.first("infinite_gradient"):
            next(p for p in pl_module.policy.parameters() if p.grad is not None).grad[0] = float("inf")

    def on_train_epoch_end(self, trainer, pl_module):
        assert self.fault is None or self.is_injected, f"{self.fault} was not injected"
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"pid": os.getpid(), "rollout_batch": self.number, "fault": self.fault, "memory_mb": resident_mb()}
        with (self.folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(row | {"metrics": metrics}) + "\n")
        self.fault = None

    def is_on(self, kind: str) -> bool:
        """Whether the rollout batch has this fault."""
        self.is_injected |= self.fault == kind
        return self.fault == kind

    def first(self, kind: str) -> bool:
        """Whether the rollout batch has this fault and it has not been injected yet."""
        return not self.is_injected and self.is_on(kind)

    def cut(self, batch):
        """Make one sample empty or all samples truncated, if that is the fault."""
        if self.first("empty"):
            (number, sample), *rest = batch
            return [(number, shortened(sample, 0)), *rest]
        if self.is_on("truncated"):
            return [(number, shortened(sample, 3)) for number, sample in batch]
        return batch


def shortened(sample, length):
    """The first tokens of a sample, truncated by the length limit."""
    return sample._replace(
        token_ids=sample.token_ids[:length],
        logprobs=sample.logprobs[:length],
        entropies=sample.entropies[:length],
        is_truncated=True,
    )


def stop_workers(grader, grade, *, dies: bool) -> None:
    """Stop the grader's workers, and with ``dies`` kill them while they hold a pair."""
    grade(grader, *zip(UNDECIDED, strict=True))  # starts the workers
    pids = [pid for pid in grader.worker_pids() if parent_of(pid) != os.getpid()]  # workers without their parent
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    if dies:
        threading.Thread(target=lambda: (time.sleep(0.2), [os.kill(pid, signal.SIGKILL) for pid in pids])).start()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def exit_code(arguments: list[str], faults: dict[str, object]) -> int:
    """Execute a run with faults and return its exit code."""
    callback = json.dumps({"class_path": "soak.Faults", "init_args": faults})
    return run_forked([*arguments, f"--trainer.callbacks={callback}"])


if __name__ == "__main__":
    split = sys.argv.index("--")
    folder, num_rollout_batches, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[split + 1 :]
    tenth = num_rollout_batches // 10
    endings = [{"ending": "sigterm", "at": tenth}, {"ending": "disk", "at": 2 * tenth}, {}]
    codes = [exit_code([*arguments, "--ckpt_path=last"], {"folder": folder} | ending) for ending in endings]
    (Path(folder) / "codes.json").write_text(json.dumps(codes))
