import json
from pathlib import Path

import pytest
import torch

from egspo_lightning.callbacks import PredictionWriter
from egspo_lightning.data.jsonl import JsonlProblems
from egspo_lightning.errors import UserError

ROWS = [{"id": f"p{i}", "problem": f"{i}+{i + 1}=?", "answer": str(2 * i + 1)} for i in range(5)]


@pytest.fixture
def problems(tmp_path: Path) -> JsonlProblems:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return JsonlProblems(str(path))


@pytest.mark.parametrize("batch_size", [2, 128])
def test_every_problem_is_answered_once_and_greedily(tiny_run, problems, tmp_path, batch_size):
    writer = PredictionWriter()
    run = tiny_run(writer, data={"problems": problems, "eval_batch_size": batch_size})
    (tmp_path / "predictions-rank-0.jsonl").write_text("of an earlier run\n")
    run.trainer.predict(run.module, run.data, return_predictions=False)
    assert writer.path(run.trainer) == tmp_path / "predictions-rank-0.jsonl"
    rows = [json.loads(line) for line in writer.path(run.trainer).read_text().splitlines()]
    assert [{key: row[key] for key in ("id", "problem", "answer")} for row in rows] == ROWS
    tokenizer = run.module.tokenizer
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["problem"])])
        output = (
            run.module.policy.lm.eval()
            .generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=18)[0, ids.shape[1] :]
            .tolist()
        )
        assert row["completion"] == tokenizer.decode(output, skip_special_tokens=True)
        assert row["is_truncated"] == (output[-1] != 256)
        assert row["correct"] is False  # random weights
        assert row["extracted"] is None


def test_the_folder_can_be_chosen(tiny_run, problems, tmp_path):
    run = tiny_run(PredictionWriter(str(tmp_path / "a" / "b")), data={"problems": problems})
    run.trainer.predict(run.module, run.data, return_predictions=False)
    assert len((tmp_path / "a" / "b" / "predictions-rank-0.jsonl").read_text().splitlines()) == 5


def test_problems_without_end_are_refused(tiny_run):
    run = tiny_run(PredictionWriter())
    with pytest.raises(UserError, match=r"data.problems: GeneratedProblems never ends.*JsonlProblems"):
        run.trainer.predict(run.module, run.data)
