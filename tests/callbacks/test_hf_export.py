from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.callbacks import HFExport, StageTransition
from egspo_lightning.policy import PolicyConfig
from egspo_lightning.rollout.engine import Request
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling

PROBLEMS = ["1+1=?", "7+8=?", "9+12=?"]


def test_the_folder_loads_and_answers_as_the_trained_policy(tiny_run):
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


def test_every_weight_is_the_trained_one_and_training_can_start_from_it(tiny_run, tmp_path):
    run = tiny_run(HFExport(str(tmp_path / "out")), trainer={"max_epochs": 1}).fit()
    again = PolicyConfig(str(tmp_path / "out")).build()
    trained, loaded = run.module.policy.state_dict(), again.state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    fresh = tiny_run(module={"policy": PolicyConfig(str(tmp_path / "out"))}, trainer={"max_epochs": 1}).fit()
    assert fresh.trainer.callback_metrics["loss/sft"] < run.trainer.callback_metrics["loss/sft"]


def test_a_folder_that_is_there_is_replaced(tiny_run, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    (tmp_path / "out.partial").mkdir()  # of a run that was killed
    (tmp_path / "out.partial" / "half.txt").write_text("half")
    tiny_run(HFExport(str(target)), trainer={"max_epochs": 1}).fit()
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"old.txt", "half.txt"} & names
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("logger", [True, False])
def test_it_can_be_switched_off(tiny_run, tmp_path, logger):
    export = HFExport(enabled=False)
    tiny_run(export, trainer={"max_epochs": 1}, logger=logger).fit()
    assert export.exported is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_a_logger_the_folder_is_in_the_root_folder(tiny_run, tmp_path):
    export = HFExport()
    tiny_run(export, trainer={"max_epochs": 1}).fit()
    assert export.exported == tmp_path / "hf"
    assert (tmp_path / "hf" / "model.safetensors").is_file()
