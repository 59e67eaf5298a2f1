"""Sums, means and curves of a metrics.csv of Lightning's CSVLogger."""

from comparison import metrics

LOG = """epoch,eval/sums/avg@1,step,time/gate
,0.2,9,
2,,13,0.5
,0.4,17,
3,,17,0.25
"""


def test_metrics_logged_in_some_rows_only(tmp_path):
    (tmp_path / "metrics.csv").write_text(LOG)
    logged = metrics.read(tmp_path / "metrics.csv")
    assert metrics.total(logged, "time/gate") == 0.75
    assert metrics.mean(logged, "time/gate") == 0.375
    assert metrics.total(logged, "absent") is metrics.mean(logged, "absent") is None
    assert metrics.curve(logged, 10, 4, "eval/sums/avg@1") == [(0.0, 0.2), (2.0, 0.4)]
    assert metrics.curve(logged, 14, 4, "eval/sums/avg@1") == [(1.0, 0.4)]
