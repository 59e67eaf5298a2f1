"""Public names of the package: importable, lazy and complete."""

import subprocess
import sys

import egspo_lightning
from egspo_lightning.cli.main import CALLBACKS
from egspo_lightning.rewards.functions import Reward
from egspo_lightning.rollout.engine import RolloutEngine

WITHOUT_TORCH = """
import sys
import egspo_lightning
assert egspo_lightning.__all__
assert "QuantileGate" in dir(egspo_lightning)
heavy = {"torch", "lightning", "transformers", "jsonargparse"} & set(sys.modules)
assert not heavy, heavy
"""


def test_package_import_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported():
    namespace = {}
    exec("from egspo_lightning import *", namespace)
    assert egspo_lightning.__all__ == sorted(set(egspo_lightning.__all__))
    for name in egspo_lightning.__all__:
        assert namespace[name].__name__ == name


def test_unknown_name_raises_attribute_error():
    assert not hasattr(egspo_lightning, "QuantilGate")


def test_every_shipped_part_is_public():
    """Every subclass of a public protocol or base class, and every callback."""
    parts = [part for part in map(egspo_lightning.__getattr__, egspo_lightning.__all__) if isinstance(part, type)]
    bases = [part for part in parts if getattr(part, "_is_protocol", False) or getattr(part, "__abstractmethods__", ())]
    assert {Reward, RolloutEngine} <= set(bases)
    shipped = {
        part
        for base in bases
        for part in base.__subclasses__()
        if part.__module__.startswith("egspo_lightning.") and "<locals>" not in part.__qualname__
    }
    assert shipped <= set(parts)
    assert set(CALLBACKS.values()) <= set(parts)
