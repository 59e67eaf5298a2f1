"""Worker extension of a vLLM server: loads the trainer's weights from a file, and says which weights it has.

The server imports this module, by ``--worker-extension-cls``. It needs no other module of this package.
"""

import json
from importlib.util import find_spec
from typing import Any

import torch

if find_spec("vllm") is not None:
    from vllm import _custom_ops

    # On a CPU, vLLM would pack weights for oneDNN, and weights loaded later would not reach the packed ones.
    _custom_ops._supports_onednn = False


class WeightReceiver:
    """Methods that vLLM adds to each of its workers; VLLMServerEngine calls them through ``/collective_rpc``."""

    model_config: Any
    """of vLLM's worker"""
    get_model: Any
    """of vLLM's worker"""
    egspo_version: str | None = None
    """Version of the weights that were loaded last; None since the server's start."""

    def egspo_state(self) -> dict[str, Any]:
        """Facts of the server's model, which the trainer compares with its own, and the version of the weights."""
        model = self.model_config
        return {
            "config": json.loads(model.hf_config.to_json_string(use_diff=False)),
            "architecture": model.architecture,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": model.logprobs_mode,
            "max_model_len": model.max_model_len,
            "version": self.egspo_version,
        }

    @torch.no_grad()
    def egspo_load(self, path: str, version: str) -> dict[str, Any]:
        """Load all weights of a safetensors file.

        Returns:
            ``stale``: names of parameters that got no weight. ``error``: why the file could not be loaded, or "".
        """
        from safetensors import safe_open

        self.egspo_version = None
        model = self.get_model()
        try:
            with safe_open(path, framework="pt") as file:
                taken = model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        except Exception as error:  # the server would log it, and answer without the reason
            return {"stale": [], "error": f"{type(error).__name__}: {error}"}
        stale = sorted({name for name, _ in model.named_parameters()} - (taken or set()))
        self.egspo_version = None if stale else version
        return {"stale": stale, "error": ""}
