"""The parser of the command line, whose errors say what to install where a package is missing."""

import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

EXTRAS = {"bitsandbytes": "8bit", "peft": "lora", "vllm": "vllm"}
"""Package that can be left out to the extra that brings it."""


class Parser(LightningArgumentParser):
    """Lightning's, with a remedy for a class whose package is not there."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end with exit code 2."""
        super().error(message + remedy(message), ex)


def remedy(message: str) -> str:
    """What to install for a class that could not be imported; nothing where that is not what went wrong."""
    missing = re.search(r"No module named '(\w+)", message)
    if missing is None or missing.group(1) not in EXTRAS:
        return ""
    return f'\nInstall it: pip install "egspo-lightning[{EXTRAS[missing.group(1)]}]"'
