"""Watch over ranks that work together, each in a process of its own."""

import signal
import subprocess
import sys

import pytest

WATCH = """
import subprocess, sys, time
from egspo_lightning.rollout.rank_watch import watched
seconds_left, seconds_until_end = map(float, sys.argv[1:])
other = subprocess.Popen(["sleep", str(seconds_until_end)])
with watched([other.pid], grace_s=2.0):
    time.sleep(seconds_left)
print("left the block")
time.sleep(seconds_until_end)
"""
"""A process that works with another one for some time; the other one ends, and stays a zombie."""


@pytest.mark.parametrize(
    ("seconds_left", "seconds_until_end", "code"),
    [("60", "0.5", 1), ("0.5", "0", 0), ("0", "3", 0)],
    ids=["ends within the block", "ends just before the block is left", "ends after the block"],
)
def test_the_end_of_a_rank_ends_the_one_that_works_with_it(repository, seconds_left, seconds_until_end, code):
    command = [sys.executable, "-c", WATCH, seconds_left, seconds_until_end]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=30)
    assert ended.returncode == code, ended.stderr
    assert ("left the block" in ended.stdout) == (code == 0)
    assert ("A rank of this run has ended (process " in ended.stderr) == (code == 1)


SIGTERM = """
import os, signal
from egspo_lightning.rollout.rank_watch import ended_by_sigterm
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
with ended_by_sigterm():
    pass
os.kill(os.getpid(), signal.SIGTERM)
with ended_by_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
print("not ended")
"""


def test_sigterm_ends_the_process_within_the_block_alone(repository):
    command = [sys.executable, "-c", SIGTERM]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "handled\n"), ended.stderr
