import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from egspo_lightning.rewards.grading import MathGrader

Gone = Callable[[list[int]], None]
HANGING_ANSWER = r"9^{9^{9^{9}}}+x"

CLIENT = """
    import os, signal, sys, threading, time
    from egspo_lightning.rewards.grading import MathGrader
    grader = MathGrader(num_workers=2, deadline_s=60.0)
    assert all(grade.correct for grade in grader.grade_answers(["x+1"] * 4, ["1+x"] * 4))
    print(*grader.worker_pids(), flush=True)
"""


def run_client(ending: str) -> tuple[subprocess.Popen[str], list[int]]:
    code = textwrap.dedent(CLIENT) + textwrap.dedent(ending)
    client = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert client.stdout is not None
    pids = [int(pid) for pid in client.stdout.readline().split()]
    assert len(pids) == 3
    return client, pids


def test_rewards_import_neither_torch_nor_sympy_in_the_client() -> None:
    code = """
        import sys
        import egspo_lightning.rewards.functions
        assert not {"torch", "sympy", "math_verify"} & set(sys.modules)
        import egspo_lightning.rewards._worker_main
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_grading_plain_numbers_starts_no_process() -> None:
    with MathGrader() as grader:
        assert [grade.correct for grade in grader.grade([r"\boxed{72}", r"\boxed{7}"], ["72", "8"])] == [
            True,
            False,
        ]
        assert grader.worker_pids() == []


def test_close_leaves_no_process_and_can_be_repeated(wait_until_gone: Gone) -> None:
    grader = MathGrader(num_workers=2)
    grader.grade_answers(["x+1"] * 4, ["1+x"] * 4)
    pids = grader.worker_pids()
    assert len(pids) == 3
    grader.close()
    grader.close()
    wait_until_gone(pids)
    assert grader.worker_pids() == []
    assert grader.grade_answers(["x+1"], ["1+x"])[0].correct
    grader.close()


def test_garbage_collected_grader_leaves_no_process(wait_until_gone: Gone) -> None:
    grader = MathGrader()
    grader.grade_answers(["x+1"], ["1+x"])
    pids = grader.worker_pids()
    del grader
    gc.collect()
    wait_until_gone(pids)


def test_client_that_exits_leaves_no_process(wait_until_gone: Gone) -> None:
    client, pids = run_client("")
    assert client.wait(timeout=20) == 0
    wait_until_gone(pids)


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [
        ("raise RuntimeError('as it happens')", 1),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        (
            "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)",
            -signal.SIGINT,
        ),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
    ],
    ids=["exception", "exit", "no clean-up", "Ctrl-C", "SIGTERM"],
)
def test_client_ended_by_error_or_signal_leaves_no_process(ending: str, exit_code: int, wait_until_gone: Gone) -> None:
    client, pids = run_client(ending)
    assert client.wait(timeout=20) == exit_code
    wait_until_gone(pids)


def test_killed_client_leaves_no_process(wait_until_gone: Gone) -> None:
    busy = rf"""
        threading.Thread(target=grader.grade_answers, args=([r"{HANGING_ANSWER}"] * 2, ["5"] * 2), daemon=True).start()
        time.sleep(60)
    """
    client, pids = run_client(busy)
    time.sleep(0.3)  # its workers are now inside sympy for another minute
    client.kill()
    client.wait()
    wait_until_gone(pids)


def test_worker_processes_killed_while_idle_are_replaced() -> None:
    with MathGrader(num_workers=2) as grader:
        grader.grade_answers(["x+1"] * 4, ["1+x"] * 4)
        for first in (1, 0):  # the workers, then also their parent
            pids = grader.worker_pids()
            for pid in pids[first:]:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
            grades = grader.grade_answers(["x+1"] * 4, ["1+x"] * 4)
            assert [grade[:2] for grade in grades] == [(True, "graded")] * 4
            assert not set(pids[first:]) & set(grader.worker_pids())


def test_worker_killed_while_grading_loses_one_verdict() -> None:
    with MathGrader(num_workers=1, deadline_s=20.0) as grader:
        grader.grade_answers(["x+1"], ["1+x"])
        threading.Timer(0.3, os.kill, (grader.worker_pids()[1], signal.SIGKILL)).start()
        grades = grader.grade_answers([HANGING_ANSWER, "x+1"], ["5", "1+x"])
    assert [(grade.correct, grade.status) for grade in grades] == [(False, "crashed"), (True, "graded")]


def test_grader_works_after_keyboard_interrupt(wait_until_gone: Gone) -> None:
    with MathGrader(num_workers=1, deadline_s=20.0) as grader:
        grader.grade_answers(["x+1"], ["1+x"])
        worker = grader.worker_pids()[1]
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade_answers([HANGING_ANSWER], ["5"])
        wait_until_gone([worker])
        assert grader.grade_answers(["x+1"], ["1+x"])[0].correct


@pytest.mark.parametrize("state", ["at work", "stopped", "starting"])
def test_close_ends_grading_in_other_threads(wait_until_gone: Gone, state: str) -> None:
    grader = MathGrader(num_workers=2, deadline_s=60.0)
    raised: list[BaseException] = []

    def grade() -> None:
        try:
            grader.grade_answers([HANGING_ANSWER] * 4, ["5"] * 4)
        except RuntimeError as error:
            raised.append(error)

    if state != "starting":
        grader.grade_answers(["x+1"] * 4, ["1+x"] * 4)
    pids = grader.worker_pids()
    for pid in pids[1:] if state == "stopped" else ():
        os.kill(pid, signal.SIGSTOP)
    threads = [threading.Thread(target=grade) for _ in range(2)]  # one of them waits for the other
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    pids = pids or grader.worker_pids()
    started = time.monotonic()
    grader.close()
    assert time.monotonic() - started < 20.0  # about 1 s on an idle machine; the deadline is 60 s
    for thread in threads:
        thread.join(timeout=5.0)
    assert len(raised) == 2
    assert all("closed" in str(error) for error in raised)
    assert pids
    wait_until_gone(pids)
    assert grader.grade_answers(["x+1"], ["1+x"])[0].correct
    grader.close()


def test_forked_client_has_its_own_workers() -> None:
    with MathGrader() as grader:
        grader.grade_answers(["x+1"], ["1+x"])
        before = grader.worker_pids()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                assert grader.worker_pids() == []
                assert grader.grade_answers(["x+1"], ["1+x"])[0].correct
                assert not set(before) & set(grader.worker_pids())
                grader.close()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert grader.worker_pids() == before
        assert grader.grade_answers(["x+1"], ["1+x"])[0].correct
        assert grader.worker_pids() == before


def test_pickled_grader_has_its_own_workers_and_the_same_memory_limit() -> None:
    with MathGrader(memory_limit_mb=256) as grader, pickle.loads(pickle.dumps(grader)) as copy:
        grader.grade_answers(["x+1"], ["1+x"])
        assert copy.grade_answers(["x+1"], ["1+x"])[0].correct
        assert not set(grader.worker_pids()) & set(copy.worker_pids())
        limits = Path(f"/proc/{copy.worker_pids()[1]}/limits").read_text()
    assert str(256 * 2**20) in next(line for line in limits.splitlines() if line.startswith("Max address space"))


def test_out_of_memory_counts_as_crash() -> None:
    hungry = r"(a+b+c+d+f+g)^{60} \mod 7"  # expands into millions of terms
    with MathGrader(memory_limit_mb=256, deadline_s=60.0) as grader:
        grades = grader.grade_answers(["x+1", hungry, "x+2", "1+x"], ["1+x", "5", "1+x", "x+1"])
    assert [(grade.correct, grade.status) for grade in grades] == [
        (True, "graded"),
        (False, "crashed"),
        (False, "graded"),
        (True, "graded"),
    ]


def test_answers_after_a_hanging_one_are_graded() -> None:
    answers = [HANGING_ANSWER, "x+1", "x+2", "x+1"] * 4
    with MathGrader(num_workers=2, deadline_s=2.0) as grader:
        grader.grade_answers(["x+1"] * 4, ["1+x"] * 4)
        grades = grader.grade_answers(answers, ["1+x"] * len(answers))
    assert [grade.status for grade in grades] == ["timeout", "graded", "graded", "graded"] * 4
    assert [grade.correct for grade in grades] == [False, True, False, True] * 4
    assert all(grade.seconds >= 2.0 for grade in grades[::4])


def test_timeout_is_reported_if_the_client_is_delayed_after_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Connection.send

    def send_and_wait(connection: Connection, request: object) -> None:
        send(connection, request)
        time.sleep(0.1)

    monkeypatch.setattr(Connection, "send", send_and_wait)
    with MathGrader(deadline_s=0.5) as grader:
        grader.grade_answers(["x+1"], ["1+x"])
        assert grader.grade_answers([HANGING_ANSWER], ["5"])[0].status == "timeout"


CHILD = """
import multiprocessing, sys
from egspo_lightning.rewards.grading import MathGrader

def grade(results):
    with MathGrader() as grader:
        results.put([grade.correct for grade in grader.grade_answers(["x+1", "x"], ["1+x", "1+x"])])

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    results = context.Queue()
    child = context.Process(target=grade, args=(results,))
    child.start()
    assert results.get(timeout=60) == [True, False]
    child.join(timeout=20)
    sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_grader_works_under_every_start_method(tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"  # a file, because a spawned child imports its main module
    program.write_text(CHILD)
    done = subprocess.run([sys.executable, program, method], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
