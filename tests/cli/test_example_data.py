"""Example data: the files that the command writes, and training on them by the shipped config."""

import json

import pytest

from egspo_lightning import DatasetDemonstrations, DatasetProblems
from egspo_lightning.cli.early_answers import answer_early
from egspo_lightning.cli.example_data import NUM_ROWS
from egspo_lightning.cli.main import run
from egspo_lightning.errors import UserError

SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=1",
    "--data.num_problems=1",
    "--data.demonstrations.init_args.limit=8",
    "--data.max_completion_length=100",
    "--data.benchmarks.init_args.limit=2",
    "--data.benchmarks.init_args.max_completion_length=2",
]
HUB_GSM8K = {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}


def write(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        answer_early(["example_data", str(folder)])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_files_are_disjoint_and_read_without_a_config_key(tmp_path, capsys):
    assert "train.jsonl (1000 rows)" in write(tmp_path, capsys)
    rows = {split: DatasetProblems(str(tmp_path / f"{split}.jsonl")).load() for split in NUM_ROWS}
    assert {split: len(problems) for split, problems in rows.items()} == NUM_ROWS
    assert not {p.problem for p in rows["train"]} & {p.problem for p in rows["test"]}
    assert len(DatasetDemonstrations(str(tmp_path / "train.jsonl")).load()) == NUM_ROWS["train"]


@pytest.mark.parametrize("arguments", [["a", "b"], ["--folder"]])
def test_other_arguments_are_refused(arguments):
    with pytest.raises(UserError, match="example_data takes one folder"):
        answer_early(["example_data", *arguments])


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        answer_early(["example_data", str(tmp_path / "file")])


@pytest.mark.parametrize("data", [pytest.param("example", marks=pytest.mark.slow), "gsm8k"])
def test_shipped_config_trains_on_the_files_and_on_gsm8k(repository, small_model, tmp_path, monkeypatch, capsys, data):
    (tmp_path / "configs").symlink_to(repository / "configs")
    monkeypatch.chdir(tmp_path)
    write("word_problems", capsys)
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(HUB_GSM8K) + "\n")
    paths = ["--data.demonstrations.path=gsm8k.jsonl", "--data.problems.path=gsm8k.jsonl"] if data == "gsm8k" else []
    folders = [f"--trainer.default_root_dir={tmp_path}", f"--model.policy.name_or_path={small_model}"]
    cli = run(["fit", "--config=configs/own_data.yaml", *SHORT, *folders, *paths])
    assert len(cli.datamodule.phases.pool.demonstrations) == (1 if data == "gsm8k" else 8)
    assert cli.datamodule.phases.num_rollout_batches == 1
