"""How much memory a sweep will need, stated before it starts and refused where it does not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from secateur.core.contracts import BlockTuner, Planner, Pruner
from secateur.core.errors import ResourceError
from secateur.engine.sweep import Sweep
from secateur.models.blocks import Blocks
from secateur.models.linears import find_linears

SOLVER_COPIES = 6  # float32 matrices of a linear's size alive while it is solved: target, result, score, errors, masks
LIBRARY = 32 << 20  # buffers of the matrix library and the allocator's own slack, bytes
PLANNING_TOKENS = 2048  # tokens of one backward pass through the whole model
STATISTICS_COPIES = 2  # of the Gram: sums and means
GRAM_COPIES = 3  # what a pruner holds beside them unless it says otherwise: damped copy, its factor, inverse factor


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose on the compute device (where blocks run) and in main memory.

    Attributes:
        device: bytes on the compute device; for `cpu` these are bytes of main memory as well.
        host: bytes of main memory beside those.
        on_cpu: whether the compute device is the CPU.
    """

    device: dict[str, int]
    host: dict[str, int]
    on_cpu: bool

    @property
    def total(self) -> int:
        """Bytes of main memory: everything on CPU, else what waits there for the device."""
        return sum(self.host.values()) + (sum(self.device.values()) if self.on_cpu else 0)

    def refuse_if_short(self, limit: int | None = None) -> None:
        """Raise ResourceError if the plan does not fit in what is free.

        Args:
            limit: bytes that may be used; None asks the system (the container's limit where there is one).
        """
        have = available_memory() if limit is None else limit
        if self.total > have:
            self._refuse("main memory", {**self.host, **(self.device if self.on_cpu else {})}, self.total, have)
        if not self.on_cpu:
            free, _ = torch.cuda.mem_get_info()
            need = sum(self.device.values())
            if need > free:
                self._refuse("device memory", self.device, need, free)

    def _refuse(self, where: str, items: dict[str, int], need: int, have: int) -> None:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in items.items() if size)
        raise ResourceError(
            f"the plan needs {_size(need)} of {where} and {_size(have)} are free ({parts})",
            hint="use fewer --samples, a shorter --length, or `--offload disk`",
        )


def plan_memory(blocks: Blocks, sweep: Sweep, samples: int, length: int, hidden: int, dtype: torch.dtype) -> MemoryPlan:
    """Return the peak memory of `sweep`, beyond the model as it was loaded.

    Args:
        blocks: the model's blocks.
        sweep: what will be done.
        samples: calibration samples.
        length: tokens of each.
        hidden: width of the hidden states.
        dtype: compute dtype.
    """
    item = dtype.itemsize
    tokens = samples * length
    batch = min(tokens, max(1, sweep.batch_tokens // length) * length)
    largest, linears = max(
        ((sum(p.numel() for p in module.parameters()), module) for module in blocks.modules), key=lambda pair: pair[0]
    )
    index = blocks.modules.index(linears)
    views = find_linears(linears, blocks.names[index], index)
    wide = max((max(view.in_features, view.out_features) for view in views), default=hidden)
    stored = next(linears.parameters()).element_size()
    dense_path = sweep.error_correction or (sweep.tuner is not None and sweep.tuner.dense_path)
    copies = 2 if sweep.error_correction else 1
    pruner = sweep.pruner
    needs = set(pruner.needs) if pruner is not None else set()
    grams = 0
    if "gram" in needs or sweep.refit or sweep.error_correction:
        inputs = [view.in_features for view in views]
        widest = max(inputs, default=0)
        grams = 4 * widest**2 * (STATISTICS_COPIES + gram_copies(pruner))
        if not sweep.sequential:
            grams += 4 * sum(size**2 for size in set(inputs))
        if sweep.error_correction:
            grams += 2 * 4 * widest**2
    solver = max((view.in_features * view.out_features for view in views), default=0) * 4 * SOLVER_COPIES
    lanes = tokens * (wide + 2 * hidden) * item * (2 if sweep.error_correction else 1)
    step = 0
    if sweep.tuner is not None:
        sequences = int(getattr(sweep.tuner, "batch_size", 8))
        step = tuning_bytes(sweep.tuner, largest, sequences * length, hidden, wide)
    device = {
        "block": largest * item * copies + largest * stored,
        "calibration in flight": max((lanes if pruner is not None else 0) + max(grams, 0) + solver, step),
        "one batch": batch * (2 * wide + 3 * hidden) * item,
        "library": LIBRARY,
    }
    # a block's inputs are kept until it is finished, on each path, because it may have to be done again
    own_targets = sweep.tuner is not None and not sweep.tuner.dense_path
    stores = 2 + 2 * int(dense_path) + int(own_targets)
    states = tokens * hidden * item * stores
    host = {
        "hidden states": states if sweep.offload == "ram" else 2 * batch * hidden * item,
        "writing a block": 2 * largest * stored + tokens * hidden * item,
    }
    return MemoryPlan(device, host, sweep.device.type == "cpu")


def gram_copies(pruner: Pruner | None) -> int:
    """Return how many float32 matrices of the Gram's size `pruner` holds at most, beside the statistics.

    A pruner that holds more than `GRAM_COPIES` says so in `gram_copies`; one that refines a `base` holds what either does.
    """
    if pruner is None:
        return GRAM_COPIES
    return max(int(getattr(pruner, "gram_copies", GRAM_COPIES)), gram_copies(getattr(pruner, "base", None)))


def tuning_bytes(tuner: BlockTuner, parameters: int, tokens: int, hidden: int, wide: int) -> int:
    """Return the bytes of one tuning step: gradients, Adam's two moments, best state, masks, and saved activations.

    A tuner that holds further float32 copies of the weights says how many in `weight_copies`.
    """
    copies = 4 + int(getattr(tuner, "weight_copies", 0))
    return (4 * copies + 1) * parameters + tokens * (16 * hidden + 8 * wide) * 4


def with_planning(
    plan: MemoryPlan, planner: Planner, blocks: Blocks, length: int, hidden: int, vocabulary: int
) -> MemoryPlan:
    """Return `plan` with what a planner needs beyond it; the two never work at the same time.

    Args:
        plan: that of the sweep.
        planner: what runs before it.
        blocks: the model's blocks.
        length: tokens of a sample.
        hidden: width of the hidden states.
        vocabulary: tokens that the model knows.
    """
    parameters = sum(parameter.numel() for block in blocks.modules for parameter in block.parameters())
    need = 4 * planner.copies * parameters
    if planner.backward:
        tokens = max(PLANNING_TOKENS, length)
        wide = max((max(p.shape) for block in blocks.modules[:1] for p in block.parameters()), default=hidden)
        need += 4 * tokens * (len(blocks.modules) * (16 * hidden + 8 * min(wide, 8 * hidden)) + 4 * vocabulary)
    more = max(0, need - sum(plan.device.values()))
    return replace(plan, device={**plan.device, "planning": more}) if more else plan


def available_memory() -> int:
    """Return the bytes that can still be allocated: the container's limit less its use, or what the kernel has free."""
    free = _meminfo("MemAvailable")
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            ceiling, current = Path(limit).read_text().strip(), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        if ceiling.isdigit():
            free = min(free, max(int(ceiling) - current, 0))
    return free


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == field:
                return int(rest.split()[0]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: allocated on a CUDA device, resident in main memory otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def forget_peak(device: torch.device) -> bool:
    """Make `peak_memory` count from what is held now; return whether the system can do that.

    Linux forgets the largest resident size of a process when 5 is written to its `clear_refs`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
