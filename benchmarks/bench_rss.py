"""Memory of streaming a model, in a fresh process: what pruning adds to what was resident before, beside the plan.

    python benchmarks/bench_rss.py --model builtin:smollm2-135m --calibration builtin:wiki-calibration

One JSON line per case: `growth_bytes` is the growth of the peak resident size from just before the call, `planned_bytes`
what the planner said, `model_bytes` the size of the weights. The gate: growth <= planned + half of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys
import torch
torch.set_num_threads(1)
import secateur
from secateur.recipe import stages
given = json.loads(sys.argv[1])
# everything that is imported on first use is imported before the measurement
import transformers.models.auto.modeling_auto, safetensors.torch
def resident():
    with open("/proc/self/status") as lines:
        found = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(found["VmRSS"].split()[0]) * 1024
ids = torch.randint(0, given["vocabulary"], (given["samples"], given["length"]), generator=torch.Generator().manual_seed(0))
before = resident()
result = secateur.prune(given["model"], calibration=ids, method=given["method"], pattern="50%", tuner=given["tuner"],
                        offload=given["offload"], output=given["output"])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = sum(parameter.nbytes for parameter in result.model.parameters())
print(json.dumps({"growth_bytes": after - before, "planned_bytes": result.report["planned_memory_bytes"],
                  "memory_plan": result.report["memory_plan"], "model_bytes": model, "before_bytes": before,
                  "seconds": result.report["seconds"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--case", action="append", help="METHOD[+TUNER][@OFFLOAD]")
    given = parser.parse_args()
    for case in given.case or ["wanda", "sparsegpt", "sparsegpt@disk"]:
        words, _, offload = case.partition("@")
        method, _, tuner = words.partition("+")
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "model": given.model,
                "method": method,
                "tuner": {"name": tuner, "epochs": 1} if tuner else None,
                "offload": offload or "ram",
                "samples": given.samples,
                "length": given.length,
                "vocabulary": given.vocabulary,
                "output": str(Path(folder) / "out"),
            }
            answer = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(settings)], capture_output=True, text=True, check=False
            )
        if answer.returncode:
            sys.stderr.write(answer.stderr)
            raise SystemExit(1)
        line = {"job": "rss", "case": case, "samples": given.samples, "length": given.length, "model": given.model}
        line |= json.loads(answer.stdout.splitlines()[-1])
        line["growth_over_planned"] = line["growth_bytes"] / line["planned_bytes"]
        line["within_gate"] = line["growth_bytes"] <= line["planned_bytes"] + line["model_bytes"] / 2
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
