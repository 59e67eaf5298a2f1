import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from egspo_lightning import TokenRecords
from egspo_lightning.analysis.record_reading import load, runs_below
from egspo_lightning.analysis.record_schema import COMPLETIONS, TOKENS, VERSION_KEY, file_of
from egspo_lightning.errors import UserError


def test_load_reads_all_tokens_and_completions(records, log_dir):
    assert list(records.tokens) == ["run", *TOKENS.names]
    assert list(records.completions) == ["run", *COMPLETIONS.names]
    assert set(records.tokens["run"]) == {"gated"}
    assert sorted(records.tokens["rollout_batch"].unique()) == [0, 1, 2]
    first = pq.read_table(file_of(log_dir, "tokens", 0, 0)).to_pandas()
    assert records.tokens["entropy"].iloc[: len(first)].tolist() == first["entropy"].tolist()
    lengths = records.tokens.groupby("completion_id").size()
    assert lengths.to_dict() == records.completions.set_index("completion_id")["length"].to_dict()


def test_csv_logger_metrics_have_one_row_per_step(records, log_dir):
    rows = records.metrics.dropna(subset=["gate/threshold"])
    assert rows["step"].tolist() == [1, 3, 5]
    taus = records.tokens.groupby("rollout_batch")["threshold"].first()
    assert rows["gate/threshold"].tolist() == pytest.approx(taus.tolist(), rel=1e-5)


def test_tensorboard_metrics_equal_csv_metrics(tiny_run, records):
    options = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 3}, "logger": True}
    run = tiny_run(TokenRecords(1), **options).fit()
    found = load(run.trainer.log_dir).metrics.dropna(subset=["gate/threshold"])
    expected = records.metrics.dropna(subset=["gate/threshold"])
    for name in ("step", "gate/threshold", "policy/entropy", "rollout/reward_mean"):
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-4), name


def test_run_without_logger_has_records_and_no_metrics(tiny_run, tmp_path):
    tiny_run(TokenRecords(1), module={"initial_stage": "egspo"}, trainer={"max_epochs": 1}).fit()
    found = load(tmp_path)
    assert len(found.tokens) > 0
    assert found.metrics.empty


def test_load_keeps_runs_separate(two_runs):
    assert two_runs.tokens["run"].unique().tolist() == ["gated", "open"]
    assert two_runs.completions.groupby("run").size().to_dict() == {"gated": 48, "open": 48}


def test_runs_with_the_same_name_are_refused(log_dir, open_log_dir):
    assert load([log_dir]).tokens["run"].unique().tolist() == ["run"]
    with pytest.raises(UserError, match=r"Two runs have one name: run, run\. Give names"):
        load([log_dir, open_log_dir])


def test_runs_below_lists_runs_by_age(log_dir, open_log_dir, tmp_path):
    assert runs_below(tmp_path) == [log_dir, open_log_dir]
    with pytest.raises(UserError, match="no run with token records below it"):
        runs_below(log_dir / "token_records")


def test_missing_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such run\. Give a log folder"):
        load(tmp_path / "nowhere")


def test_run_without_token_records_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no token records \(tokens\) .* token_records.every_n_rollout_batches"):
        load(tmp_path)


@pytest.mark.parametrize("version", [b"2", None])
def test_token_records_of_another_version_are_refused(log_dir, version):
    path = file_of(log_dir, "tokens", 1, 0)
    metadata = {} if version is None else {VERSION_KEY: version}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    given = "none" if version is None else "2"
    message = rf"tokens-000001-rank-0\.parquet: token records of version {given}, where .* 1"
    with pytest.raises(UserError, match=message):
        load(log_dir)


def test_corrupt_parquet_file_is_named_in_the_error(log_dir):
    file_of(log_dir, "completions", 2, 0).write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"completions-000002-rank-0\.parquet: not a readable Parquet file"):
        load(log_dir)


def test_unknown_columns_are_kept(log_dir):
    path = file_of(log_dir, "tokens", 0, 0)
    table = pq.read_table(path)
    pq.write_table(table.append_column("later", pa.array([1] * len(table))), path)
    assert load(log_dir).tokens["later"].count() == len(table)
