"""Subcommands fit, validate, test and predict on a short quickstart."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.cli.main import main, run
from egspo_lightning.data.generated_sources import GeneratedProblems

SHORT = [
    "--trainer.max_epochs=3",
    "--stage_transition.after_epochs=2",
    "--data.demonstrations.init_args.num_demonstrations=64",
    "--data.benchmarks.init_args.num_problems=32",
    "--data.num_problems=2",
]


@pytest.fixture(scope="module")
def quickstart(repository, tmp_path_factory):
    """A finished short run of the quickstart, as (cli, log folder)."""
    root = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        cli = run(["fit", "--config=configs/quickstart.yaml", f"--trainer.default_root_dir={root}", *SHORT])
    return cli, Path(cli.trainer.log_dir)


def test_fit_writes_config_checkpoints_events_records_and_model(quickstart):
    _, folder = quickstart
    assert (folder / "config.yaml").is_file()
    assert (folder / "sft.ckpt").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert list(folder.glob("events.out.tfevents.*"))
    assert list(folder.glob("token_records/*.parquet"))
    assert (folder / "hf" / "model.safetensors").is_file()


def test_fit_ends_with_a_table_and_the_paths(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    configs = ["--config=configs/quickstart.yaml", "--config=configs/methods/grpo.yaml"]
    main(["fit", *configs, f"--trainer.default_root_dir={tmp_path}", *SHORT])
    out = capsys.readouterr().out
    for text in ("benchmark", "problems", "before", "after SFT", "after GRPO", "arithmetic", "32"):
        assert text in out
    folder = tmp_path / "lightning_logs" / "version_0"
    assert f"Logs:  {folder}" in out
    assert f"See:   egspo report {folder} -o report.html" in out
    assert f"Model: {folder / 'hf'}" in out


def test_the_exported_model_samples_the_same_completions(quickstart):
    cli, folder = quickstart
    data, module = cli.datamodule, cli.model
    data.trainer.accelerator.setup(data.trainer)
    batch = next(iter(data.problems_of(data.benchmarks[0].name)))
    ours = [answer.completion for answer in data.answer(batch)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    theirs = []
    for problem in batch.problems:
        inputs = tokenizer(problem.problem, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=data.max_completion_length)
        theirs.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert module.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert len(set(theirs)) > 1
    assert ours == theirs


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_evaluate_a_checkpoint(
    quickstart, repository, tmp_path, monkeypatch, capsys, caplog, recwarn, command
):
    cli, folder = quickstart
    monkeypatch.chdir(repository)
    changed = ["--checkpoint.every_n_epochs=7", "--data.num_problems=3"]  # which an evaluation does not use
    caplog.set_level(logging.INFO)
    again = run([command, *checkpoint_flags(folder), *changed, f"--trainer.default_root_dir={tmp_path}"])
    out, err = capsys.readouterr()
    assert "Changed since the checkpoint" not in caplog.text
    assert "callbacks used to create the checkpoint" not in err + "".join(str(w.message) for w in recwarn)
    measured = {name: float(value) for name, value in again.trainer.callback_metrics.items()}
    during_fit = {
        name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("eval/")
    }
    assert during_fit
    assert {name: measured[name] for name in during_fit} == pytest.approx(during_fit)
    for head in ("benchmark", "problems", "avg", "pass", "maj", "length", "truncated"):
        assert head in out
    score, error = measured["eval/arithmetic/avg@1"], measured["eval/arithmetic/avg@1_se"]
    assert "avg@1" in out
    assert f"{score:.3f} ± {error:.3f}" in out
    (written,) = (tmp_path / "evaluation").iterdir()
    assert f"Written: {written}" in out
    assert len((written / "completions.jsonl").read_text().splitlines()) == 32
    stored = json.loads((written / "metrics.json").read_text())
    not_logged = {f"eval/arithmetic/{name}": score for name in ("pass@1", "maj@1")}  # one sample each: equal to avg@1
    values = {f"eval/arithmetic/{name}": value for name, value in stored["metrics"].items()}
    assert values == pytest.approx(measured | not_logged)
    assert stored["ckpt_path"] == str(folder / "checkpoints" / "last.ckpt")
    assert stored["step"] == cli.trainer.global_step > 0


def checkpoint_flags(folder):
    return [f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]


def test_predict_answers_the_users_own_problems(quickstart, tmp_path, monkeypatch, capsys):
    _, folder = quickstart
    monkeypatch.chdir(tmp_path)
    problems = tmp_path / "mine.jsonl"
    rows = [{"id": f"mine-{i}", "problem": f"{i}+{i}=?", "answer": str(2 * i)} for i in (11, 22, 33)]
    del rows[1]["answer"]
    problems.write_text("\n".join(json.dumps(row) for row in rows))
    command = ["predict", *checkpoint_flags(folder), f"--trainer.default_root_dir={tmp_path}"]
    command += [
        "--data.problems=egspo_lightning.data.dataset_sources.DatasetProblems",
        f"--data.problems.init_args.path={problems}",
    ]
    for sampling in ([], ["--data.predict_sampling.num_samples=2", "--data.predict_sampling.temperature=0.8"]):
        main([*command, *sampling])
    out = capsys.readouterr().out
    paths = [Path(line.removeprefix("Answers: ")) for line in out.splitlines() if line.startswith("Answers: ")]
    assert [path.parts[0] for path in paths] == ["predictions", "predictions"]  # from the working folder
    once, twice = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert all(path.parent.name.startswith("mine-") for path in paths)
    for problem, answer in zip(rows, once, strict=True):
        assert f"{problem['problem']}\n  {' '.join(answer['completion'].split())}  (" in out
    assert out.count("(no gold answer)\n") == 2  # of two runs, which show three answers each
    assert [row["id"] for row in once] == ["mine-11", "mine-22", "mine-33"]
    assert [(row["id"], row["sample"]) for row in twice] == [(row["id"], i) for row in rows for i in range(2)]
    assert all(row["completion"] for row in once)
    assert [row["correct"] is None for row in once] == [False, True, False]


CHAT = """{% if thinking is not defined %}{{ raise_exception('thinking is not given') }}{% endif %}\
{% for message in messages %}{{ message.content }}{% endfor %}"""


def test_chat_template_kwargs_reach_every_command(small_model, repository, tmp_path, monkeypatch, capsys):
    """The template raises an error without the variable; the config of the run keeps it."""
    monkeypatch.chdir(repository)
    model = tmp_path / "chat"
    shutil.copytree(small_model, model)
    (model / "chat_template.jinja").write_text(CHAT)
    root = f"--trainer.default_root_dir={tmp_path}"
    fit = ["fit", "--config=configs/quickstart.yaml", f"--model.policy.name_or_path={model}", *SHORT, root]
    with pytest.raises(SystemExit):
        main(fit)
    assert "thinking is not given" in capsys.readouterr().err
    cli = run([*fit, "--data.prompt.chat_template_kwargs.thinking=false"])
    folder = Path(cli.trainer.log_dir)
    assert cli.datamodule.phases.num_rollout_batches == 1
    assert cli.trainer.callback_metrics["eval/arithmetic/avg@1"] >= 0
    assert "thinking: false" in (folder / "config.yaml").read_text()
    run(["test", *checkpoint_flags(folder), root])
    (tmp_path / "mine.jsonl").write_text('{"problem": "11+11=?", "answer": "22"}')
    mine = ["--data.problems=DatasetProblems", f"--data.problems.init_args.path={tmp_path / 'mine.jsonl'}"]
    run(["predict", *checkpoint_flags(folder), root, *mine])


def test_the_console_script_is_the_same_command():
    from importlib.metadata import entry_points

    from egspo_lightning.__main__ import main as module_main

    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "egspo"]
    assert script.load() is module_main


def test_the_seed_determines_the_order_of_problems(quickstart):
    cli, _ = quickstart
    assert cli.datamodule.seed == 1
    one, two = GeneratedProblems(), GeneratedProblems()
    one.prepare(1, frozenset())
    two.prepare(2, frozenset())
    assert one.draw(0, 8) != two.draw(0, 8)
