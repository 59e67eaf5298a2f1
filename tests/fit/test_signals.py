"""A run that is ended from outside says so, and not by exit code 0."""

import os
import signal
import subprocess
import sys
import time


def test_sigterm_ends_with_its_own_exit_code(repository, tmp_path):
    command = [sys.executable, "-m", "egspo_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += [f"--trainer.default_root_dir={tmp_path}", "--data.benchmarks.init_args.num_problems=8"]
    log = tmp_path / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while "phase 1/" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert code == 128 + signal.SIGTERM, text
    assert "ended by SIGTERM. Saved " in text
    assert "resume with the same command and --ckpt_path last" in text
    assert "Traceback" not in text
