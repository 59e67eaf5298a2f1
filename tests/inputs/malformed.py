"""Malformed inputs: each case makes a valid run invalid and lists the words that the error message must contain.

``CASES`` maps the name of a case to its function and words. Damaged files and models are copies of valid ones.
"""

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from smallest_config import source


class Case(NamedTuple):
    """A function that makes a run invalid, and the words that the error message must contain."""

    apply: Callable[[Any], None]
    words: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(*words: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that changes a run as a case, under the function's name."""

    def register(apply: Callable[[Any], None]) -> Callable[[Any], None]:
        CASES[apply.__name__] = Case(apply, words)
        return apply

    return register


def value(name: str, key: str, given: Any, *words: str) -> None:
    """Register a case with one wrong value in the config."""
    CASES[name] = Case(lambda run: run.put(key, given), words)


def flags(name: str, *arguments: str, words: tuple[str, ...]) -> None:
    """Register a case with wrong flags."""

    def apply(run: Any) -> None:
        run.arguments = arguments

    CASES[name] = Case(apply, words)


def torch_class(kind: str, name: str, **arguments: Any) -> dict[str, Any]:
    """Config entry of a class of torch.optim."""
    return {"class_path": f"torch.optim.{kind}{name}", "init_args": arguments}


# Configs

value("unknown_key", "data.num_generation", 4, "data.num_generation")
value("unknown_section", "trainers", {"max_epochs": 1}, "trainers")
value("text_for_a_number", "data.num_problems", "many", "data.num_problems", "many", "int")
value("huge_number", "data.num_problems", 10**30, "data.num_problems")
value("negative_number", "data.num_ppo_epochs", -1, "data.num_ppo_epochs", "-1", "v>=1")
value(
    "nan_learning_rate",
    "model.optimizer",
    torch_class("", "AdamW", lr=float("nan")),
    "model.optimizer",
    "learning rate",
)
value("negative_learning_rate", "model.optimizer", torch_class("", "AdamW", lr=-1.0), "model.optimizer", "-1.0")
value("null_for_a_required_part", "data.problems", None, "data.problems")
value("null_task", "data.problems.init_args", {"task": None}, "task")
value(
    "numbers_of_5000_digits",
    "data.problems.init_args",
    {"task": source("data.tasks.arithmetic.ArithmeticTask", num_digits=5000)},
    "num_digits",
)
value("unknown_class", "model.gate", source("ops.gate.QuantilGate"), "model.gate", "QuantilGate")
value("class_of_another_kind", "model.gate", source("ops.advantages.group_relative"), "model.gate")
value(
    "function_for_a_class",
    "data.reward",
    {"class_path": "os.system", "init_args": {"command": "touch ran"}},
    "data.reward",
)
value("optimizer_that_needs_a_closure", "model.optimizer", torch_class("", "LBFGS", lr=1.0), "model.optimizer", "LBFGS")
value(
    "scheduler_that_needs_a_metric",
    "model.lr_scheduler",
    torch_class("lr_scheduler.", "ReduceLROnPlateau"),
    "model.lr_scheduler",
    "ReduceLROnPlateau",
)
value("unknown_precision", "trainer.precision", "8-wrong", "precision", "8-wrong")
value("half_precision_weights", "trainer.precision", "16-true", "trainer.precision")
value("zero_gradient_accumulation", "trainer.accumulate_grad_batches", 0, "accumulate_grad_batches")
value("token_budget_below_one_row", "data.max_tokens_per_micro_batch", 10, "max_tokens_per_micro_batch")
value("zero_epochs", "trainer.max_epochs", 0, "max_epochs")
value("fractional_limit_train_batches", "trainer.limit_train_batches", 0.5, "trainer.limit_train_batches")
value("negative_seed", "seed_everything", -3, "seed_everything")
value("unreadable_time_limit", "trainer.max_time", "tomorrow", "max_time", "tomorrow")
value("zero_max_bad_updates", "model.max_bad_updates", 0, "model.max_bad_updates", "v>0")
value("unknown_strategy", "trainer.strategy", "ddpp", "strategy", "ddpp")
value("unknown_logger", "trainer.logger", "NoLogger", "trainer.logger")
value("prompt_without_problem_placeholder", "data.prompt.plain", "no place", "{problem}")
value("zero_temperature", "model.temperature", 0.0, "model.temperature")
value("nan_coefficient", "model.objective.beta", float("nan"), "model.objective.beta", "nan")
value("max_prompt_length_below_every_prompt", "data.max_prompt_length", 1, "data.max_prompt_length")
value(
    "max_completion_length_above_model_positions",
    "data.max_completion_length",
    10**6,
    "data.max_completion_length",
    "positions",
)
value("unknown_gradient_clip_algorithm", "trainer.gradient_clip_algorithm", "norms", "gradient_clip_algorithm")


@case("run.yaml", "line 3, column 5")
def config_that_is_not_yaml(run):
    replace_config(run, b"a: 1\n\nb: {")


@case("run.yaml", "holds a list")
def config_that_is_a_list(run):
    replace_config(run, b"- 1\n- 2\n")


@case("run.yaml", "is empty")
def config_that_is_empty(run):
    replace_config(run, b"")


@case("run.yaml", "line 3", "'seed'", "line 2")
def config_with_duplicate_key(run):
    replace_config(run, b"data:\n  seed: 1\n  seed: 2\n")


@case("run.yaml", "#x0000")
def config_with_nul(run):
    replace_config(run, b"data:\n  seed: 1\0\n")


@case("run.yaml", "UTF-8")
def config_that_is_not_utf8(run):
    replace_config(run, b'data:\n  prompt: {system: "\xff\xfe"}\n')


@case("model.policy")
def config_without_the_required_keys(run):
    del run.config["model"]


def replace_config(run, content):
    run.config = content


# Flags

flags("unknown_flag", "--data.num_generation=4", words=("data.num_generation",))
flags("flag_without_a_value", "--data.num_problems", words=("data.num_problems",))
flags("unexpected_argument", "stray", words=("stray",))
flags("missing_config_file", "--config=nowhere.yaml", words=("nowhere.yaml",))
flags("folder_for_a_config", "--config=.", words=("config", "not a file"))
flags("two_methods", "--config=methods/ppo.yaml", "--config=methods/egspo.yaml", words=("are both method overlays",))


@case("train", "fit")
def unknown_subcommand(run):
    run.subcommand = "train"


@case("data.problems", "never ends")
def predict_on_endless_problems(run):
    run.subcommand = "predict"


@case("data.benchmarks", "at least one")
def test_without_benchmarks(run):
    run.subcommand = "test"


# Data files

GOOD = b'{"problem": "1+1=?", "solution": "\\\\boxed{2}", "answer": "2"}\n'


def rows(name: str, content: bytes, *words: str, kind: str = "demonstrations") -> None:
    """Register a case with the given content as data file."""

    def apply(run: Any) -> None:
        (run.folder / "rows.jsonl").write_bytes(content)
        use_rows(run, kind)

    CASES[name] = Case(apply, words)


def use_rows(run: Any, kind: str = "demonstrations") -> None:
    path = str(run.folder / "rows.jsonl")
    if kind == "benchmarks":
        run.put("data.benchmarks", [source("evaluation.benchmarks.DatasetBenchmark", name="rows", path=path)])
    else:
        run.put(f"data.{kind}", source(f"data.dataset_sources.Dataset{kind.capitalize()}", path=path))


rows("broken_json", GOOD + b'{"problem": \n', "rows.jsonl:2", "not valid JSON")
rows("missing_field", GOOD + b'{"problem": "1+1=?"}\n', "rows.jsonl:2", "'solution'", "missing")
rows("missing_answer", GOOD + b'\n{"problem": "1+1=?"}\n', "rows.jsonl:3", "'answer'", kind="problems")
rows("raw_nul", GOOD + GOOD.replace(b"1+1", b"1\0+1"), "rows.jsonl:2")
rows("escaped_nul", GOOD + GOOD.replace(b"1+1", b"1\\u0000+1"), "rows.jsonl:2", "NUL")
rows("broken_utf8", GOOD + GOOD.replace(b"1+1", b"\xff+1"), "rows.jsonl:2", "UTF-8")
rows("utf16", GOOD.decode().encode("utf-16"), "rows.jsonl:1")
rows("lone_surrogate", GOOD + GOOD.replace(b"1+1", b"\\ud800"), "rows.jsonl:2", "surrogate")
rows("lone_surrogate_in_an_answer", GOOD.replace(b'"2"', b'"\\udc00"'), "rows.jsonl:1", "surrogate", kind="problems")
rows("list_for_a_row", b"[1, 2]\n", "rows.jsonl:1", "JSON object", "list")
rows("whole_file_as_one_list", b"[\n" + GOOD.strip() + b",\n" + GOOD + b"]\n", "rows.jsonl:1")
rows("list_for_a_problem_text", GOOD.replace(b'"1+1=?"', b'["1+1=?"]'), "rows.jsonl:1", "'problem'")
rows("boolean_for_an_answer", GOOD.replace(b'"2"', b"true"), "rows.jsonl:1", "'answer'", "True", kind="problems")
rows("nan_for_an_answer", GOOD.replace(b'"2"', b"NaN"), "rows.jsonl:1", "'answer'", "nan", kind="problems")
rows("huge_integer", GOOD.replace(b'"2"', b"9" * 5000), "rows.jsonl:1", "digits", kind="problems")
rows("deeply_nested", b"[" * 200_000 + b"\n", "rows.jsonl:1", "nested")
rows("empty_file", b"", "data.demonstrations", "none")
rows("empty_problems", b"\n\n", "DatasetProblems", "0 were loaded", kind="problems")
rows("empty_benchmark", b"", "rows", kind="benchmarks")
rows("blank_answer", GOOD.replace(b'"2"', b'"  "'), "rows.jsonl:1", "'answer'", kind="benchmarks")
rows("gzip_named_jsonl", gzip.compress(GOOD), "rows.jsonl", "gzip")
rows("duplicate_id", 2 * GOOD.replace(b"{", b'{"id": "a", ', 1), "'a'", kind="benchmarks")


@case("nowhere.jsonl", "no such file")
def missing_data_file(run):
    run.put("data.problems", source("data.dataset_sources.DatasetProblems", path="nowhere.jsonl"))


@case("rows.jsonl", "folder")
def folder_for_a_data_file(run):
    (run.folder / "rows.jsonl").mkdir()
    use_rows(run)


@case("benchmarks ask all")
def demonstrations_that_are_all_in_a_benchmark(run):
    (run.folder / "rows.jsonl").write_bytes(GOOD)
    use_rows(run)
    use_rows(run, "benchmarks")


@case("some/dataset", "path of a local folder")
def hub_data_without_a_network(run):
    run.put("data.problems", source("data.dataset_sources.DatasetProblems", path="some/dataset"))


# Model folders


def model(*words: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a case that damages a copy of a model folder with weights."""

    def register(damage: Callable[[Path], None]) -> Callable[[Path], None]:
        def apply(run: Any) -> None:
            folder = run.folder / "model"
            shutil.copytree(run.exported, folder)
            damage(folder)
            run.put("model.policy", {"name_or_path": str(folder), "from_scratch": False})

        CASES[damage.__name__] = Case(apply, ("model.policy.name_or_path", *words))
        return damage

    return register


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@model("config")
def model_without_config(folder):
    (folder / "config.json").unlink()


@model("config")
def model_with_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


@model("tokenizer")
def model_without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@model("tokenizer")
def model_with_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


@model("no EOS token", "eos_token")
def tokenizer_without_eos(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)


@model("weights")
def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@model("weights")
def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


@model("weights")
def missing_weights(folder):
    (folder / "model.safetensors").unlink()


@model("shape")
def weights_of_another_shape(folder):
    edit(folder / "config.json", hidden_size=64)


@model("layers.0.mlp")
def weights_without_a_layer(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "mlp" not in name}, path, metadata={"format": "pt"})


@model("no_such_architecture")
def unknown_architecture(folder):
    edit(folder / "config.json", model_type="no_such_architecture", architectures=["NoSuch"])


@model("vit")
def vision_model(folder):
    edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])


@model("vocab_size")
def vocabulary_smaller_than_the_tokenizer(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    small = {
        name: w[:100].clone() if w.shape[0] > 200 and w.ndim == 2 and ("embed" in name or "head" in name) else w
        for name, w in weights.items()
    }
    save_file(small, path, metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=100)


@model("hidden_size", "wide")
def text_for_the_hidden_size(folder):
    edit(folder / "config.json", hidden_size="wide")


@model("trust_remote_code")
def model_with_custom_code(folder):
    edit(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineLM"},
    )
    (folder / "mine.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")


@case("model.policy.name_or_path", "not a folder")
def file_for_a_model(run):
    run.put("model.policy.name_or_path", str(run.folder / "run.yaml"))
    (run.folder / "run.yaml").touch()


@case("model.policy.name_or_path", "some/model", "config.json", "HF_HUB_OFFLINE")
def hub_model_without_a_network(run):
    run.put("model.policy.name_or_path", "some/model")


@case("FlashAttention2", "model.policy.attn_implementation")
def attention_of_a_missing_package(run):
    run.put("model.policy.attn_implementation", "flash_attention_2")


# Checkpoints


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def checkpoint(
    *words: str, subcommand: str = "fit"
) -> Callable[[Callable[[Any, Path], None]], Callable[[Any, Path], None]]:
    """Register a case that damages or replaces a copy of a valid checkpoint, which the run then loads."""

    def register(damage: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
        def apply(run: Any) -> None:
            path = run.folder / "given.ckpt"
            shutil.copy(run.checkpoint, path)
            damage(run, path)
            run.subcommand = subcommand
            run.put("data.benchmarks", [source("evaluation.benchmarks.GeneratedBenchmark", num_problems=2)])
            run.arguments = [f"--ckpt_path={path}"]

        CASES[damage.__name__] = Case(apply, ("ckpt_path", *words))
        return damage

    return register


@checkpoint("given.ckpt")
def text_for_a_checkpoint(run, path):
    path.write_text("weights\n")


@checkpoint("given.ckpt", subcommand="validate")
def text_for_a_checkpoint_in_validate(run, path):
    path.write_text("weights\n")


@checkpoint("given.ckpt", "empty")
def empty_checkpoint(run, path):
    path.write_bytes(b"")


@checkpoint("given.ckpt")
def truncated_checkpoint(run, path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@checkpoint("given.ckpt")
def zip_for_a_checkpoint(run, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


@checkpoint("no such file", subcommand="test")
def missing_checkpoint(run, path):
    path.unlink()


@checkpoint("given.ckpt", "code")
def checkpoint_that_needs_unsafe_unpickling(run, path):
    torch.save(torch.load(path, weights_only=True) | {"loops": Bomb(run.folder / "ran")}, path)


@checkpoint("given.ckpt")
def tensor_for_a_checkpoint(run, path):
    torch.save(torch.zeros(3), path)


@checkpoint("not written by")
def checkpoint_of_another_program(run, path):
    torch.save(
        {"state_dict": {}, "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0", "loops": {}}, path
    )


@checkpoint("not written by")
def bare_state_dict_for_a_checkpoint(run, path):
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)


@checkpoint("shape", "(32,)", "(16,)")
def checkpoint_of_another_width(run, path):
    edit_model(run, hidden_size=16)


@checkpoint("layers.1")
def checkpoint_of_another_depth(run, path):
    edit_model(run, num_hidden_layers=2)


@checkpoint("shape", subcommand="validate")
def checkpoint_of_another_width_in_validate(run, path):
    edit_model(run, hidden_size=16)


@checkpoint("tokenizer")
def checkpoint_of_another_tokenizer(run, path):
    folder = edit_model(run)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def edit_model(run, **values):
    folder = run.folder / "other_model"
    shutil.copytree(run.config["model"]["policy"]["name_or_path"], folder)
    edit(folder / "config.json", **values)
    run.put("model.policy.name_or_path", str(folder))
    return folder


@checkpoint("optimizer", "SGD")
def checkpoint_of_another_optimizer(run, path):
    run.put("model.optimizer", torch_class("", "SGD", lr=0.1, momentum=0.9))


@checkpoint("given.ckpt", "meta.pt")
def folder_for_a_checkpoint(run, path):
    path.unlink()
    path.mkdir()


@checkpoint("given.ckpt", ".metadata")
def sharded_checkpoint_without_its_shards(run, path):
    whole = torch.load(path, weights_only=True)
    path.unlink()
    path.mkdir()
    torch.save(whole, path / "meta.pt")


# Environment


@case("default_root_dir")
def file_for_the_log_folder(run):
    (run.folder / "logs").write_text("")


@case("default_root_dir")
def unwritable_log_folder(run):
    run.put("trainer.default_root_dir", "/proc/logs")


@case("trainer", "accelerator = cuda")
def missing_gpu(run):
    run.put("trainer.accelerator", "cuda")


@case("trainer", "devices = 9")
def more_devices_than_present(run):
    run.put("trainer.accelerator", "gpu")
    run.put("trainer.devices", 9)


@case("trainer", "devices")
def zero_devices(run):
    run.put("trainer.devices", 0)


@case("MASTER_PORT", "abc")
def text_for_the_port(run):
    ranks(run, MASTER_PORT="abc")


@case("MASTER_PORT", "99999999")
def port_out_of_range(run):
    ranks(run, MASTER_PORT="99999999")


def ranks(run, **environment):
    run.put("trainer.strategy", "ddp")
    run.put("trainer.devices", 2)
    run.environment.update(environment)


@case("LOCAL_RANK")
def text_for_the_rank(run):
    ranks(run, LOCAL_RANK="first")


@case("SLURM")
def slurm_tasks_that_differ_from_devices(run):
    ranks(
        run,
        SLURM_NTASKS="4",
        SLURM_JOB_NAME="train",
        SLURM_JOB_ID="1",
        SLURM_PROCID="0",
        SLURM_LOCALID="0",
        SLURM_NODEID="0",
        SLURM_NTASKS_PER_NODE="4",
    )


@case("wandb", "pip install")
def logger_of_a_missing_package(run):
    run.put("trainer.logger", {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True}})
