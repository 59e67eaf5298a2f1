"""Short runs of the quickstart, one after another in one program: it saves starts of torchrun and imports."""

from collections.abc import Mapping, Sequence

from egspo_lightning.cli.main import run
from egspo_lightning.cli.process_exit import leave

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.logger=CSVLogger",
    "--trainer.enable_progress_bar=false",
    "--data.demonstrations.init_args.num_demonstrations=32",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--data.num_problems=4",
    "--data.num_generations=4",
    "--data.max_completion_length=40",
    "--hf_export.enabled=false",
    "--token_records.every_n_rollout_batches=0",
]


def fit_all(root: str, runs: Mapping[str, Sequence[str]]) -> None:
    """Run ``fit`` with the arguments of each run; all its files go to ROOT/NAME. Then end the process."""
    for name, arguments in runs.items():
        place = f"{root}/{name}"
        run(["fit", *arguments, f"--trainer.default_root_dir={place}", f"--trainer.logger.save_dir={place}"])
    leave(0)
