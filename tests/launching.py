"""Programs that start others, run by tests to their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

TESTS = Path(__file__).parent
SOURCE = Path(secateur.__file__).parents[1]
LIMIT = 270  # seconds for one group of processes, which takes 20 where nothing else runs
PAIR = ("--standalone", "--nproc_per_node", "2")


def launch(*words: str | Path, folder: Path | None = None, fails: bool = False, **settings: str) -> str:
    """Run a program, which starts others, in a folder, and return what all have written.

    Fails with that text if the program fails (or does not, where it should), or does not end; no process outlives it.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **settings,
    }
    with subprocess.Popen(
        list(map(str, words)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"still running after {LIMIT} s:\n{text}")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert (process.returncode != 0) == fails, text
    return text
