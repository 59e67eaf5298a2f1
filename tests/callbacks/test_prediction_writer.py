import json
from pathlib import Path

import pytest
import torch

from egspo_lightning import PredictionWriter
from egspo_lightning.data.dataset_sources import DatasetProblems
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.answers import AnswerSampling

ROWS = [{"id": f"p{i}", "problem": f"{i}+{i + 1}=?", "answer": str(2 * i + 1)} for i in range(5)]
ROWS[3] = {"id": "p3", "problem": "3+4=?"}  # no reference answer


@pytest.fixture
def problems(tmp_path: Path) -> DatasetProblems:
    return DatasetProblems(str(written(tmp_path, ROWS)))


def written(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predict(run, module=None) -> list[dict]:
    run.trainer.predict(module or run.module, run.data, return_predictions=False)
    return [json.loads(line) for line in run.trainer.callbacks[0].path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [2, 128])
def test_predict_answers_every_problem_once_with_greedy_decoding(tiny_run, problems, tmp_path, batch_size):
    run = tiny_run(PredictionWriter(), data={"problems": problems, "eval_batch_size": batch_size})
    rows = predict(run)
    assert run.trainer.callbacks[0].path.parent.parent == tmp_path / "predictions"
    assert [{key: row[key] for key in ("id", "problem", "answer")} for row in rows] == [
        row | {"answer": row.get("answer")} for row in ROWS
    ]
    tokenizer = run.module.tokenizer
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["problem"])])
        output = (
            run.module.policy.lm.eval()
            .generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=18)[0, ids.shape[1] :]
            .tolist()
        )
        assert row["completion"] == tokenizer.decode(output, skip_special_tokens=True)
        assert (row["is_truncated"], row["length"]) == (output[-1] != 256, len(output))
        assert row["extracted"] is None  # random weights
        assert (row["correct"], row["status"]) == (
            (None, "no_reference") if row["id"] == "p3" else (False, "no_answer")
        )


def test_predict_gives_verdicts_for_problems_with_answers(tiny_run, tmp_path):
    """The policy has memorized these sums."""
    from egspo_lightning.data.dataset_sources import DatasetDemonstrations

    sums = [{"id": f"s{i}", "problem": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(1, 5)]
    learned = [row | {"solution": f"\\boxed{{{row['answer']}}}"} for row in sums]
    demonstrations = DatasetDemonstrations(str(written(tmp_path, learned)))
    run = tiny_run(data={"demonstrations": demonstrations, "sft_batch_size": 4}, trainer={"max_epochs": 60}).fit()
    asked = [sums[0], sums[1] | {"answer": "5"}, {"id": "x", "problem": sums[2]["problem"], "answer": None}]
    source = DatasetProblems(str(written(tmp_path, asked)))
    answering = tiny_run(PredictionWriter(), data={"problems": source})
    rows = predict(answering, run.module)
    assert [(row["extracted"], row["correct"]) for row in rows] == [("2", True), ("4", False), ("6", None)]


def test_predict_sampling_can_be_set(tiny_run, problems):
    sampling = AnswerSampling(num_samples=3, temperature=1.0, max_completion_length=4)
    rows = predict(tiny_run(PredictionWriter(), data={"problems": problems, "predict_sampling": sampling}))
    assert [(row["id"], row["sample"]) for row in rows] == [(row["id"], i) for row in ROWS for i in range(3)]
    assert len({row["completion"] for row in rows}) > 5
    assert max(row["length"] for row in rows) <= 4


def test_several_greedy_predict_samples_are_refused(tiny_run, problems):
    data = {"problems": problems, "predict_sampling": AnswerSampling(num_samples=3)}
    with pytest.raises(UserError, match=r"data.predict_sampling: num_samples is 3, but at temperature 0"):
        predict(tiny_run(PredictionWriter(), data=data))


def test_other_problems_do_not_change_earlier_predictions(tiny_run, tmp_path):
    first = tiny_run(PredictionWriter(), data={"problems": DatasetProblems(str(written(tmp_path, ROWS)))})
    predict(first)
    before = first.trainer.callbacks[0].path
    kept = before.read_bytes()
    second = tiny_run(PredictionWriter(), data={"problems": DatasetProblems(str(written(tmp_path, ROWS[:2])))})
    assert len(predict(second)) == 2
    assert second.trainer.callbacks[0].path != before
    assert before.read_bytes() == kept


def test_given_prediction_folder_is_not_overwritten(tiny_run, tmp_path, problems):
    folder = tmp_path / "a" / "b"
    assert len(predict(tiny_run(PredictionWriter(str(folder)), data={"problems": problems}))) == 5
    assert sorted(path.name for path in folder.iterdir()) == ["completions.jsonl", "settings.json"]
    assert len(predict(tiny_run(PredictionWriter(str(folder)), data={"problems": problems}))) == 5
    other = DatasetProblems(str(written(tmp_path, ROWS[:2])))
    with pytest.raises(UserError, match="holds answers under other settings: num_problems, problems"):
        predict(tiny_run(PredictionWriter(str(folder)), data={"problems": other}))


def test_training_on_problems_without_answers_is_refused(tiny_run, problems):
    with pytest.raises(UserError, match=r"problems.jsonl:4: field 'answer' .* is missing"):
        tiny_run(data={"problems": problems}).fit()


def test_predict_refuses_duplicate_problem_ids(tiny_run, tmp_path):
    path = written(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(UserError, match=r"data\.problems: 2 problems have the id 'p0'"):
        predict(tiny_run(PredictionWriter(), data={"problems": DatasetProblems(str(path))}))


def test_predict_on_an_endless_source_is_refused(tiny_run):
    run = tiny_run(PredictionWriter())
    with pytest.raises(UserError, match=r"data.problems: GeneratedProblems never ends.*DatasetProblems"):
        run.trainer.predict(run.module, run.data)
