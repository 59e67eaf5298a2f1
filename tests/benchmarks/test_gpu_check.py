"""The GPU check: its short form, its isolation of checks, its references."""

import json
import math
import os
import time
from argparse import Namespace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gpu_check
from egspo_lightning.cli.main import run
from egspo_lightning.errors import UserError
from measuring.checks import Check, Range, Record
from measuring.peak_flops import known_peak
from measuring.phase_readings import Phase, step_flops


def gpu_form(folder):
    return gpu_check._setting(Namespace(short=False, max_tokens=8192, rounds=2, threads=1), folder / "model")


@pytest.mark.slow
def test_short_form_passes_and_writes_every_quantity(tmp_path, capsys):
    output = tmp_path / "gpu_check.json"
    assert gpu_check.main(["--short", "--rounds", "1", "--threads", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["passed"]
    assert found["gpu"]["name"] == "short form on a CPU"
    assert {"versions", "revision"} <= found["machine"].keys()
    assert found["finished"]
    (rows,) = found["tables"].values()
    values = {(row["check"], row["quantity"]): row["value"] for row in rows if row["result"] == "ok"}
    assert values.keys() >= {
        ("optimizer steps", "speed"),
        ("optimizer steps", "share of the peak"),
        ("token statistics", "time over naive"),
        ("token statistics", "memory over naive"),
        ("sampling", "speed"),
        ("memory", "run over plan"),
    }
    assert 0 < values["sampling", "sampler gap"] < 1e-5
    assert values["fsdp2, one rank", "SFT loss over unsharded"] == pytest.approx(1, abs=1e-4)
    skipped = [row["result"] for row in rows if row["check"] == "sampling, vLLM"]
    assert skipped == [
        'skipped: vLLM is not installed: pip install "egspo-lightning[vllm]"'
        if find_spec("vllm") is None
        else "skipped: not in short form"
    ]
    assert "| optimizer steps | speed |" in capsys.readouterr().out


def test_a_failing_check_is_reported_and_the_others_still_run(tmp_path, monkeypatch):
    good = Record("answer", 42.0, "", Range(low=40))
    parts = [
        Check("raises", partial(json.loads, "{"), 60),
        Check("dies", partial(os._exit, 3), 60),
        Check("hangs", partial(time.sleep, 600), 1),
        Check("misses", partial(list, [Record("ratio", 1.5, "", Range(0.85, 1.15)), good]), 60),
        Check("lacks", partial(list, [good]), 60, skipped="no such package"),
        Check("works", partial(list, [good]), 60),
    ]
    monkeypatch.setattr(gpu_check, "checks", lambda setting: parts)
    output = tmp_path / "report.json"
    assert gpu_check.main(["--short", "--threads", "1", "--output", str(output)]) == 1
    found = json.loads(output.read_text())
    assert not found["passed"]
    (rows,) = found["tables"].values()
    assert [(row["check"], row["result"]) for row in rows] == [
        (
            "raises",
            "failed: JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("dies", "failed: its process ended with exit code 3"),
        ("hangs", "failed: not done after 1 s"),
        ("misses", "failed: 1.5 is not 0.85 to 1.15"),
        ("misses", "ok"),
        ("lacks", "skipped: no such package"),
        ("works", "ok"),
    ]


@pytest.mark.parametrize(
    ("value", "reference", "result"),
    [
        (math.nan, Range(high=0.1), "failed: nan is not at most 0.1"),
        (0.1, Range(high=0.1), "ok"),
        (0.09, Range(low=0.1), "failed: 0.09 is not at least 0.1"),
        (math.nan, None, "ok"),
    ],
)
def test_a_value_must_lie_in_its_reference(value, reference, result):
    assert Record("quantity", value, "", reference).result == result


@pytest.mark.parametrize(
    ("name", "peak"),
    [  # as nvidia-smi prints them; TFLOP/s of the data sheets, without sparsity
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peaks_go_by_name(name, peak):
    assert known_peak(name) == peak


def test_model_and_flops_have_the_size_of_qwen(tmp_path):
    """Qwen2.5-0.5B has 494,032,768 parameters, of them 24 * (896 + 2 * 128) biases; its embedding is tied."""
    folder = gpu_form(tmp_path).workload.folder
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    without_biases = 494_032_768 - 24 * (896 + 2 * 128)
    assert sum(parameter.numel() for parameter in lm.parameters()) == without_biases
    inner, embedding = without_biases - 151_936 * 896, 151_936 * 896
    assert step_flops(lm, Phase(1.0, 1, 0, 0, {})) == 6 * inner
    assert step_flops(lm, Phase(1.0, 0, 1, 0, {})) == 6 * embedding
    assert step_flops(lm, Phase(1.0, 0, 0, 10**2, {})) == 6 * 24 * 896 * 100


def test_budgets_add_up_to_eight_minutes(tmp_path):
    assert sum(check.budget for check in gpu_check.checks(gpu_form(tmp_path))) <= 8 * 60


@pytest.mark.slow  # plan builds 0.5 B parameters on the meta device
def test_flags_of_the_gpu_form_parse_and_fit_into_40_gb(tmp_path, capsys):
    setting = gpu_form(tmp_path)
    run(["plan", *setting.workload.flags(), *setting.flags(), "--device_gib=37"])
    assert "fits in 37 GiB" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_asks_for_one_or_for_the_short_form(tmp_path):
    with pytest.raises(UserError, match="needs a GPU that PyTorch can use; --short"):
        gpu_check.main(["--output", str(tmp_path / "none.json")])
    assert not list(tmp_path.iterdir())
