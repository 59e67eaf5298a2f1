import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from egspo_lightning import HFExport, StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling

PROBLEMS = ["1+1=?", "7+8=?", "9+12=?"]


def test_exported_model_answers_like_the_trained_policy(tiny_run):
    export = HFExport()
    run = tiny_run(export, StageTransition(after_epochs=10), trainer={"max_epochs": 11}, logger=True).fit()
    assert export.exported == Path(run.trainer.log_dir) / "hf"
    model = AutoModelForCausalLM.from_pretrained(export.exported)
    tokenizer = AutoTokenizer.from_pretrained(export.exported)
    ours = run.module.tokenizer
    requests = [Request(ours.encode(text), "s") for text in PROBLEMS]
    sampling = Sampling(16, temperature=0.0)
    samples = TransformersEngine().generate(run.module.policy.lm.eval(), requests, sampling, eos_ids=[256], pad_id=257)
    expected = [ours.decode(sample.token_ids) for sample in samples]
    assert len(set(expected)) > 1
    for text, answer in zip(PROBLEMS, expected, strict=True):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == answer


def test_export_has_the_trained_weights_and_training_can_start_from_it(tiny_run, tmp_path):
    run = tiny_run(HFExport(str(tmp_path / "out")), trainer={"max_epochs": 1}).fit()
    again = PolicyConfig(str(tmp_path / "out")).build()
    trained, loaded = run.module.policy.state_dict(), again.state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    fresh = tiny_run(module={"policy": PolicyConfig(str(tmp_path / "out"))}, trainer={"max_epochs": 1}).fit()
    assert fresh.trainer.callback_metrics["loss/sft"] < run.trainer.callback_metrics["loss/sft"]


def test_export_folder_with_other_files_is_refused_before_training(tiny_run, tmp_path):
    other_file = tmp_path / "models" / "thesis.txt"
    other_file.parent.mkdir()
    other_file.write_text("years of work")
    with pytest.raises(UserError, match=r"hf_export\.folder: .*models holds other files than a model"):
        tiny_run(HFExport(str(other_file.parent)), trainer={"max_epochs": 1}).fit()
    assert other_file.read_text() == "years of work"


def test_export_to_the_initial_model_folder_is_refused(tiny_run, small_model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small_model, source)
    (source / "build.py").unlink()
    run = tiny_run(HFExport(str(source)), module={"policy": PolicyConfig(str(source), from_scratch=True)})
    with pytest.raises(UserError, match="is the model that training starts from"):
        run.fit()


def test_export_folder_with_config_and_other_files_is_refused(tiny_run, tmp_path):
    for name in ("config.json", "notes.txt"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(UserError, match="holds other files than a model"):
        tiny_run(HFExport(str(tmp_path / "out"))).fit()
    assert (tmp_path / "out" / "notes.txt").read_text() == "{}"


def test_exported_generation_config_has_no_penalties(tiny_run, small_model, tmp_path):
    folder = tmp_path / "penalized"
    shutil.copytree(small_model, folder)
    settings = {"repetition_penalty": 1.3, "do_sample": True, "top_k": 5, "eos_token_id": [7, 256]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", folder)
    run = tiny_run(
        HFExport(str(tmp_path / "out")), module={"policy": PolicyConfig(str(folder))}, trainer={"max_epochs": 1}
    ).fit()
    assert run.module.policy.lm.generation_config.repetition_penalty == 1.3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert exported.repetition_penalty in (None, 1.0)
    assert exported.eos_token_id == [7, 256]


def test_earlier_export_is_replaced(tiny_run, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "out.partial").mkdir()  # left by a killed run
    (tmp_path / "out.partial" / "half.txt").write_text("half")
    tiny_run(HFExport(str(target)), trainer={"max_epochs": 1}).fit()
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"model-00001-of-00002.safetensors", "half.txt"} & names
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("logger", [True, False])
def test_export_can_be_disabled(tiny_run, tmp_path, logger):
    export = HFExport(enabled=False)
    tiny_run(export, trainer={"max_epochs": 1}, logger=logger).fit()
    assert export.exported is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_export_without_logger_goes_to_the_root_folder(tiny_run, tmp_path):
    export = HFExport()
    tiny_run(export, trainer={"max_epochs": 1}).fit()
    assert export.exported == tmp_path / "hf"
    assert (tmp_path / "hf" / "model.safetensors").is_file()
