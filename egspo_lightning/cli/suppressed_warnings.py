"""What the libraries say that asks nothing of the user."""

import logging
import warnings


def silence_noise() -> None:
    """Drop such messages: everything that remains is worth reading."""
    for message in (
        "Total length of `list` across ranks is zero",  # in fit, MathBenchmark asks for the benchmarks itself
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning with torch 2.13
        "torch.distributed.nn.functional.all_gather is deprecated",  # Lightning with torch 2.13
        r"Found \d+ module\(s\) in eval mode",  # the reference policy
        r"Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
        "The dirpath has changed",  # ModelCheckpoint, when a checkpoint of another run is evaluated
        "LightningCLI's args parameter is intended to run from within Python",  # as `run` is
        ".*does not have many workers",  # loaders are lazy and in memory
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(  # for weights in 4 bits, which there are none of here
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in ("litlogger", "TPU available"))
    )
