"""Small trainings that come out the same in one process and in several, and the program that each process runs.

`python ranks.py MODE FOLDER [KIND ...]`, started once for each process by Accelerate's or torch's launcher, trains the
kinds one after the other in one process group and saves what they trained in a folder each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapted import SETTINGS, adapt, config_of, sparse_llama
from conftest import random_ids, random_llama
from secateur.methods.adapters.pst import PstSchedule
from secateur.methods.optimizers.cram import CrAM
from secateur.train.adapter import adapted_linears
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.trainer import KeepZeros, TwoPassTrainer

STEPS, BATCH, ACCUMULATED = 3, 4, 2  # BATCH rows for all processes together
ADAPTERS = tuple(SETTINGS)
WHOLE = ("all weights", "kept only", "cram")
SHARD = {"fsdp": True, "fsdp_config": {"version": 2}}


def arguments(folder: Path, processes: int, **more: Any) -> TrainingArguments:
    """Return settings under which all processes together see the rows in the order of one."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // processes,
        "gradient_accumulation_steps": ACCUMULATED,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.02,
        "max_grad_norm": 0.05,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**{**settings, **more})


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in random_ids(samples=BATCH * ACCUMULATED * STEPS, length=12)]


def train(kind: str, folder: Path, processes: int = 1, **more: Any) -> Trainer:
    """Train one kind, let every process save what it holds, and return the trainer."""
    args = arguments(folder, processes, **more)
    callbacks: list[TrainerCallback] = []
    optimizers: tuple[Any, Any] = (None, None)
    model: nn.Module
    trainer_class: Callable[..., Trainer] = Trainer
    if kind in ADAPTERS:
        model = adapt(sparse_llama(), config_of(kind))
        callbacks = [PstSchedule()] if kind == "pst" else []
    elif kind == "cram":
        model, trainer_class = random_llama(), TwoPassTrainer
        inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        optimizers = (CrAM(rho=0.1, patterns=("50%", "2:4"), normalise=True).around(inner, model), None)
    else:
        model, callbacks = sparse_llama(), [KeepZeros()]
        if kind == "kept only":
            optimizers = (KeptOnly(sgd, model.parameters(), FixedMasks.from_zeros(model)), None)
    trainer = trainer_class(model, args, train_dataset=rows(), callbacks=callbacks, optimizers=optimizers)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


def sgd(groups: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9)


def masks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Return the masks that move, as plain data; they are no parameters, so nothing shards them."""
    return {
        layer.name: layer.secateur_pst_mask["default"].tolist()
        for layer in adapted_linears(model)
        if hasattr(layer, "secateur_pst_mask")
    }


def main(mode: str, folder: str, *kinds: str) -> None:
    """Train `kinds` in the process group that the launcher describes."""
    torch.set_num_threads(1)
    for kind in kinds:
        place = Path(folder) / kind
        trainer = train(kind, place, 2, **(SHARD if mode == "fsdp" else {}))
        assert trainer.accelerator.num_processes == 2
        rank = trainer.accelerator.process_index
        (Path(folder) / f"{kind} masks {rank}.json").write_text(json.dumps(masks_of(trainer.model)))
        trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
