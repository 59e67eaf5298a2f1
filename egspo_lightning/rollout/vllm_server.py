"""vLLM server as engine: samples from a vLLM server on this node, which gets the trainer's weights at every call.

The trainer needs no vLLM. The weights go through a file in shared memory. The server labels each sample with the
version of the weights that it came from, so a sample from other weights is noticed and drawn again.

Tested with vLLM 0.32 on a CPU, in float32, on one rank and on two.
"""

import json
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from egspo_lightning.errors import UserError, require
from egspo_lightning.models.weight_file import weight_file
from egspo_lightning.models.whole_weights import compute_dtype, whole_weights
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.rank_watch import gather, num_ranks
from egspo_lightning.rollout.vllm_client import VLLMClient
from egspo_lightning.rollout.vllm_requests import require_room, require_temperature, sampling_settings
from egspo_lightning.types import Sampling

START_COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model FOLDER_OR_NAME --dtype DTYPE "
    "--host 127.0.0.1 --port {port} --load-format dummy --skip-tokenizer-init --generation-config vllm "
    "--logprobs-mode processed_logprobs --enable-scale-out "
    "--worker-extension-cls egspo_lightning.rollout.vllm_server_worker.WeightReceiver"
)
TRANSPORT = "shared_memory"
MAX_COPIES = 3
"""How often a call copies the weights, if the server loses them in between."""
LOAD_S = 600.0
"""How long the server may take to load the weights."""
RESET_S = 30.0
"""How long a copy waits until the server has dropped the requests of an unfinished call."""
OF_NO_EFFECT = ("_token_id", "_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
"""Ends of the names of config values on which the weights and the logits do not depend."""

T = TypeVar("T")


class VLLMServerEngine(RolloutEngine):
    """Samples with a vLLM server of its own, on the same node; needs no vLLM in the trainer's environment.

    All ranks use one server. The first rank gives it the policy's weights at each call, and all ranks sample after the
    server has confirmed them. vLLM reports no entropies, so the policy scores the rollouts.

    Args:
        address: Address of the server on this node, as ``http://127.0.0.1:8000``.
        transport: How the weights reach the server. Only ``shared_memory`` is implemented; others are refused.
    """

    takes_shards = True
    """All ranks call ``stream`` together, also without requests: copying the weights is collective."""

    def __init__(self, address: str = "http://127.0.0.1:8000", transport: str = TRANSPORT) -> None:
        if transport != TRANSPORT:
            raise UserError(
                f"data.engine.transport must be {TRANSPORT}, got {transport}. The weights go to the server through a "
                "file in shared memory. Other ways (nccl, ipc, a shared folder) are not implemented: a server on "
                "another node, or with weights that do not fit into this node's memory twice, cannot be used."
            )
        self.client = VLLMClient(address, START_COMMAND)
        self._run = uuid.uuid4().hex
        self._version: str | None = None
        """The version of the last copy; None if the server has not confirmed it."""
        self._num_copies = 0
        self._rank = 0
        self._is_started = False
        self._group: Any = None
        """Process group of all ranks on the CPU, for this engine alone: a thread may use it while the ranks train."""

    def start(self, lm: Any) -> None:
        """Check that the server answers and has the same model, unless it has been done. Collective.

        Raises:
            UserError: the ranks are on several nodes, or the server does not answer, was started with other options, or
                has another model.
        """
        if self._is_started:
            return
        if num_ranks() > 1:
            self._group, self._rank = torch.distributed.new_group(backend="gloo"), torch.distributed.get_rank()
            require_one_node(gather(socket.gethostname(), self._group))
        self._require_same_model(lm, patience=0.0)
        self._is_started = True

    def close(self) -> None:
        """Forget the ranks of this run. The server goes on, and the next run finds it."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
        self._is_started, self._group = False, None

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``; with ``top_p`` below 1, log-probabilities are renormalized over the nucleus.

        Raises:
            UserError: a request is too long, the temperature too low, the server went away, or it loses the weights
                again and again.
        """
        require_temperature(sampling, "VLLMServerEngine")
        self.start(lm)
        numbers = list(range(len(requests)))
        for _ in range(MAX_COPIES):
            limit = self._together(lambda: self._checked_limit(self._require_same_model(lm)))
            require_room("max_model_len of the vLLM server", limit, requests, sampling)
            self.copy_weights(lm)
            version = self._version
            bodies = [_body(requests[number], sampling, eos_ids) for number in numbers]
            lost = []
            for place, answer in self.client.generate(bodies, self._state) if version else ():
                if _version_of(answer) == version:
                    yield [(numbers[place], _sample(answer, eos_ids))]
                else:
                    lost.append(numbers[place])
            numbers = lost if version else numbers
            self._require_no_other_weights(version)
            if lost:
                warnings.warn(
                    f"{len(lost)} samples of the vLLM server at {self.client.address} did not come from the weights of "
                    f"copy {self._num_copies} and are drawn again.",
                    stacklevel=2,
                )
            if not self._on_any_rank(version is None or bool(numbers)):
                return
        raise UserError(
            f"The vLLM server at {self.client.address} lost the weights {MAX_COPIES} times in one call. It restarts, "
            "or another program uses it: give each run a server of its own."
        )

    def copy_weights(self, lm: Any) -> None:
        """Give the server the policy's current weights, and set the version that it confirms. Collective.

        Raises:
            UserError: the server does not answer, cannot read the weights, or gets no values for some of its own.
        """
        weights = whole_weights(lm)
        if self._is_first:
            with weight_file(weights, sum(1 for _ in lm.parameters()), compute_dtype(lm)) as path:
                self._version = self._together(lambda: self._load(path))
        else:
            if any(isinstance(parameter, DTensor) for parameter in lm.parameters()):
                for _ in weights:
                    pass  # a shard of each goes to the first rank
            self._version = self._together(lambda: None)

    def _load(self, path: str) -> str | None:
        """Let the server load a file; returns the version if the server confirms it.

        The workers and the engine each hold the version: the workers that of the loaded file, the engine the label of
        the samples. A server that restarts between the steps has not both.
        """
        self._num_copies += 1
        version = f"{self._run}/{self._num_copies}"
        for found in self._call_workers("egspo_load", path, version, timeout=LOAD_S):
            self._require_loaded(found)
        self._forget_prefixes()
        self.client.call("/update_weight_version", {"new_version": version})
        return version if self._state()["version"] == version else None

    def _require_loaded(self, found: dict[str, Any]) -> None:
        if found["error"]:
            raise UserError(
                f"The vLLM server at {self.client.address} cannot load the weights: {found['error']}. It reads them "
                "from this process's memory, so it must run on the same node, in the same container and as the same "
                "user."
            )
        if found["stale"]:
            raise UserError(
                f"data.engine VLLMServerEngine: vLLM gets no weights for {found['stale'][0]} (of "
                f"{len(found['stale'])}), and would sample from random ones. Use the default engine with this model."
            )

    def _forget_prefixes(self) -> None:
        """Drop cached keys and values, which belong to other weights."""
        deadline = time.monotonic() + RESET_S
        while not self.client.call("/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"The vLLM server at {self.client.address} did not reset its prefix cache, because it has other "
                    "requests, and would sample from stale keys and values. Give each run a server of its own."
                )
            time.sleep(0.1)

    def _require_same_model(self, lm: Any, **limits: Any) -> dict[str, Any]:
        """State of the server's workers, whose model must be the policy's."""
        state = self._state(**limits)
        ours = json.loads(lm.config.to_json_string(use_diff=False))
        known = [name for name in ours.keys() & state["config"].keys() if not name.endswith(OF_NO_EFFECT)]
        other = {name: ours[name] for name in sorted(known) if ours[name] != state["config"][name]}
        if other or state["architecture"] != type(lm).__name__:
            theirs = {name: state["config"][name] for name in other}
            raise UserError(
                f"The vLLM server at {self.client.address} has another model: {state['architecture']} with "
                f"{json.dumps(theirs)}, and the policy is {type(lm).__name__} with {json.dumps(other)}. Start the "
                f"server with --model and the policy's folder or name, or add --hf-overrides '{json.dumps(other)}'."
            )
        dtype = str(compute_dtype(lm)).removeprefix("torch.")
        for option, value, found in (
            ("--dtype", dtype, state["dtype"]),
            ("--logprobs-mode", "processed_logprobs", state["logprobs_mode"]),
        ):
            require(found == value, f"{option} of the vLLM server at {self.client.address}", found, value)
        return state

    def _checked_limit(self, state: dict[str, Any]) -> int:
        """Say if the server has lost the weights of the last copy; returns its max_model_len."""
        if self._num_copies and (self._version is None or state["version"] != self._version):
            warnings.warn(
                f"The vLLM server at {self.client.address} no longer has the weights of copy {self._num_copies}, which "
                "it confirmed: it was restarted, or another program uses it. It gets the policy's weights again.",
                stacklevel=2,
            )
        limit: int = state["max_model_len"]
        return limit

    def _require_no_other_weights(self, version: str | None) -> None:
        """Refuse the samples of a call during which another program gave the server weights.

        A server that restarted has no version. Its samples have no label, and are drawn again.
        """
        found = self._state()["version"]
        if found not in (version, None):
            raise UserError(
                f"Another program gave the vLLM server at {self.client.address} weights while this run sampled. Give "
                "each run a server of its own."
            )

    def _state(self, **limits: Any) -> dict[str, Any]:
        state: dict[str, Any] = self._call_workers("egspo_state", **limits)[0]
        return state

    def _call_workers(self, method: str, *arguments: str, **limits: Any) -> list[Any]:
        """Results of a method of ``WeightReceiver`` in all workers; ``limits`` as in ``VLLMClient.call``."""
        body = {"method": method, "args": arguments}
        results: list[Any] = self.client.call("/collective_rpc", body, **limits)["results"]
        return results

    # Ranks

    @property
    def _is_first(self) -> bool:
        return self._rank == 0

    def _together(self, call: Callable[[], T]) -> T:
        """Result on all ranks of a call that the first one makes; a UserError is raised on all. Collective."""
        found: list[Any] = [None, None]
        if self._is_first:
            try:
                found[0] = call()
            except UserError as error:
                found[1] = str(error)
        if self._group is not None:
            torch.distributed.broadcast_object_list(found, src=0, group=self._group)
        if found[1] is not None:
            raise UserError(found[1])
        result: T = found[0]
        return result

    def _on_any_rank(self, value: bool) -> bool:
        """Whether the value is true on any rank. Collective: no rank copies weights while another one samples."""
        return value if self._group is None else any(gather(value, self._group))


def require_one_node(nodes: Sequence[str]) -> None:
    """Refuse ranks on several nodes, of which only one has the server; ``nodes`` are the names by rank.

    Raises:
        UserError: naming the nodes.
    """
    if len(names := sorted(set(nodes))) > 1:
        raise UserError(
            f"data.engine VLLMServerEngine: the ranks are on several nodes ({', '.join(names)}), and a server gets the "
            "weights through the memory of its own node. Use VLLMEngine, or one node."
        )


def _body(request: Request, sampling: Sampling, eos_ids: Sequence[int]) -> dict[str, Any]:
    settings = sampling_settings(request, sampling, eos_ids)
    return {"token_ids": list(request.prompt_ids), "sampling_params": settings}


def _version_of(answer: dict[str, Any]) -> str | None:
    """Version of the weights from which all tokens of a complete sample came; None if there is no single one."""
    choice = answer["choices"][0]
    versions = {span["version"] for span in choice.get("weight_versions") or ()}
    is_complete = choice["finish_reason"] in ("stop", "length")
    return versions.pop() if is_complete and len(versions) == 1 else None


def _sample(answer: dict[str, Any], eos_ids: Sequence[int]) -> Sample:
    tokens = answer["choices"][0]["token_ids"]
    logprobs = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
    return Sample(tokens, tokens[-1] not in eos_ids, logprobs)
