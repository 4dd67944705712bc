"""Run every benchmark that needs no model, one after the other: `python benchmarks/run_all.py [--quick]`.

Each prints its JSON lines; `quality.py` and `bench_rss.py` take a model and are run by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BY_HAND = {"bench_rss.py"}


def main() -> None:
    here = Path(__file__).parent
    failed = []
    for script in sorted(here.glob("bench_*.py")):
        if script.name in BY_HAND:
            continue
        print(script.name, file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=False).returncode:
            failed.append(script.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
