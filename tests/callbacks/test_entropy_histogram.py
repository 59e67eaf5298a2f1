import pytest

from egspo_lightning import EntropyHistogram, StageTransition

ONE_ROLLOUT_BATCH = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 1}, "logger": True}


def test_histograms_are_logged_for_each_rollout_batch(tiny_run, events):
    run = tiny_run(EntropyHistogram(), StageTransition(), logger=True).fit()
    log = events(run.trainer)
    for name in ("all", "high", "low"):
        assert [event.step for event in log.Histograms(f"entropy/{name}")] == [3, 5]  # none in SFT
    assert [event.step for event in log.Scalars("gate/threshold")] == [3, 5]


def test_histograms_contain_every_completion_token_and_split_at_the_threshold(tiny_run, events):
    run = tiny_run(EntropyHistogram(), **ONE_ROLLOUT_BATCH).fit()
    rollout, log = run.data.phases.rollouts.batch, events(run.trainer)
    histogram = {name: log.Histograms(f"entropy/{name}")[0].histogram_value for name in ("all", "high", "low")}
    values = rollout.entropies[rollout.completion_mask]
    assert histogram["all"].num == len(values) == sum(len(c.token_ids) for c in run.data.phases.rollouts.completions)
    assert histogram["all"].sum == pytest.approx(values.sum().item(), rel=1e-5)
    assert histogram["high"].num == (values >= rollout.threshold[0]).sum() > 0
    assert histogram["high"].num + histogram["low"].num == histogram["all"].num
    assert histogram["high"].min >= rollout.threshold[0].item() - 1e-6
    assert histogram["low"].max < rollout.threshold[0].item()


@pytest.mark.parametrize(("every", "steps"), [(2, [1, 5]), (0, [])])
def test_histograms_are_logged_every_n_rollout_batches(tiny_run, events, every, steps):
    options = ONE_ROLLOUT_BATCH | {"trainer": {"max_epochs": 3}}
    run = tiny_run(EntropyHistogram(every), **options).fit()
    log = events(run.trainer)
    found = [event.step for event in log.Histograms("entropy/all")] if steps else log.Tags()["histograms"]
    assert found == steps
