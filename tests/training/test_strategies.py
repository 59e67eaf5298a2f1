"""What a strategy cannot do is said at the start, with what can."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

from egspo_lightning.cli.main import main
from egspo_lightning.errors import UserError
from egspo_lightning.training.fsdp2_strategy import AnyCheckpointIO, FSDP2Strategy
from egspo_lightning.training.strategies import require_known, require_strategy

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
