"""Sums, means and curves of a logged_metrics.csv of Lightning's CSVLogger."""

from egspo_lightning.cli.comparison import logged_metrics

LOG = """epoch,eval/sums/avg@1,step,time/gate
,0.2,9,
2,,13,0.5
,0.4,17,
3,,17,0.25
"""


def test_metrics_logged_in_some_rows_only(tmp_path):
    (tmp_path / "metrics.csv").write_text(LOG)
    logged = logged_metrics.read(tmp_path / "metrics.csv")
    assert logged_metrics.total(logged, "time/gate") == 0.75
    assert logged_metrics.mean(logged, "time/gate") == 0.375
    assert logged_metrics.total(logged, "absent") is logged_metrics.mean(logged, "absent") is None
    assert logged_metrics.curve(logged, 10, 4, "eval/sums/avg@1") == [(0.0, 0.2), (2.0, 0.4)]
    assert logged_metrics.curve(logged, 14, 4, "eval/sums/avg@1") == [(1.0, 0.4)]
