from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import TokenRecords
from egspo_lightning.analysis.record_schema import COMPLETIONS, TOKENS, VERSION, VERSION_KEY
from egspo_lightning.data.sources import FiniteProblems
from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import ConstantAttenuation
from egspo_lightning.ops.estimators import GroupRelative
from egspo_lightning.types import Problem

ONE_ROLLOUT_BATCH = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 1}, "logger": True}


def folder(run) -> Path:
    return Path(run.trainer.log_dir) / "token_records"


def files(run, kind="tokens") -> list[str]:
    return sorted(path.name for path in folder(run).glob(f"{kind}-*"))


def names(*numbers: int, kind="tokens") -> list[str]:
    return [f"{kind}-{number:06d}-rank-0.parquet" for number in numbers]


def records(run, kind="tokens", number: int = 0) -> list[dict]:
    return pq.read_table(folder(run) / f"{kind}-{number:06d}-rank-0.parquet").to_pylist()


def test_token_records_match_the_rollout_batch(tiny_run):
    run = tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH).fit()
    (rollout, completions), tokenizer = run.data.phases.rollouts[1::-1], run.module.tokenizer
    with run.module.sampling() as lm:  # recomputed from the logits after the optimizer steps
        logits = lm(rollout.input_ids).logits.log_softmax(-1)
    rows = iter(records(run))
    num_high = 0
    for number, completion in enumerate(completions):
        start = int(rollout.completion_mask[number].nonzero()[0])
        for position, token_id in enumerate(completion.token_ids):
            row, at = next(rows), (number, start + position)
            entropy, logprob = rollout.entropies[at].item(), rollout.old_logprobs[at].item()
            p = torch.tensor(logprob).exp().item()
            is_high = entropy >= rollout.threshold[0].item()
            after = logits[number, start + position - 1]
            num_high += is_high
            expected = {
                "entropy": entropy,
                "old_logprob": logprob,
                "phi": p * (1 - p),
                "token_weight": 1.0 if is_high else p * (1 - p),
                "advantage": rollout.advantages[number, start].item(),
                "ratio": (after[token_id] - logprob).exp().item(),
                "entropy_after": -(after.exp() * after).sum().item(),
                "reward": completion.reward,
                "threshold": rollout.threshold[0].item(),
            }
            assert {name: row.pop(name) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert row == {
                "rollout_batch": 0,
                "stage": "egspo",
                "policy_version": 0,
                "problem_id": completion.problem.id,
                "completion_id": f"0/0/{number}",
                "position": position,
                "token_id": token_id,
                "token": tokenizer.decode([token_id]),
                "is_high_entropy": is_high,
                "is_masked": False,
            }
    assert next(rows, None) is None
    total = sum(len(c.token_ids) for c in completions)
    assert num_high / total == pytest.approx(0.2, abs=1 / total + 1e-9)


def test_completion_records_match_the_rollout_batch(tiny_run):
    run = tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH).fit()
    completions = run.data.phases.rollouts.completions
    for number, (row, completion) in enumerate(zip(records(run, "completions"), completions, strict=True)):
        assert row.pop("reward") == pytest.approx(completion.reward)
        assert row == {
            "rollout_batch": 0,
            "stage": "egspo",
            "policy_version": 0,
            "problem_id": completion.problem.id,
            "completion_id": f"0/0/{number}",
            "problem": completion.problem.problem,
            "completion": completion.text,
            "gold": completion.problem.answer,
            "extracted": completion.extracted,
            "is_correct": completion.correct,
            "length": len(completion.token_ids),
            "is_truncated": completion.is_truncated,
            "is_masked": False,
        }


def test_recorded_ratio_moves_with_the_advantage(tiny_run):
    run = tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH).fit()
    rows = [row for row in records(run) if row["is_high_entropy"] and abs(row["advantage"]) > 0.5]
    up = [row["ratio"] for row in rows if row["advantage"] > 0]
    down = [row["ratio"] for row in rows if row["advantage"] < 0]
    assert sum(up) / len(up) > 1 > sum(down) / len(down)


@pytest.mark.parametrize("tokens_at_a_time", [1, 40, 10_000])
def test_records_do_not_depend_on_the_scoring_batch_size(tiny_run, monkeypatch, tokens_at_a_time):
    expected = records(tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH).fit())
    monkeypatch.setattr("egspo_lightning.callbacks.trainer_access.TOKENS_PER_SCORING_BATCH", tokens_at_a_time)
    found = records(tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH).fit())
    assert [row["ratio"] for row in found] == pytest.approx([row["ratio"] for row in expected], rel=1e-5)


