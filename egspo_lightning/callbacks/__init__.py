"""Lightning callbacks: stage transition, evaluation, checkpoints and export, guards, and observers of training."""

from egspo_lightning.callbacks.dashboard import Dashboard
from egspo_lightning.callbacks.entropy_histogram import EntropyHistogram
from egspo_lightning.callbacks.guards import Guards
from egspo_lightning.callbacks.hf_export import HFExport
from egspo_lightning.callbacks.interruption import Interruption
from egspo_lightning.callbacks.math_benchmark import MathBenchmark
from egspo_lightning.callbacks.phase_checkpoint import PhaseCheckpoint
from egspo_lightning.callbacks.prediction_writer import PredictionWriter
from egspo_lightning.callbacks.progress import PhaseProgress
from egspo_lightning.callbacks.rollout_samples import RolloutSamples
from egspo_lightning.callbacks.stage_transition import StageTransition
from egspo_lightning.callbacks.token_records import TokenRecords

__all__ = [
    "Dashboard",
    "EntropyHistogram",
    "Guards",
    "HFExport",
    "Interruption",
    "MathBenchmark",
    "PhaseCheckpoint",
    "PhaseProgress",
    "PredictionWriter",
    "RolloutSamples",
    "StageTransition",
    "TokenRecords",
]
