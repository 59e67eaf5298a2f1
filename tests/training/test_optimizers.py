"""8-bit AdamW of bitsandbytes, which also runs on a CPU. tests/fit/test_resume.py tests resuming with it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from egspo_lightning import StageTransition
from egspo_lightning.cli.main import main
from egspo_lightning.cli.parser import missing_package
from egspo_lightning.cli.plan import workload
from egspo_lightning.errors import UserError
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.training.memory_plan import plan
from egspo_lightning.training.optimizers import build_optimizer

EIGHT_BIT = ["--model.optimizer=bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr=1e-3"]


@pytest.fixture
def adamw8bit():
    reason = 'needs bitsandbytes: pip install "egspo-lightning[8bit]"'
    return pytest.importorskip("bitsandbytes", reason=reason).optim.AdamW8bit


@pytest.fixture
def flags():
    return SimpleNamespace(precision="32-true", accumulate_grad_batches=1, strategy="auto")


def optimizer_bytes(state):
    """Bytes of the tensors in an optimizer state, counting each storage once."""
    tensors = [v for entries in state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
    return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}.values())


def test_run_trains_with_8_bit_moments_and_plan_counts_their_bytes(tiny_run, tiny_model, adamw8bit, flags):
    """2 bytes per parameter, two scales per block of 256 and two tables; tensors below 4096 have 8 bytes each."""
    policy = PolicyConfig(tiny_model, from_scratch=True)
    module = {"policy": policy, "optimizer": lambda params: adamw8bit(params, lr=1e-2, weight_decay=0.0)}
    run = tiny_run(StageTransition(after_epochs=2), module=module).fit()
    state, parameters = run.trainer.optimizers[0].state, list(run.module.policy.parameters())
    large = [p.numel() for p in parameters if p.numel() >= 4096]
    assert [p.numel() for p in parameters if state[p]["state1"].dtype == torch.uint8] == large
    assert 2 <= len(large) < len(parameters)
    expected = sum(2 * size + 2 * 4 * -(-size // 256) for size in large) + 2 * 256 * 4
    expected += sum(8 * p.numel() for p in parameters if p.numel() < 4096)
    assert optimizer_bytes(state) == expected
    assert plan(workload(run.module, run.data, flags, 1), 1).optimizer == expected


def test_8_bit_steps_are_close_to_those_of_torch_adamw(adamw8bit):
    """The first step is equal, because moments are rounded after they have been used."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(64, 128)) for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.0}
    optimizers = build_optimizer(lambda p: adamw8bit(p, **settings), [ours]), torch.optim.AdamW([theirs], **settings)
    for step in range(10):
        gradient = torch.randn(64, 128)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        if step == 0:
            assert torch.allclose(ours, theirs, atol=1e-6)
    assert 0 < (ours - theirs).abs().mean() < 0.1 * (theirs - 1).abs().mean()


@pytest.fixture
def mesh():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_8_bit_optimizer_with_sharded_weights_is_refused(mesh, adamw8bit):
    layer = nn.Linear(64, 128)
    fully_shard(layer, mesh=mesh)
    with pytest.raises(UserError, match=r"model\.optimizer: AdamW8bit .* torch\.optim\.AdamW"):
        build_optimizer(adamw8bit, list(layer.parameters()))
    build_optimizer(torch.optim.AdamW, list(layer.parameters()))


def test_plan_refuses_8_bit_optimizer_with_sharding(repository, monkeypatch, capsys, adamw8bit):
    monkeypatch.chdir(repository)
    config = ["plan", "--config=configs/quickstart.yaml", *EIGHT_BIT, "--num_devices=2"]
    main(config)
    assert "fits" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*config, "--trainer.accelerator=gpu", "--trainer.strategy=fsdp2"])
    assert stop.value.code == 2
    assert "AdamW8bit of bitsandbytes cannot step weights" in capsys.readouterr().err


class HideBitsandbytes:
    """Import hook that hides bitsandbytes, as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_missing_bitsandbytes_error_says_what_to_install(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(sys, "meta_path", [HideBitsandbytes(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=configs/quickstart.yaml", *EIGHT_BIT])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "model.optimizer" in message
    assert 'pip install "egspo-lightning[8bit]"' in message
    assert "Traceback" not in message


def test_missing_package_ignores_modules_of_the_user():
    assert missing_package("No module named 'mine'") == missing_package("Expected a path") == ""
