"""Which share of an iteration's time token records take.

    python benchmarks/time_token_records.py --config configs/quickstart.yaml

Trains a few collections without records, then records the last one again and again. CPU time of the process, so that
neighbors on the machine do not count. An iteration is a collection with its updates, without evaluation.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks import TokenRecords
from egspo_lightning.callbacks.token_records import record, write
from egspo_lightning.cli.main import EgspoCLI, run
from egspo_lightning.types import Stage

REPEATS = 20


class PhaseSeconds(Callback):
    """CPU seconds of each phase of stage EGSPO."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A phase begins."""
        self._started = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A phase ends; this callback is asked before the project's own."""
        if pl_module.stage == Stage.EGSPO:
            self.seconds.append(time.process_time() - self._started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    config = parser.parse_args().config
    with tempfile.TemporaryDirectory() as folder:
        cli = run(
            [
                "fit",
                f"--config={config}",
                "--trainer.max_epochs=20",
                "--stage_transition.after_epochs=10",
                f"--trainer.default_root_dir={folder}",
                f"--trainer.callbacks+={__name__}.{PhaseSeconds.__name__}",
                "--trainer.enable_progress_bar=false",
                "--token_records.every_n_rollout_batches=0",
                "--data.benchmarks=null",
                "--hf_export.enabled=false",
            ]
        )
        callbacks: list[Callback] = getattr(cli.trainer, "callbacks", [])
        phases = next(c for c in callbacks if isinstance(c, PhaseSeconds))
        iteration = statistics.median(phases.seconds)
        once = statistics.median(_record(cli, Path(folder)) for _ in range(REPEATS))
    every = TokenRecords().every_n_rollout_batches
    share = once / every / iteration
    print(f"iteration {iteration * 1e3:.0f} ms; records {once * 1e3:.1f} ms, every {every}th: {share:.2%}")


def _record(cli: EgspoCLI, folder: Path) -> float:
    """CPU seconds of recording the last collection, files included."""
    module, data = cli.model, cli.datamodule
    started = time.process_time()
    write(record(data.rollouts, module, 0, 0, TokenRecords().max_completions), folder, 0, 0)
    return time.process_time() - started


if __name__ == "__main__":
    main()
