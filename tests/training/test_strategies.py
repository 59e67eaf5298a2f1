"""Unsupported strategies are refused at the start with an alternative."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

from egspo_lightning.cli.main import main
from egspo_lightning.errors import UserError
from egspo_lightning.training.fsdp2_strategy import AnyCheckpointIO, FSDP2Strategy
from egspo_lightning.training.strategies import offered_name, require_known, require_strategy

KNOWN = {"auto", "single_device", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"}
KNOWN |= {"fsdp2", "fsdp2_cpu_offload", "fsdp", "fsdp_cpu_offload"}


def refusal(strategy: Any, precision: str = "32-true") -> str:
    with pytest.raises(UserError) as error:
        require_strategy(SimpleNamespace(strategy=strategy, precision=precision))  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("name", sorted({*StrategyRegistry.available_strategies(), "auto"}))
def test_every_lightning_strategy_name_is_supported_or_refused_with_alternative(name, repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    if name in KNOWN:
        require_known(offered_name(name))
        return
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=configs/quickstart.yaml", f"--trainer.strategy={name}"])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: trainer" in message
    if not name.startswith(("single_", "ddp_")):  # for TPUs and forks the message is Lightning's own
        assert "Use " in message


@pytest.mark.parametrize(("flag", "name"), [("fsdp", "fsdp2"), ("fsdp_cpu_offload", "fsdp2_cpu_offload")])
def test_names_of_fsdp1_train_as_fsdp2(flag, name, monkeypatch):
    said = []
    monkeypatch.setattr("egspo_lightning.training.strategies.rank_zero_info", said.append)
    assert [offered_name(flag), offered_name("ddp")] == [name, "ddp"]
    assert said == [f"trainer.strategy: {flag} trains as {name}, PyTorch's second version of FSDP."]
    kind = StrategyRegistry[name]
    assert kind["strategy"] is FSDP2Strategy
    assert kind["init_params"] == ({"cpu_offload": True} if flag.endswith("offload") else {})


def test_ddp_with_spawn_is_refused():
    assert "Use ddp" in refusal(DDPStrategy(start_method="spawn"))


def test_model_parallel_strategy_error_names_fsdp2_strategy():
    assert "FSDP2Strategy" in refusal(ModelParallelStrategy(2, 1))


def test_fsdp2_refuses_16_mixed_precision():
    assert "bf16-mixed" in refusal(FSDP2Strategy(), "16-mixed")


def test_strategy_gets_sharded_checkpoint_io_unless_user_gives_a_plugin():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    require_strategy(trainer)
    assert type(trainer.strategy.checkpoint_io) is AnyCheckpointIO

    class Own(TorchCheckpointIO):
        pass

    own = Own()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[own])
    require_strategy(trainer)
    assert trainer.strategy.checkpoint_io is own
