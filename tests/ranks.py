"""Small trainings that come out the same in one process and in several, and the program that each process runs.

`python ranks.py FOLDER`, started once for each process by a launcher, trains all kinds one after the other in one
process group, with replicas of the model and with shards of it, and saves what it trained in a folder each.
`python ranks.py PROGRAM.py` runs another program as if it had GPUs to shard a model over.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapted import SETTINGS, adapt, config_of, sparse_llama
from conftest import random_ids, random_llama
from secateur.core.errors import SecateurError
from secateur.methods.adapters.pst import PstSchedule
from secateur.methods.optimizers.cram import CrAM
from secateur.train.adapter_linear import adapted_linears
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.trainer import KeepZeros, TwoPassTrainer

STEPS, BATCH, ACCUMULATED = 3, 4, 2  # BATCH rows for all processes together
ADAPTERS = tuple(SETTINGS)
KINDS = {
    "ddp": (*ADAPTERS, "all weights", "kept only", "cram"),
    "fsdp": (*ADAPTERS, "all weights"),
    "fsdp, sent": ("s2ft", "all weights"),
}
MORE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}},
    "fsdp, sent": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
}


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


def start(kind: str) -> nn.Module:
    """Return the model as it is before training."""
    if kind in ADAPTERS:
        return adapt(sparse_llama(), config_of(kind))
    return random_llama() if kind == "cram" else sparse_llama()


def train(kind: str, folder: Path, processes: int = 1, **more: Any) -> Trainer:
    """Train one kind, save it as a user would, in every process, and return the trainer."""
    args = arguments(folder, processes, **more)
    model = start(kind)
    trainer_class: Callable[..., Trainer] = Trainer
    callbacks: list[TrainerCallback] = []
    optimizers: tuple[Any, Any] = (None, None)
    if kind == "pst":
        callbacks = [PstSchedule()]
    elif kind == "cram":
        trainer_class, optimizers = TwoPassTrainer, (cram(model), None)
    elif kind not in ADAPTERS:
        callbacks = [KeepZeros()]
        if kind == "kept only":
            optimizers = (KeptOnly(sgd, model.parameters(), FixedMasks.from_zeros(model)), None)
    trainer = trainer_class(model, args, train_dataset=rows(), callbacks=callbacks, optimizers=optimizers)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


def sgd(groups: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=5.0, momentum=0.9)


def cram(model: nn.Module) -> torch.optim.Optimizer:
    return CrAM(rho=0.1, patterns=("50%", "2:4"), normalise=True).around(sgd(model.parameters()), model)


def masks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Return the masks that move, as plain data; they are no parameters, so nothing shards them."""
    return {
        layer.name: layer.secateur_pst_mask["default"].tolist()
        for layer in adapted_linears(model)
        if hasattr(layer, "secateur_pst_mask")
    }


def two_passes(buffers: bool) -> Tensor:
    """Return a weight after two steps of CrAM's closure under DDP, whose gradients may be views of its buffers."""
    model = random_llama()
    optimizer = cram(model)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=buffers)
    ids = random_ids()[torch.distributed.get_rank() :: 2]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = parallel(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return model.model.layers[0].mlp.up_proj.weight.detach()


def shard(model: nn.Module) -> nn.Module:
    """Shard a model as FSDP2 does, block by block."""
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module)
    return fully_shard(model)


def refusals() -> dict[str, str]:
    """Return what is said where weights are sharded and something cannot work; every process says the same."""
    ids = random_ids()

    def backward(model: nn.Module) -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def merge(kind: str) -> None:
        shard(start(kind)).merge_adapter()

    def a_linear_alone() -> None:
        model = start("spp")
        for layer in adapted_linears(model):
            fully_shard(layer.base_layer)
        backward(shard(model))

    def an_adapter_afterwards() -> None:
        adapt(shard(sparse_llama()), config_of("spp"))

    def an_optimizer(build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        model = start("all weights")
        optimizer = build(model)
        place = {id(parameter): name for name, parameter in model.named_parameters()}
        shard(model)
        for group in optimizer.param_groups:  # what Accelerate does
            group["params"] = [model.get_parameter(place[id(parameter)]) for parameter in group["params"]]
        backward(model)
        optimizer.step(lambda: None)

    def kept_only(model: nn.Module) -> torch.optim.Optimizer:
        return KeptOnly(sgd, model.parameters(), FixedMasks.from_zeros(model))

    def masks_from_before() -> None:
        model = start("all weights")
        callback = KeepZeros(FixedMasks.from_zeros(model))
        callback.on_train_begin(None, None, None, model=shard(model), optimizer=sgd(model.parameters()))

    cases: dict[str, Callable[[], object]] = {
        "merge": lambda: merge("spp"),
        "merge s2ft": lambda: merge("s2ft"),
        "a linear alone": a_linear_alone,
        "an adapter afterwards": an_adapter_afterwards,
        "kept only": lambda: an_optimizer(kept_only),
        "kept only afterwards": lambda: kept_only(shard(start("all weights"))),
        "cram": lambda: an_optimizer(cram),
        "cram afterwards": lambda: cram(shard(start("cram"))),
        "masks from before": masks_from_before,
        "a dense model": lambda: FixedMasks.from_zeros(shard(random_llama())),
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
        except SecateurError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def given_masks() -> bool:
    """Return whether masks given whole cut the shards of a model as those that its zeros make."""
    whole, model = start("all weights"), shard(start("all weights"))
    masks = {name: parameter.detach() != 0 for name, parameter in whole.named_parameters() if parameter.dim() > 1}
    given = FixedMasks([(model.get_parameter(name), mask) for name, mask in masks.items()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    given.apply_()
    return all(torch.equal(model.get_parameter(name).full_tensor() != 0, mask) for name, mask in masks.items())


def let_accelerate_shard_on_cpu() -> None:
    """Let Accelerate shard here too: torch does on CPU, with gloo, but Accelerate 1.15 then overlooks the request."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState

    def begin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    original = AcceleratorState.__init__
    AcceleratorState.__init__ = begin


def main(folder: Path) -> None:
    """Train everything in the process group that the launcher describes."""
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpu()
    for mode, kinds in KINDS.items():
        for kind in kinds:
            trainer = train(kind, folder / mode / kind, 2, **MORE[mode])
            assert trainer.accelerator.num_processes == 2
            assert isinstance(trainer.model, FSDPModule) == (mode != "ddp")
            assert all(isinstance(p, DTensor) == (mode != "ddp") for p in trainer.model.parameters())
            rank = trainer.accelerator.process_index
            (folder / mode / f"{kind} masks {rank}.json").write_text(json.dumps(masks_of(trainer.model)))
            trainer.accelerator.wait_for_everyone()
        if mode == "ddp":
            said = {"views of buffers": bool(torch.equal(two_passes(True), two_passes(False)))}
    said |= {"given masks": given_masks(), **refusals()}
    (folder / f"said {torch.distributed.get_rank()}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # refused passes left gathers behind; a thread that drops one during shutdown would abort the process


if __name__ == "__main__":
    if sys.argv[1].endswith(".py"):  # somebody's own program
        let_accelerate_shard_on_cpu()
        trainer = runpy.run_path(sys.argv[1], run_name="__main__")["trainer"]
        assert trainer.accelerator.num_processes == 2
        assert isinstance(trainer.model, FSDPModule) == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    else:
        main(Path(sys.argv[1]))
