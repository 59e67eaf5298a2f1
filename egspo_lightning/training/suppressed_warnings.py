"""Filters for harmless library warnings."""

import logging
import warnings


def silence_noise() -> None:
    """Suppress library messages that ask nothing of the user, so that the remaining ones are read."""
    for message in (
        "Total length of `list` across ranks is zero",  # in fit, MathBenchmark runs the benchmarks itself
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning with torch 2.13
        "torch.distributed.nn.functional.all_gather is deprecated",  # Lightning with torch 2.13
        r"Found \d+ module\(s\) in eval mode",  # the reference policy
        r"Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
        "The dirpath has changed",  # ModelCheckpoint, when a checkpoint of another run is evaluated
        "LightningCLI's args parameter is intended to run from within Python",  # as `run` is
        "The number of training batches .* is smaller than the logging interval",  # each phase is logged
        ".*does not have many workers",  # loaders are lazy and in memory
        "fan_in_fan_out is set to False",  # peft notices GPT-2's layers by itself
        r"The following (rank|alpha)_pattern keys did not match",  # peft's own, for fused experts, where they do
        "Model has `tie_word_embeddings=True` and a tied layer",  # models/lora.py unties them
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(  # 4-bit weights, which are not used here
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in ("litlogger", "litmodels", "TPU available"))
    )
