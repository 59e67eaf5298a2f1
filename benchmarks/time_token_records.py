"""Share of training time that token records take.

    python benchmarks/time_token_records.py --config configs/quickstart.yaml

Trains a few rollout batches without records, then records the last one repeatedly. All times are CPU times of the
process, so other processes do not count. An iteration is a rollout batch with its optimizer steps, without evaluation.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from egspo_lightning import TokenRecords
from egspo_lightning.callbacks.token_records import record, write
from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from egspo_lightning.cli.main import EgspoCLI, run
from measuring.callbacks import IterationTimes
from measuring.timing import seconds

REPEATS = 20
SFT_EPOCHS, EPOCHS = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    config = parser.parse_args().config
    with tempfile.TemporaryDirectory() as folder:
        cli = run(
            [
                "fit",
                f"--config={config}",
                f"--trainer.max_epochs={EPOCHS}",
                f"--stage_transition.after_epochs={SFT_EPOCHS}",
                f"--trainer.default_root_dir={folder}",
                callback_flag(IterationTimes, warmup=SFT_EPOCHS + 1),  # without the stage transition
                "--trainer.enable_progress_bar=false",
                "--token_records.every_n_rollout_batches=0",
                "--data.benchmarks=null",
                "--hf_export.enabled=false",
            ]
        )
        iteration = seconds(find_callback(cli, IterationTimes).readings, "cpu").median
        once = statistics.median(_record(cli, Path(folder)) for _ in range(REPEATS))
    every = TokenRecords().every_n_rollout_batches
    share = once / every / iteration
    print(f"iteration {iteration * 1e3:.0f} ms; records {once * 1e3:.1f} ms, every {every}th: {share:.2%}")


def _record(cli: EgspoCLI, folder: Path) -> float:
    """CPU seconds to record the last rollout batch, including the files."""
    module, data = cli.model, cli.datamodule
    started = time.process_time()
    write(record(data.phases.rollouts, module, 0, 0, TokenRecords().max_completions), folder, 0, 0)
    return time.process_time() - started


if __name__ == "__main__":
    main()
