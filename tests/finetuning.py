"""Fine-tunings that come out the same in one process and in shards, and the program that each process runs.

`python finetuning.py MODEL FOLDER`, started once for each process by a launcher, runs all of them in one process group
and writes what each process got to see; the last one is killed at its fifth step.
`python finetuning.py --command WORDS` is the command line, as if Accelerate knew that it can shard on CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import secateur
from ranks import let_accelerate_shard_on_cpu
from secateur.core import faults
from secateur.core.errors import SecateurError

DATA = "builtin:tiny-instructions"
STEPS, BATCH, LENGTH = 3, 4, 40  # BATCH rows for all processes together; no example is shorter than LENGTH
ADAPTERS: dict[str, Any] = {
    "spp": {"name": "spp", "r": 4, "dropout": 0.0},
    "masked_lora": {"name": "masked_lora", "r": 4},
    "s2ft": {"name": "s2ft", "o": 1, "down": 8},
    "pst": {"name": "pst", "pattern": "60%", "r": 2},
    "lora": {"name": "lora", "r": 4},
    "all weights": None,
}
MERGED = ("s2ft", "pst")
STOPPED = ("pst", "all weights")
ADAMW = {"optimizer": "adamw_torch", "learning_rate": 3e-4}
WATCHED = {"evaluation": [{"text": "The river runs north into the sea of ice. " * 9}] * 5, "evaluate_every": 2}
KILLED = {**ADAMW, **WATCHED, "evaluation": DATA, "steps": 6, "save_every": 2}


def settings(kind: str, processes: int, **more: Any) -> dict[str, Any]:
    """Return the settings of one kind, under which all processes together see the rows of one."""
    found = {
        "data": DATA,
        "adapter": ADAPTERS[kind],
        "steps": STEPS,
        "length": LENGTH,
        "batch_size": BATCH // processes,
        "learning_rate": {"spp": 30.0, "s2ft": 1.0, "all weights": 0.1}.get(kind, 0.1),
        "optimizer": "sgd",
        "weight_decay": 1e-3,
        "clip": 0.5,
        "warmup": 0.0,
        "completion_only": False,
        "log_every": 1,
    }
    return {**found, **more}


def tell(rank: int, folder: Path, name: str, model: str, output: str = "", **words: Any) -> None:
    """Fine-tune, and write the report, and what the model in the result says to a text; or the error."""
    try:
        tuned, report = secateur.finetune(model, output=folder / (output or name), **words)
    except SecateurError as error:
        said: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
    else:
        with torch.no_grad():
            logits = tuned(torch.arange(16)[None]).logits
        devices = sorted({parameter.device.type for parameter in tuned.parameters()})
        said = {
            "report": report,
            "logits": logits.flatten()[:500].tolist(),
            "devices": devices,
            "eval": not tuned.training,
        }
    (folder / f"{name} {rank}.json").write_text(json.dumps(said))


def main(model: str, folder: Path) -> None:
    """Run everything in the process group that the launcher describes."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for kind in ADAPTERS:
        tell(rank, folder, kind, model, **settings(kind, processes, **WATCHED))
    for kind in MERGED:
        tell(rank, folder, f"{kind} merged", model, **settings(kind, processes, merge=True))
    spared = {"batch_size": 1, "accumulation": BATCH // processes, "gradient_checkpointing": True}
    tell(rank, folder, "spared", model, **settings("spp", processes, **spared))
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # which is for others to say
    for kind in STOPPED:
        name, words = f"{kind} resumed", settings(kind, processes, **ADAMW)
        tell(rank, folder, f"{kind} stopped", model, name, **words, max_minutes=0)
        tell(rank, folder, name, model, **words, resume=True)
    tell(rank, folder, "nothing to do", model, name, **words, resume=True)
    burnt = {"learning_rate": 1e30, "clip": 0.0, "steps": 20, "save_every": 1}
    tell(rank, folder, "burnt", model, **settings("all weights", processes, **burnt))
    os.environ[faults.VARIABLE] = "train.step:5:kill"
    faults.forget()
    tell(rank, folder, "killed", model, **settings("masked_lora", processes, **KILLED))


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpu()
    if sys.argv[1] == "--command":
        from secateur.cli import main as command

        sys.argv[1:] = sys.argv[2:]
        sys.exit(command())
    else:
        main(sys.argv[1], Path(sys.argv[2]))
