"""GGUF files: config, tokenizer and weights, also from a Python package, without running its code."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from egspo_lightning import HFExport, StageTransition
from egspo_lightning.cli.main import run
from egspo_lightning.errors import UserError
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.policy_config import PolicyConfig, installed_folder
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.ops.objective import Objective

FILE = "tiny.Q4_1.gguf"
HIDDEN, INNER, LAYERS = 64, 128, 2


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """Folder with a package that contains a GGUF file and raises when it is imported."""
    folder = tmp_path_factory.mktemp("packages")
    package = folder / "tiny_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(package / FILE)
    return folder


def write_gguf(path):
    """Write a Llama model with random 4-bit weights and a byte tokenizer."""
    gguf = pytest.importorskip("gguf", reason='needs gguf: pip install "egspo-lightning[gguf]"')
    tokens = [*bytes_to_unicode().values(), "<|endoftext|>", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    layer = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN, HIDDEN),
        "attn_v": (HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"token_embd.weight": (len(tokens), HIDDEN), **shapes}.items():
        weights = torch.randn(shape, generator=generator).numpy() * 0.05
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def on_path(packages, monkeypatch):
    monkeypatch.syspath_prepend(packages)
    return packages


def test_pkg_url_gives_the_package_folder_without_import(on_path):
    assert installed_folder("pkg://tiny_weights") == str(on_path / "tiny_weights")
    assert installed_folder("pkg://tiny_weights/inner") == str(on_path / "tiny_weights" / "inner")
    assert installed_folder("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert PolicyConfig("pkg://tiny_weights", gguf_file=FILE).max_positions() == 512


def test_gguf_weights_are_unpacked_into_an_unquantized_model(on_path):
    lm = PolicyConfig("pkg://tiny_weights", gguf_file=FILE).build().lm
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert 0.04 < lm.model.layers[0].mlp.up_proj.weight.std() < 0.06
    assert not lm.is_quantized
    assert not hasattr(lm.config, "quantization_config")
    half = PolicyConfig("pkg://tiny_weights", gguf_file=FILE, dtype="bfloat16").build().lm
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("policy", "module", "data"),
    [
        ({}, {"objective": Objective(mu=0.1, beta=0.01)}, {}),
        ({"lora": LoraConfig(rank=4)}, {"objective": Objective(mu=0.1, beta=0.01)}, {}),
        ({}, {"critic": CriticConfig("own"), "advantage": GAE()}, {}),
        ({}, {}, {"max_staleness": 1}),
    ],
    ids=["reference", "lora", "critic", "snapshot"],
)
def test_gguf_model_trains_and_exports_without_gguf(on_path, tiny_run, policy, module, data):
    config = PolicyConfig("pkg://tiny_weights", gguf_file=FILE, **policy)
    export = HFExport()
    run = tiny_run(export, StageTransition(after_epochs=1), module={"policy": config, **module}, data=data).fit()
    assert run.data.phases.num_rollout_batches == 2
    exported = AutoModelForCausalLM.from_pretrained(export.exported)
    ids = torch.tensor([run.module.tokenizer.encode("7+8=?")])
    with torch.no_grad():
        ours, theirs = run.module.policy.lm.eval()(ids).logits, exported(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    before = config.build().lm(ids).logits
    assert (theirs - before).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(export.exported)
    assert tokenizer.encode("7+8=?<|endoftext|>") == run.module.tokenizer.encode("7+8=?<|endoftext|>")


def test_plan_reads_shapes_from_the_gguf_file(on_path, repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    model = ["--model.policy.name_or_path=pkg://tiny_weights", f"--model.policy.gguf_file={FILE}"]
    run(["plan", "--config=configs/quickstart.yaml", *model, "--model.policy.from_scratch=false", "--num_devices=1"])
    assert "fits in 80 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("pkg://not_there", FILE, "'not_there' is not installed: pip install --no-deps not-there"),
        ("pkg://", FILE, "must read pkg://PACKAGE or pkg://PACKAGE/FOLDER"),
        ("pkg://tiny_weights.inner", FILE, "must read pkg://PACKAGE or pkg://PACKAGE/FOLDER"),
        ("pkg://tiny_weights/inner", FILE, "'pkg://tiny_weights/inner' is not a folder"),
        (f"pkg://tiny_weights/{FILE}", None, "a GGUF file in it is named by model.policy.gguf_file"),
        ("pkg://tiny_weights", None, "one with a GGUF file, that file in model.policy.gguf_file"),
        ("pkg://tiny_weights", "other.gguf", "does not appear to have a file named other.gguf"),
        ("pkg://tiny_weights", "__init__.py", "cannot load the weights of 'pkg://tiny_weights'"),
    ],
)
def test_wrong_package_or_gguf_file_is_refused(on_path, name, file, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PolicyConfig(name, gguf_file=file).build()


def test_missing_gguf_library_error_names_the_extra(on_path, monkeypatch):
    monkeypatch.setattr("egspo_lightning.models.policy_config.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape('needs gguf: pip install "egspo-lightning[gguf]"')):
        PolicyConfig(".", gguf_file=FILE).build()
