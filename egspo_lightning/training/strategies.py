"""Which of Lightning's strategies a run can have, and FSDP2 as one of them that needs no settings: ``fsdp2``.

| strategy | here |
|---|---|
| auto, single_device | one process |
| ddp, ddp_find_unused_parameters_* | whole networks on every rank, gradients averaged |
| fsdp2 (`FSDP2Strategy`) | weights, gradients and optimizer sharded over all ranks |
| all others | refused at the start, see ``REFUSED`` |

Checkpoints of any of these resume under any other: those of one file, and the folders of shards that FSDP2 writes.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from egspo_lightning.errors import UserError
from egspo_lightning.models.fsdp import ShardingPlan

REFUSED: dict[type[Strategy], tuple[str, str]] = {
    FSDPStrategy: (
        "keeps weights in flat buffers, which can neither be sampled from with ranks at different lengths nor leave "
        "out what an update does not train",
        "fsdp2, which shards the same things, in the host's memory with cpu_offload: true of its class",
    ),
    DeepSpeedStrategy: (
        "keeps gradients and moments in buffers of its own, where an update without a signal cannot be left out, nor "
        "the optimizer start anew at the end of SFT",
        "fsdp2: with reshard_after_forward false it holds what stage 2 holds, else what stage 3 does",
    ),
    ModelParallelStrategy: (
        "changes an optimizer that has not stepped yet by saving it, and does not fit other strategies' checkpoints to "
        "a run",
        "fsdp2 (egspo_lightning.training.strategies.FSDP2Strategy), which is the same without that, and needs no sizes",
    ),
    XLAStrategy: ("compiles fixed shapes, and completions have many lengths", "ddp or fsdp2 on GPUs"),
}
"""Strategy to why it cannot be had, and what can instead."""


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all ranks: ``--trainer.strategy fsdp2``.

    With ``--trainer.precision bf16-mixed`` weights are gathered and computed in bfloat16, while shards, gradients and
    the optimizer's state are float32.

    Args:
        reshard_after_forward: Free a block's gathered weights between forward and backward pass (ZeRO-3); otherwise
            they are held (ZeRO-2): less traffic, more memory.
        cpu_offload: Keep shards, gradients and the optimizer's state in the host's memory, and step there: room on the
            device for the price of copies. On a CPU it changes nothing.
        save_distributed_checkpoint: Write a folder in which each rank writes its shard; otherwise one file, which the
            first rank has to hold in its memory. Either resumes under any strategy.
        process_group_backend: nccl or gloo; by default what suits the device.
        timeout: How long a rank waits for the others.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    def setup_environment(self) -> None:
        """All ranks shard together."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Offloaded shards stay where they are; buffers are on the device since they were sharded."""
        if not self.cpu_offload:
            return super().model_to_device()
        assert self.model is not None
        return _update_properties(self.model, device=self.root_device)

    def _get_process_group_backend(self) -> str:
        """Of offloaded shards, norms and whole tensors are reduced and gathered between the hosts' memories."""
        backend, device = super()._get_process_group_backend(), self.root_device.type
        return backend if not self.cpu_offload or device == "cpu" or ":" in backend else f"{device}:{backend},cpu:gloo"

    # A file holds tensors that are whole, and parameters by number, as every strategy but this one writes them

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By name and sharded for a folder; by number and whole, on the first rank, for a file.

        To save an optimizer that has not stepped, torch has it step by nothing, which would count in the next one.
        """
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if not self._save_distributed_checkpoint:
            whole: dict[str, Any] = tree_map(self._whole, optimizer.state_dict())
            return whole
        has_stepped = bool(optimizer.state)
        state = super().optimizer_state(optimizer)
        if not has_stepped:
            optimizer.state.clear()
            for entries in state["state"].values():
                entries |= {"step": torch.zeros_like(entries["step"])} if "step" in entries else {}
        return state

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()  # on all ranks
        return whole.cpu() if self.global_rank == 0 else None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, for the module to fit to the run before it is taken in: a file's tensors whole, a folder's
        sharded as the run's are. Of a folder only what the run has is read.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return self._read_folder(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return checkpoint

    def _read_folder(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        held = FileSystemReader(path).read_metadata().state_dict_metadata.keys()
        own = get_model_state_dict(self.model)
        state: dict[str, Any] = {"state_dict": {name: own[name] for name in own if f"state_dict.{name}" in held}}
        for number, optimizer in enumerate(self.optimizers):
            moments: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)
            prefix = f"optimizer_{number}.state"
            kept = {n: v for n, v in moments["state"].items() if all(f"{prefix}.{n}.{key}" in held for key in v)}
            state[f"optimizer_{number}"] = {"state": kept, "param_groups": moments["param_groups"]}
        load(state, checkpoint_id=path)
        rest: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
        optimizers = [state[f"optimizer_{number}"] for number in range(len(self.optimizers))]
        return rest | {"state_dict": state["state_dict"], "optimizer_states": optimizers}

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer is restored when the module has fitted its state to the run."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Shard what is whole, and take in the weights."""
        assert self.model is not None
        own, given = self.model.state_dict(), checkpoint["state_dict"]
        weights = {name: _like(value, own[name]) if name in own else value for name, value in given.items()}
        self.model.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard what is whole, and take in the optimizers' states, by the numbers of parameters."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _like(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """Sharded as the parameter is, where it is whole and has its shape."""
    is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if isinstance(parameter, DTensor) and is_whole and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements).to(parameter.device)
    return value


class AnyCheckpointIO(TorchCheckpointIO):
    """Reads also the folder of shards that FSDP2 writes, as if it were a file."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The checkpoint, whole, in this process's memory; optimizers by the names of their parameters."""
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **kwargs)
        shards = _load_distributed_checkpoint(Path(path))
        names = sorted(name for name in shards if name.startswith("optimizer_") and name != "optimizer_states")
        return shards | {"optimizer_states": [shards.pop(name) for name in names]}


def require_known(flag: Any) -> None:
    """Refuse a strategy by its name, before anything is built.

    Raises:
        UserError: the name is that of one of ``REFUSED``.
    """
    if isinstance(flag, str) and flag in StrategyRegistry.available_strategies():
        _require_offered(StrategyRegistry[flag]["strategy"])


def _require_offered(chosen: type[Strategy]) -> None:
    for kind, (reason, remedy) in REFUSED.items():
        if issubclass(chosen, kind) and not issubclass(chosen, FSDP2Strategy):
            raise UserError(f"trainer.strategy: {kind.__name__} {reason}. Use {remedy}.")


def require_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which this run could not go right; let the others read any checkpoint.

    Raises:
        UserError: it is one of ``REFUSED``, or what it is combined with cannot be had.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    _require_offered(type(strategy))
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise UserError(
            f"trainer.strategy: ddp with the start method {strategy._start_method!r} hands the run to its ranks as a "
            "pickle and gets nothing back, so metrics, tables and export would be lost. Use ddp, from a script or a "
            "terminal."
        )
    if isinstance(strategy, FSDP2Strategy) and precision.startswith("16"):
        raise UserError(
            f"trainer.precision {precision} scales the loss on each rank by itself, which sharded gradients do not "
            "allow. Use bf16-mixed, or 32-true."
        )
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AnyCheckpointIO()


def sharding_plan(trainer: Trainer) -> ShardingPlan:
    """How the run's strategy shards."""
    return ShardingPlan(
        torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None,
        reshard_after_forward=getattr(trainer.strategy, "reshard_after_forward", True),
        cpu_offload=getattr(trainer.strategy, "cpu_offload", False),
    )


if "fsdp2" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks")
