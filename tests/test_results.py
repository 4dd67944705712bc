"""The page of measured results says what the recorded lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_results_page_is_fresh():
    answer = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "write_results.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
