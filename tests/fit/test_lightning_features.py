"""Lightning's callbacks, schedules and flags: each trains both stages as it should, or is refused before training."""

import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from egspo_lightning import StageTransition
from egspo_lightning.errors import UserError


class NoTraining(Callback):
    """Fails when training starts."""

    def on_train_start(self, trainer, pl_module):
        pytest.fail("training has started")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (GradientAccumulationScheduler({0: 2}), r"set trainer\.accumulate_grad_batches"),
        (GradientAccumulationScheduler({2: 2}), r"set trainer\.accumulate_grad_batches"),
        (StochasticWeightAveraging(1e-3, swa_epoch_start=1), "Use EMAWeightAveraging or WeightAveraging"),
        (StochasticWeightAveraging(1e-3, swa_epoch_start=3), "Use EMAWeightAveraging or WeightAveraging"),
        (BatchSizeFinder(batch_arg_name="sft_batch_size"), r"Set data\.max_tokens_per_micro_batch"),
        (LearningRateFinder(attr_name="temperature"), r"Set the learning rates by model\.optimizer"),
    ],
)
def test_callbacks_that_cannot_keep_their_meaning_are_refused(tiny_run, callback, message):
    with pytest.raises(UserError, match=message):
        tiny_run(StageTransition(), callback, NoTraining()).fit()
