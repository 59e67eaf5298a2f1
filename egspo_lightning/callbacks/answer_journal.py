"""Answers of an evaluation: written to disk, read back after an interruption, and counted for one benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.evaluation.answers import Answer
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.evaluation.journal import METRICS, Journal, fingerprint, write_json
from egspo_lightning.evaluation.metrics import bootstrap_interval
from egspo_lightning.evaluation.report import Report, headline, report
from egspo_lightning.evaluation.scores import BenchmarkMetric, accuracies
from egspo_lightning.module import EGSPOModule

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Measurement:
    """Scores of one benchmark, counted batch by batch on each rank and reduced at the end.

    ``folder`` is where to write the answers, see ``open_journal``; None counts them only.
    """

    def __init__(
        self, benchmark: Benchmark, module: EGSPOModule, data: HybridDataModule, folder: Path | None = None
    ) -> None:
        self.journal = None if folder is None else open_journal(benchmark.name, module, data, folder)
        self._benchmark, self._module, self._data = benchmark, module, data
        self._problems = data.answerer.problems[benchmark.name]
        self._metric = BenchmarkMetric(self._problems, benchmark.num_samples).to(module.device)

    def add(self, answers: Sequence[Answer]) -> None:
        """Count answers; those to one problem must be adjacent."""
        if self.journal is not None:
            self.journal.append(answers)
        self._metric.update(answers)

    def finish(self) -> Report:
        """Reduce over ranks; with a journal, also write metrics.json beside the answers. Collective."""
        num_samples = self._benchmark.num_samples
        table = self._metric.compute().cpu()
        found = report(self._benchmark.name, self._problems, num_samples, table)
        if self.journal is not None:
            close_journal(self.journal, self._module, self._data)
            if self._module.trainer.is_global_zero:
                interval = bootstrap_interval(accuracies(table, num_samples))
                bounds = {f"{headline(found.metrics)}_interval_95": interval}
                origin = _checkpoint(self._module) | {"settings": self.journal.settings}
                write_json(self.journal.folder / METRICS, found._asdict() | bounds | origin)
        return found


def open_journal(name: str, module: EGSPOModule, data: HybridDataModule, folder: Path) -> Journal:
    """Open the journal of a benchmark; the datamodule does not ask again what it holds already. Collective.

    "{fingerprint}" in the name of the folder is replaced by the fingerprint of weights and settings.

    Raises:
        UserError: the folder holds answers of other weights, problems or sampling.
    """
    trainer, answerer = module.trainer, data.answerer
    settings = answerer.settings(name, data.encoder)
    settings |= {"precision": str(trainer.precision), "weights": _weights_digest(module)}
    place = Path(str(folder).replace("{fingerprint}", fingerprint(settings)))
    num_samples, _ = answerer.sampling(name)
    journal = Journal(place, settings, answerer.problems[name], num_samples, trainer.global_rank)
    journal.claim()
    trainer.strategy.barrier()
    earlier = journal.read()
    trainer.strategy.barrier()  # nobody appends before all have read
    answerer.earlier[name] = earlier
    if earlier:
        rank_zero_info(
            f"{name}: {len(earlier)} of {len(journal.problems)} problems were answered before, in {place}; they are "
            "not answered again. Delete that folder to begin anew."
        )
    return journal


def close_journal(journal: Journal, module: EGSPOModule, data: HybridDataModule) -> None:
    """Merge the answers of all ranks into one file. Collective."""
    trainer = module.trainer
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        journal.merge()
    trainer.strategy.barrier()
    data.answerer.earlier.pop(journal.settings["benchmark"])


def _checkpoint(module: EGSPOModule) -> dict[str, Any]:
    """The checkpoint that is measured, and the optimizer steps that it, or the running fit, has taken."""
    trainer = module.trainer
    if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is None:
        return {"ckpt_path": None, "step": trainer.global_step}
    return {"ckpt_path": str(trainer.ckpt_path), "step": module.loaded_step}


def _weights_digest(module: EGSPOModule) -> str:
    """Digest of the policy's weights, by the sum of each parameter's bits; sharding does not change it."""
    sums = [_bits(module, parameter) for _, parameter in sorted(module.networks.policy.named_parameters())]
    return fingerprint({"bits": torch.stack(sums).tolist()})


def _bits(module: EGSPOModule, parameter: nn.Parameter) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    total = local.detach().contiguous().view(_BITS[parameter.element_size()]).sum(dtype=torch.int64)
    return module.sum_over_ranks(total) if isinstance(parameter, DTensor) else total
