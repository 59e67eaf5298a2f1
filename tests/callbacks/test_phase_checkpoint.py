import pytest
import torch

from egspo_lightning import PhaseCheckpoint


@pytest.mark.parametrize(("epochs", "saved"), [(3, [2, 3]), (4, [2, 4])])
def test_last_epoch_is_saved_for_any_interval(tiny_run, tmp_path, epochs, saved):
    checkpoint = PhaseCheckpoint(dirpath=tmp_path, every_n_epochs=2, save_top_k=-1, save_last=True)
    run = tiny_run(checkpoint, trainer={"max_epochs": epochs, "enable_checkpointing": True}).fit()
    names = sorted(path.name for path in tmp_path.glob("epoch*.ckpt"))
    assert names == [f"epoch={epoch - 1}-step={2 * epoch}.ckpt" for epoch in saved]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in run.module.state_dict().items():
        assert torch.equal(last[name], value)
