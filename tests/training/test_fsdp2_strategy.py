"""FSDP2 strategy: device of the shards, gather precision, and process-group backend."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from egspo_lightning.models.fsdp import shard
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.training.fsdp2_strategy import FSDP2Strategy
from egspo_lightning.training.strategies import sharding_plan


def strategy_on(device: str = "cuda:0", **arguments: Any) -> FSDP2Strategy:
    strategy = FSDP2Strategy(**arguments)
    strategy.parallel_devices, strategy.cluster_environment = [torch.device(device)], LightningEnvironment()
    return strategy


def test_cpu_offload_adds_gloo_backend_for_the_host():
    assert strategy_on()._get_process_group_backend() == "nccl"
    assert strategy_on(cpu_offload=True)._get_process_group_backend() == "cuda:nccl,cpu:gloo"
    own = strategy_on(cpu_offload=True, process_group_backend="cuda:gloo,cpu:gloo")
    assert own._get_process_group_backend() == "cuda:gloo,cpu:gloo"
    assert strategy_on("cpu", cpu_offload=True)._get_process_group_backend() == "gloo"


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_weights_stay_on_the_cpu(offload):
    """The meta device stands for a GPU."""
    strategy = strategy_on("meta", cpu_offload=offload)
    strategy._lightning_module = strategy.model = LightningModule()
    strategy.model.layer = torch.nn.Linear(2, 2)
    strategy.model_to_device()
    assert strategy.model.device.type == "meta"  # the device of the batches
    assert strategy.model.layer.weight.device.type == ("cpu" if offload else "meta")


def test_precision_sets_gather_dtype_and_gradients_are_reduced_in_float32():
    run = SimpleNamespace(strategy=FSDP2Strategy(reshard_after_forward=False), precision="bf16-mixed")
    plan = sharding_plan(run)  # type: ignore[arg-type]
    assert (plan.precision.param_dtype, plan.precision.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not plan.reshard_after_forward
    assert not plan.cpu_offload
    run.precision = "32-true"
    assert sharding_plan(run).precision.param_dtype is None  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", [False, True])
def test_all_shards_are_offloaded_and_pinned_only_for_a_gpu(small_model, offload):
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
