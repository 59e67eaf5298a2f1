"""A long run in which everything that can go wrong does, at random: faults by collection, injected by a callback.

    python soak.py FOLDER COLLECTIONS -- ARGUMENTS

runs ``fit ARGUMENTS`` in three processes, one after another: the first is told to end by SIGTERM, the second finds the
disk full, the third goes on to the end. FOLDER/faults.jsonl gets a row for each phase of each process: what was
injected, what the metrics say, and the process's resident memory.
"""

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from lightning.pytorch import Callback

from egspo_lightning.callbacks import phase_checkpoint as checkpoint
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rewards.functions import CorrectnessReward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from processes import forked

KINDS = ("nan_loss", "infinite_gradient", "flat", "truncated", "empty", "timeout", "crash")
SHARE = 0.25
"""Of the collections, those with a fault."""
UNDECIDED = "\\boxed{x^2+2x+1}", "(x+1)^2"
"""A pair that a worker has to look at."""


def fault_of(collection: int) -> str | None:
    """What goes wrong in a collection, a pure function of its number."""
    draw = random.Random(f"soak/{collection}")
    return draw.choice(KINDS) if draw.random() < SHARE else None


class Faults(Callback):
    """Injects each collection's fault; ``ending`` (sigterm, disk) is what ends the process, at collection ``at``."""

    def __init__(self, folder: str, ending: str | None = None, at: int = 10**9) -> None:
        self.folder, self.ending, self.at = Path(folder), ending, at
        self.fault: str | None = None
        self.is_injected = self.is_sampling = False
        self.number = -1

    def on_train_start(self, trainer, pl_module):
        """Put faults where they come from; the process is this run's alone, so classes can be changed."""
        faults = self
        grade, reward, stream = MathGrader.grade, CorrectnessReward.__call__, TransformersEngine.stream
        step, save = EGSPOModule.training_step, checkpoint.save_whole

        def graded(grader, texts, golds):
            for kind in ("timeout", "crash"):
                if faults.is_sampling and faults.first(kind):
                    texts, golds = [UNDECIDED[0], *texts[1:]], [UNDECIDED[1], *golds[1:]]
                    stop_workers(grader, grade, dies=kind == "crash")
            return grade(grader, texts, golds)

        def rewarded(*args):
            values = reward(*args)
            return [1.0] * len(values) if faults.is_on("flat") else values

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
        EGSPOModule.training_step, checkpoint.save_whole = stepped, saved

    def on_train_epoch_start(self, trainer, pl_module):
        self.is_sampling = pl_module.stage == "egspo"
        self.number = trainer.datamodule.phases.num_rollout_batches if self.is_sampling else -1
        self.fault, self.is_injected = fault_of(self.number) if self.is_sampling else None, False
        if self.ending == "sigterm" and self.number == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_sampling = False  # what is sampled and graded from here on are benchmarks

    def on_after_backward(self, trainer, pl_module):
        if self.first("infinite_gradient"):
            next(p for p in pl_module.policy.parameters() if p.grad is not None).grad[0] = float("inf")

    def on_train_epoch_end(self, trainer, pl_module):
        assert self.fault is None or self.is_injected, f"{self.fault} was not injected"
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"pid": os.getpid(), "collection": self.number, "fault": self.fault, "memory_mb": resident_mb()}
        with (self.folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(row | {"metrics": metrics}) + "\n")
        self.fault = None

    def is_on(self, kind: str) -> bool:
        """Whether this goes wrong all through the collection."""
        self.is_injected |= self.fault == kind
        return self.fault == kind

    def first(self, kind: str) -> bool:
        """Whether it is time for what goes wrong once in the collection."""
        return not self.is_injected and self.is_on(kind)

    def cut(self, batch):
        """A batch of samples: one of them empty, all of them truncated, or as it was."""
        if self.first("empty"):
            (number, sample), *rest = batch
            return [(number, shortened(sample, 0)), *rest]
        if self.is_on("truncated"):
            return [(number, shortened(sample, 3)) for number, sample in batch]
        return batch


def shortened(sample, length):
    """The first tokens of a sample, as if the limit had come there."""
    return sample._replace(
        token_ids=sample.token_ids[:length],
        logprobs=sample.logprobs[:length],
        entropies=sample.entropies[:length],
        is_truncated=True,
    )


def stop_workers(grader, grade, *, dies: bool) -> None:
    """Have the grader's workers stand still, and perhaps be killed by somebody else while they have a pair."""
    grade(grader, *zip(UNDECIDED, strict=True))  # so that there are some
    pids = [pid for pid in grader.worker_pids() if parent_of(pid) != os.getpid()]  # that one forks the workers
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    if dies:
        threading.Thread(target=lambda: (time.sleep(0.2), [os.kill(pid, signal.SIGKILL) for pid in pids])).start()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def end_of(arguments: list[str], faults: dict[str, object]) -> int:
    """The exit code of a run with faults."""
    callback = json.dumps({"class_path": "soak.Faults", "init_args": faults})
    return forked([*arguments, f"--trainer.callbacks={callback}"])


if __name__ == "__main__":
    split = sys.argv.index("--")
    folder, collections, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[split + 1 :]
    tenth = collections // 10
    endings = [{"ending": "sigterm", "at": tenth}, {"ending": "disk", "at": 2 * tenth}, {}]
    codes = [end_of([*arguments, "--ckpt_path=last"], {"folder": folder} | ending) for ending in endings]
    (Path(folder) / "codes.json").write_text(json.dumps(codes))
