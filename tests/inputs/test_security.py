"""What comes from outside is data: checkpoints, model folders and the model's own text run nothing, fetch nothing."""

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
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_the_bomb_would_go_off(tmp_path):
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "bomb.ckpt")
    torch.load(tmp_path / "bomb.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict", "replay"])
def test_no_command_runs_what_a_checkpoint_holds(start, smallest, small_model, tmp_path, subcommand):
    path = tmp_path / "bomb.ckpt"
    torch.save({"egspo": {}, "pytorch-lightning_version": "2.6.0", "a": Bomb(tmp_path / "ran")}, path)
    run = smallest(tmp_path, small_model)
    run.subcommand, run.arguments = subcommand, [f"--ckpt_path={path}"]
    ended = start(tmp_path, *(["replay", str(path)] if subcommand == "replay" else run.command))
    assert ended.code == 2
    assert "would have to run code" in ended.output
    assert not (tmp_path / "ran").exists()


def test_nor_does_a_part_of_a_sharded_one(tmp_path):
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").touch()
    torch.save({"egspo": Bomb(tmp_path / "ran")}, tmp_path / "sharded" / "meta.pt")
    with pytest.raises(UserError, match="would have to run code"):
        open_checkpoint(tmp_path / "sharded")
    assert not (tmp_path / "ran").exists()


def test_every_torch_load_and_every_trust_is_explicit():
    """In the whole package: loads are of weights alone, and code of a model is run only where a config says so."""
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
def test_the_models_text_is_never_evaluated(tmp_path, extraction):
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


def test_nothing_is_fetched_offline_and_the_message_says_what_is_missing_where(smallest, tmp_path):
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
    assert socket.socket.connect  # of this process: left alone
