"""What a strategy cannot do is said at the start, with what can."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from egspo_lightning.cli.main import main
from egspo_lightning.errors import UserError
from egspo_lightning.models.fsdp import shard
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.training.strategies import (
    AnyCheckpointIO,
    FSDP2Strategy,
    require_known,
    require_strategy,
    sharding_plan,
)

TAKEN = {"auto", "single_device", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "fsdp2"}


def told(strategy: Any, precision: str = "32-true") -> str:
    with pytest.raises(UserError) as error:
        require_strategy(SimpleNamespace(strategy=strategy, precision=precision))  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("name", sorted({*StrategyRegistry.available_strategies(), "auto"}))
def test_each_of_lightnings_names_is_taken_or_refused_with_an_alternative(name, repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    if name in TAKEN:
        require_known(name)
        return
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=configs/quickstart.yaml", f"--trainer.strategy={name}"])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: trainer" in message
    if not name.startswith(("single_", "ddp_")):  # TPUs, and what Lightning itself says of forks
        assert "Use " in message


def test_a_start_method_that_pickles_the_run_is_refused():
    assert "Use ddp" in told(DDPStrategy(start_method="spawn"))


def test_lightnings_own_strategy_for_fsdp2_names_ours():
    assert "FSDP2Strategy" in told(ModelParallelStrategy(2, 1))


def test_fsdp2_refuses_a_loss_that_each_rank_scales_by_itself():
    assert "bf16-mixed" in told(FSDP2Strategy(), "16-mixed")


def test_every_strategy_reads_a_folder_of_shards_and_a_plugin_of_the_users_stays():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    require_strategy(trainer)
    assert type(trainer.strategy.checkpoint_io) is AnyCheckpointIO

    class Own(TorchCheckpointIO):
        pass

    own = Own()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[own])
    require_strategy(trainer)
    assert trainer.strategy.checkpoint_io is own


def placed(device: str = "cuda:0", **arguments: Any) -> FSDP2Strategy:
    strategy = FSDP2Strategy(**arguments)
    strategy.parallel_devices, strategy.cluster_environment = [torch.device(device)], LightningEnvironment()
    return strategy


def test_offloaded_shards_talk_from_host_to_host():
    assert placed()._get_process_group_backend() == "nccl"
    assert placed(cpu_offload=True)._get_process_group_backend() == "cuda:nccl,cpu:gloo"
    own = placed(cpu_offload=True, process_group_backend="cuda:gloo,cpu:gloo")
    assert own._get_process_group_backend() == "cuda:gloo,cpu:gloo"
    assert placed("cpu", cpu_offload=True)._get_process_group_backend() == "gloo"


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_shards_stay_where_they_are(offload):
    """The device is one without data, for want of a GPU."""
    strategy = placed("meta", cpu_offload=offload)
    strategy._lightning_module = strategy.model = LightningModule()
    strategy.model.layer = torch.nn.Linear(2, 2)
    strategy.model_to_device()
    assert strategy.model.device.type == "meta"  # where batches go
    assert strategy.model.layer.weight.device.type == ("cpu" if offload else "meta")


def test_precision_decides_what_weights_are_gathered_in_and_gradients_are_summed_in_float32():
    run = SimpleNamespace(strategy=FSDP2Strategy(reshard_after_forward=False), precision="bf16-mixed")
    plan = sharding_plan(run)  # type: ignore[arg-type]
    assert (plan.precision.param_dtype, plan.precision.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not plan.reshard_after_forward
    assert not plan.cpu_offload
    run.precision = "32-true"
    assert sharding_plan(run).precision.param_dtype is None  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", [False, True])
def test_every_shard_is_offloaded_and_pinned_for_a_gpu_alone(small_model, offload):
    plan = sharding_plan(SimpleNamespace(strategy=FSDP2Strategy(cpu_offload=offload), precision="32-true"))  # type: ignore[arg-type]
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        policy = PolicyConfig(small_model, from_scratch=True).build(with_value_head=True)
        shard(policy, init_device_mesh("cpu", (1,)), plan)
        parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        groups = [part._get_fsdp_state()._fsdp_param_group for part in parts]
        assert len(groups) == 3  # the block, the value head, and the rest
        for parameter in [p for group in groups if group is not None for p in group.fsdp_params]:
            assert (parameter.offload_to_cpu, parameter.pin_memory) == (offload, False)
    finally:
        destroy_process_group()
    assert not offload or plan.offloading("cuda").pin_memory