def test_record_files_have_version_and_column_meanings(tiny_run):
    run = tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH).fit()
    for kind, schema in (("tokens", TOKENS), ("completions", COMPLETIONS)):
        found = pq.read_schema(folder(run) / names(0, kind=kind)[0])
        assert found.metadata[VERSION_KEY] == VERSION.encode() == b"1"
        assert found.equals(schema)
        assert all(field.metadata[b"meaning"] for field in found)


def test_max_completions_limits_the_records(tiny_run):
    run = tiny_run(TokenRecords(max_completions=3), **ONE_ROLLOUT_BATCH).fit()
    rows, whole = records(run), records(run, "completions")
    assert {row["completion_id"] for row in rows} == {"0/0/0", "0/0/1", "0/0/2"}
    assert len(rows) == sum(len(c.token_ids) for c in run.data.phases.rollouts.completions[:3])
    assert [row["completion_id"] for row in whole] == ["0/0/0", "0/0/1", "0/0/2"]


def test_phi_is_recorded_for_all_tokens_and_weights_only_low_ones(tiny_run):
    module = ONE_ROLLOUT_BATCH["module"] | {"attenuation": ConstantAttenuation(0.25)}
    rows = records(tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH | {"module": module}).fit())
    assert {row["phi"] for row in rows} == {0.25}
    assert {(row["is_high_entropy"], row["token_weight"]) for row in rows} == {(True, 1.0), (False, 0.25)}


@dataclass
class BrokenGolds(FiniteProblems):
    """Answers with a lone surrogate, as from a JSON Lines file with "\\ud83d"."""

    def load(self) -> list[Problem]:
        return [Problem(str(i), f"{i}+{i}=?", "1\ud83d2") for i in range(8)]


def test_text_that_is_not_utf8_does_not_stop_training(tiny_run):
    run = tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH | {"data": {"problems": BrokenGolds()}}).fit()
    assert {row["gold"] for row in records(run, "completions")} == {"1?2"}


def test_records_exclude_expert_rows(tiny_run):
    module = ONE_ROLLOUT_BATCH["module"] | {"advantage": GroupRelative(scale_by_std=False)}
    options = ONE_ROLLOUT_BATCH | {"module": module, "data": {"expert_fraction": 0.5}}
    run = tiny_run(TokenRecords(max_completions=100), **options).fit()
    assert len(run.data.phases.rollouts.completions) == 18  # two of them are expert rows
    assert [row["completion_id"] for row in records(run, "completions")] == [f"0/0/{row}" for row in range(16)]


@pytest.mark.parametrize(("every", "numbers"), [(1, [0, 1, 2]), (2, [0, 2]), (10, [0]), (0, [])])
def test_records_are_written_every_n_rollout_batches(tiny_run, every, numbers):
    options = ONE_ROLLOUT_BATCH | {"trainer": {"max_epochs": 3}}
    run = tiny_run(TokenRecords(every), **options).fit()
    assert files(run) == names(*numbers)
    assert files(run, "completions") == names(*numbers, kind="completions")


def test_records_without_logger_go_to_the_root_folder(tiny_run, tmp_path):
    tiny_run(TokenRecords(), **ONE_ROLLOUT_BATCH | {"logger": False}).fit()
    found = sorted(path.name for path in (tmp_path / "token_records").iterdir())
    assert found == names(0, kind="completions") + names(0)


class SaveAt(Callback):
    """Saves a checkpoint at the end of the given epoch."""

    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_resumed_run_in_the_same_folder_replaces_later_records(tiny_run, tmp_path):
    options = ONE_ROLLOUT_BATCH | {"logger": False, "trainer": {"max_epochs": 4}}
    whole = tiny_run(TokenRecords(1), SaveAt(1, tmp_path / "two.ckpt"), **options).fit()
    kept = [records(whole, number=number) for number in range(3)]
    (folder(whole) / "tokens-000002-rank-1.parquet").write_bytes(b"from a run with another number of ranks")
    resumed = tiny_run(TokenRecords(1), **options | {"trainer": {"max_epochs": 3}})
    resumed.fit(ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert files(resumed) == names(0, 1, 2)  # rollout batch 3 was not repeated
    assert files(resumed, "completions") == names(0, 1, 2, kind="completions")
    assert [records(resumed, number=number) for number in range(3)] == kept


def test_records_of_another_run_are_refused_and_kept(tiny_run, tmp_path):
    options = ONE_ROLLOUT_BATCH | {"logger": False}
    first = tiny_run(TokenRecords(1), **options).fit()
    kept = files(first)
    with pytest.raises(UserError, match="holds the records of another run"):
        tiny_run(TokenRecords(1), **options).fit()
    tiny_run(TokenRecords(0), **options).fit()  # when disabled, it reads no records
    assert files(first) == kept
