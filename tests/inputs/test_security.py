"""Untrusted input: checkpoints, model folders and completions run no code and open no connection."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from egspo_lightning.checkpointing.load import open_checkpoint
from egspo_lightning.errors import UserError
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.rewards.grading import MathGrader

PACKAGE = Path(__file__).parents[2] / "egspo_lightning"


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_bomb_runs_under_unsafe_load(tmp_path):
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "bomb.ckpt")
    torch.load(tmp_path / "bomb.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict", "replay"])
def test_no_subcommand_runs_code_from_a_checkpoint(start, smallest, small_model, tmp_path, subcommand):
    path = tmp_path / "bomb.ckpt"
    torch.save({"egspo": {}, "pytorch-lightning_version": "2.6.0", "a": Bomb(tmp_path / "ran")}, path)
    run = smallest(tmp_path, small_model)
    run.subcommand, run.arguments = subcommand, [f"--ckpt_path={path}"]
    ended = start(tmp_path, *(["replay", str(path)] if subcommand == "replay" else run.command))
    assert ended.code == 2
    assert "would have to run code" in ended.output
    assert not (tmp_path / "ran").exists()


def test_sharded_checkpoint_metadata_runs_no_code(tmp_path):
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").touch()
    torch.save({"egspo": Bomb(tmp_path / "ran")}, tmp_path / "sharded" / "meta.pt")
    with pytest.raises(UserError, match="would have to run code"):
        open_checkpoint(tmp_path / "sharded")
    assert not (tmp_path / "ran").exists()


def test_every_torch_load_is_weights_only_and_no_remote_code_is_trusted():
    """Every torch.load in the package sets weights_only; trust_remote_code is off unless the config sets it."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True)"), path
        assert "trust_remote_code=True" not in text, path
    assert PolicyConfig("x").trust_remote_code is False


HOSTILE = [
    "__import__('os').mkdir('{target}')",
    "\\boxed{{__import__('os').mkdir('{target}')}}",
    "\\boxed{{exec(\"import os; os.mkdir('{target}')\")}}",
    "\\boxed{{lambda: open('{target}', 'w')}}",
    "$$\\input{{|mkdir {target}}}$$ \\boxed{{\\write18{{mkdir {target}}}}}",
    "\\boxed{{().__class__.__bases__[0].__subclasses__()}}",
    "\\boxed{{Symbol('x').__init__.__globals__['__builtins__']['open']('{target}','w')}}",
    "\\boxed{{9**9**9**9}}",
    "\\boxed{{\\frac{{1}}{{0}}}}",
]


@pytest.mark.parametrize("extraction", ["boxed", "lenient"])
def test_completion_text_is_never_evaluated(tmp_path, extraction):
    target = tmp_path / "ran"
    texts = [text.format(target=target) for text in HOSTILE]
    with MathGrader(num_workers=1, extraction=extraction) as grader:
        grades = grader.grade(texts, ["4"] * len(texts))
        golds = grader.grade(["\\boxed{4}"] * len(texts), texts)
    assert not any(grade.correct for grade in [*grades, *golds])
    assert not target.exists()


OFFLINE = """
import socket, sys
def refuse(*arguments, **keywords):
    raise SystemExit("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from egspo_lightning.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_offline_run_opens_no_connection_and_names_missing_model(smallest, tmp_path):
    run = smallest(tmp_path, "some/model")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *run.command],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "a connection was tried" not in done.stderr
    for words in ("some/model", "config.json", "HF_HUB_OFFLINE is set", str(tmp_path / "cache")):
        assert words in done.stderr
    assert socket.socket.connect  # not replaced in this process
