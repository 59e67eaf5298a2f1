"""Workloads: a folder with weights and tokenizer, the sizes of an iteration, and the command-line flags for both.

All variants of a comparison load the same folder, so they have the same weights, prompts and sizes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from egspo_lightning.cli.comparison.run_callbacks import StopAfterSFT, callback_flag
from egspo_lightning.cli.comparison.run_in_worker import QUIET
from egspo_lightning.cli.main import EgspoCLI
from egspo_lightning.cli.main import run as run_cli

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
TINY_MODEL = REPOSITORY / "configs" / "tiny_model"
FOLDER = REPOSITORY / "logs" / "speed"
PROBLEM_LENGTH = 7
"""Tokens of a problem of the quickstart, such as 12+34=?"""


class Workload(NamedTuple):
    """A model and the sizes of an iteration."""

    folder: Path
    """weights and tokenizer"""
    num_problems: int = 16
    num_generations: int = 8
    num_ppo_epochs: int = 2
    num_minibatches: int = 2
    max_completion_length: int = 64
    learning_rate: float = 1e-4
    seed: int = 1
    reward: str = "egspo_lightning.rewards.functions.CorrectnessReward"
    prompt: str = "{problem}"
    """template of a prompt"""

    @property
    def num_rollouts(self) -> int:
        """Completions per iteration."""
        return self.num_problems * self.num_generations

    def flags(self) -> list[str]:
        """Flags of the quickstart with this model and these sizes, in stage EGSPO from the start."""
        sizes = ("num_problems", "num_generations", "num_ppo_epochs", "num_minibatches", "max_completion_length")
        return [
            f"--config={QUICKSTART}",
            f"--num_threads={torch.get_num_threads()}",
            *QUIET,
            "--trainer.logger=false",
            "--math_benchmark.enabled=false",
            f"--trainer.default_root_dir={self.folder.parent}",
            f"--seed_everything={self.seed}",
            "--model.initial_stage=egspo",
            f"--model.policy.name_or_path={self.folder}",
            "--model.policy.from_scratch=false",
            f"--stage_transition.learning_rate={self.learning_rate}",
            f"--data.reward={self.reward}",
            f"--data.prompt.plain={self.prompt}",
            *(f"--data.{name}={getattr(self, name)}" for name in sizes),
        ]


def quickstart(models: Path = FOLDER, seed: int = 1, prompt_length: int = PROBLEM_LENGTH) -> Workload:
    """The quickstart after its SFT, which is trained once and kept.

    Prompts have ``prompt_length`` tokens; those before the problem are periods.
    """
    is_plain = prompt_length == PROBLEM_LENGTH
    folder = models / (f"quickstart-{seed}" if is_plain else f"quickstart-{seed}-prompts-{prompt_length}")
    prompt = "." * (prompt_length - PROBLEM_LENGTH) + "{problem}"
    if not (folder / "config.json").exists():
        _publish(folder, lambda partial: _train_sft(partial, seed, prompt))
    return Workload(folder, seed=seed, prompt=prompt)


def _train_sft(folder: Path, seed: int, prompt: str) -> None:
    arguments = [f"--config={QUICKSTART}", *QUIET, "--math_benchmark.enabled=false", f"--seed_everything={seed}"]
    arguments += [f"--data.prompt.plain={prompt}", callback_flag(StopAfterSFT)]
    module: Any = run_cli(["fit", *arguments, f"--trainer.default_root_dir={folder}"]).model
    module.policy.lm.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)


class Shape(NamedTuple):
    """Sizes of a model with random weights."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 32_000


def random_model(models: Path = FOLDER, shape: Shape = Shape(), **sizes: Any) -> Workload:  # noqa: B008
    """A model with random weights. It solves nothing, so its reward is ``EvenCharacters``."""
    folder = models / ("random-" + "-".join(map(str, shape)))
    if not (folder / "config.json").exists():
        _publish(folder, lambda partial: _write_random(partial, shape))
    return Workload(folder, reward="measuring.rewards.EvenCharacters", **sizes)


def _write_random(folder: Path, shape: Shape) -> None:
    tokenizer = json.loads((TINY_MODEL / "tokenizer.json").read_text())
    entries: dict[str, int] = tokenizer["model"]["vocab"]
    specials = tokenizer["added_tokens"]
    first_special = shape.vocabulary - len(specials)
    entries |= {f"w{i}": i for i in range(256, first_special)}  # filler beyond the bytes; only the model produces these
    for i, special in enumerate(specials):
        special["id"] = first_special + i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(TINY_MODEL / "tokenizer_config.json", folder)
    tiny: dict[str, Any] = json.loads((TINY_MODEL / "config.json").read_text())
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": 4 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "eos_token_id": first_special,
        "pad_token_id": first_special + 1,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**(tiny | sizes))).save_pretrained(folder)


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Create the folder atomically: if it exists, it is complete."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(folder)


def choose(name: str, models: Path) -> Workload:
    """The workload with this name."""
    if name == "smoke":  # takes seconds, for tests
        sizes = {"num_problems": 2, "num_generations": 4, "max_completion_length": 32}
        return random_model(models, Shape(32, 1, 2, 300), **sizes)
    if name.startswith("quickstart"):
        return quickstart(
            models, prompt_length=int(name.removeprefix("quickstart").removeprefix("_prompts_") or PROBLEM_LENGTH)
        )
    return random_model(models)


NAMES = {
    "quickstart": "quickstart after SFT",
    "quickstart_prompts_13": "the same with prompts of 13 tokens, half as long as completions",
    "quickstart_prompts_50": "the same with prompts of 50 tokens, twice as long as completions",
    "random": "random weights, hidden size 256, 4 layers, 32 k vocabulary",
    "smoke": "a few tokens, to test the script",
}


def train(workload: Workload, iterations: int, *flags: str) -> EgspoCLI:
    """Train a workload through the command line."""
    return run_cli(["fit", *workload.flags(), f"--trainer.max_epochs={iterations}", *flags])
