import json
from pathlib import Path

import pytest

import grader_throughput
from egspo_lightning.rewards.fast_path import compare_fast

ROWS = [("1", "3"), ("x", r"\frac{x}{2}"), ("y", "x+1"), ("z", "(1, y)")]


@pytest.mark.slow
def test_report_has_both_kinds_of_pairs(tmp_path: Path, capsys) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "report.json"
    lines = [{"problem": p, "answer": a, "solution": rf"so \boxed{{{a}}}"} for p, a in ROWS]
    data.write_text("\n".join(map(json.dumps, lines)))
    grader_throughput.main(["--data", str(data), "--workers", "1", "2", "--repetitions", "1", "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["summary"]["completions"]["1"]["pairs"] == 8
    assert report["summary"]["completions"]["2"]["correct"] == 4
    assert report["summary"]["undecided"]["1"]["correct"] == 2
    assert {"math-verify", "sympy"} <= report["versions"].keys()
    assert len(report["measurements"]["undecided"]["2"]) == 1
    assert "| undecided (" in capsys.readouterr().out


def test_undecided_pairs_need_math_verify() -> None:
    rows = [("row", {"answer": answer, "solution": ""}) for _, answer in ROWS]
    pairs = grader_throughput.undecided(rows)
    assert pairs
    for completion, gold in pairs:
        assert compare_fast(completion.removeprefix(r"\boxed{").removesuffix("}"), gold) is None
