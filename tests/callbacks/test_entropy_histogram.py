from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from egspo_lightning.callbacks import EntropyHistogram, StageTransition
from egspo_lightning.errors import UserError

ONE_COLLECTION = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 1}, "logger": True}


def files(run) -> list[str]:
    return sorted(path.name for path in (Path(run.trainer.log_dir) / "token_records").glob("*"))


def records(run, number: int = 0) -> list[dict]:
    path = Path(run.trainer.log_dir) / "token_records" / f"collection-{number:06d}-rank-0.parquet"
    return pq.read_table(path).to_pylist()


def test_histograms_are_logged_for_each_collection(tiny_run, events):
    run = tiny_run(EntropyHistogram(), StageTransition(), logger=True).fit()
    log = events(run.trainer)
    for name in ("all", "high", "low"):
        assert [event.step for event in log.Histograms(f"entropy/{name}")] == [4, 6]  # none in SFT


def test_histograms_hold_every_completion_token_and_split_at_the_threshold(tiny_run, events):
    run = tiny_run(EntropyHistogram(), **ONE_COLLECTION).fit()
    rollout, log = run.data.collection.rollout, events(run.trainer)
    histogram = {name: log.Histograms(f"entropy/{name}")[0].histogram_value for name in ("all", "high", "low")}
    values = rollout.entropies[rollout.completion_mask]
    assert histogram["all"].num == len(values) == sum(len(c.token_ids) for c in run.data.collection.completions)
    assert histogram["all"].sum == pytest.approx(values.sum().item(), rel=1e-5)
    assert histogram["high"].num == (values >= rollout.threshold[0]).sum() > 0
    assert histogram["high"].num + histogram["low"].num == histogram["all"].num
    assert histogram["high"].min >= rollout.threshold[0].item() - 1e-6
    assert histogram["low"].max < rollout.threshold[0].item()


def test_records_are_recomputed_from_the_collection(tiny_run):
    run = tiny_run(EntropyHistogram(), **ONE_COLLECTION).fit()
    (rollout, completions), tokenizer = run.data.collection[1::-1], run.module.tokenizer
    rows = iter(records(run))
    num_high = 0
    for number, completion in enumerate(completions):
        start = int(rollout.completion_mask[number].nonzero()[0])
        for position, token_id in enumerate(completion.token_ids):
            row, at = next(rows), (number, start + position)
            entropy, logprob = rollout.entropies[at].item(), rollout.old_logprobs[at].item()
            p = torch.tensor(logprob).exp().item()
            is_high = entropy >= rollout.threshold[0].item()
            num_high += is_high
            assert (row["collection"], row["policy_version"]) == (0, 0)
            assert (row["completion"], row["position"]) == (number, position)
            assert row["problem_id"] == completion.problem.id
            assert (row["token_id"], row["token"]) == (token_id, tokenizer.decode([token_id]))
            assert row["entropy"] == pytest.approx(entropy)
            assert row["old_logprob"] == pytest.approx(logprob)
            assert row["is_high_entropy"] == is_high
            assert row["token_weight"] == pytest.approx(1.0 if is_high else p * (1 - p))
            assert row["advantage"] == pytest.approx(rollout.advantages[number, start].item())
            assert row["reward"] == pytest.approx(completion.reward)
            assert row["threshold"] == pytest.approx(rollout.threshold[0].item())
    assert next(rows, None) is None
    total = sum(len(c.token_ids) for c in completions)
    assert num_high / total == pytest.approx(0.2, abs=1 / total + 1e-9)


def test_only_some_completions_are_recorded_where_that_is_asked_for(tiny_run):
    run = tiny_run(EntropyHistogram(max_recorded_completions=3), **ONE_COLLECTION).fit()
    rows = records(run)
    assert {row["completion"] for row in rows} == {0, 1, 2}
    assert len(rows) == sum(len(c.token_ids) for c in run.data.collection.completions[:3])


@pytest.mark.parametrize(("every", "numbers"), [(1, [0, 1, 2]), (2, [0, 2]), (10, [0]), (0, [])])
def test_records_come_every_n_collections(tiny_run, every, numbers):
    options = ONE_COLLECTION | {"trainer": {"max_epochs": 3}}
    run = tiny_run(EntropyHistogram(every_n_collections=0, record_every_n_collections=every), **options).fit()
    assert files(run) == [f"collection-{number:06d}-rank-0.parquet" for number in numbers]


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 6]), (0, [])])
def test_histograms_come_every_n_collections(tiny_run, events, every, steps):
    options = ONE_COLLECTION | {"trainer": {"max_epochs": 3}}
    run = tiny_run(EntropyHistogram(every, record_every_n_collections=0), **options).fit()
    log = events(run.trainer)
    found = [event.step for event in log.Histograms("entropy/all")] if steps else log.Tags()["histograms"]
    assert found == steps


def test_without_a_logger_records_go_to_the_root_folder(tiny_run, tmp_path):
    tiny_run(EntropyHistogram(), **ONE_COLLECTION | {"logger": False}).fit()
    assert [path.name for path in (tmp_path / "token_records").iterdir()] == ["collection-000000-rank-0.parquet"]


@pytest.mark.parametrize("field", ["every_n_collections", "record_every_n_collections", "max_recorded_completions"])
def test_negative_numbers_are_refused(field):
    with pytest.raises(UserError, match=f"entropy_histogram.{field} must be at least 0, got -1"):
        EntropyHistogram(**{field: -1})
