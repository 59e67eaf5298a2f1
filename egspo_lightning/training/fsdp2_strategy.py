"""FSDP2 strategy, ``--trainer.strategy fsdp2``: shards weights, gradients and optimizer over all ranks."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all ranks: ``--trainer.strategy fsdp2``.

    With ``--trainer.precision bf16-mixed`` weights are gathered and computed in bfloat16; all else stays in float32.

    Args:
        reshard_after_forward: Free a block's gathered weights between forward and backward pass (ZeRO-3); false holds
            them (ZeRO-2): less traffic, more memory.
        cpu_offload: Keep shards, gradients and the optimizer's state in the host's memory, and step there.
        save_distributed_checkpoint: Write a folder with one shard per rank; false writes one file, which the first
            rank must hold in its memory. Both resume under any strategy.
        process_group_backend: nccl or gloo; null takes the device's default.
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
        """Shard over all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Leave offloaded shards in the host's memory; sharding has moved the buffers to the device."""
        if not self.cpu_offload:
            return super().model_to_device()
        assert self.model is not None
        return _update_properties(self.model, device=self.root_device)

    def _get_process_group_backend(self) -> str:
        """Add gloo for offloaded shards, whose norms and whole tensors are reduced between the hosts' memories."""
        backend, device = super()._get_process_group_backend(), self.root_device.type
        return backend if not self.cpu_offload or device == "cpu" or ":" in backend else f"{device}:{backend},cpu:gloo"

    # Checkpoint files hold whole tensors, and optimizer states by parameter number, as other strategies write them

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state: by name and sharded for a folder; by number and whole, on the first rank, for a file.

        To save an optimizer that has not stepped, torch takes a step with zero gradients. Its traces are undone here.
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
        """Load a checkpoint: a file's tensors whole, of a folder what this run has, sharded as in this run."""
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
        """Let Lightning restore the optimizer, after the module has adapted its state to the run."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, and shard those that are whole."""
        assert self.model is not None
        own, given = self.model.state_dict(), checkpoint["state_dict"]
        weights = {name: _like(value, own[name]) if name in own else value for name, value in given.items()}
        self.model.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states by parameter number, and shard tensors that are whole."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _like(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """Shard a whole tensor like the parameter, if it has the parameter's shape."""
    is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if isinstance(parameter, DTensor) and is_whole and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements).to(parameter.device)
    return value


class AnyCheckpointIO(TorchCheckpointIO):
    """Reads checkpoint files, and also the folders of shards that FSDP2 writes."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the whole checkpoint into this process's memory; a folder's optimizers go by parameter names."""
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **kwargs)
        shards = _load_distributed_checkpoint(Path(path))
        names = sorted(name for name in shards if name.startswith("optimizer_") and name != "optimizer_states")
        return shards | {"optimizer_states": [shards.pop(name) for name in names]}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks", override=True)
OFFLOADED = "FSDP2 over all ranks, its shards in the host's memory"
StrategyRegistry.register("fsdp2_cpu_offload", FSDP2Strategy, description=OFFLOADED, override=True, cpu_offload=True)
