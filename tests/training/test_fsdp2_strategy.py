"""FSDP2: where shards stay, what they are gathered in, and how ranks reach each other."""

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
