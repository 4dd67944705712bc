"""Two processes train to the weights that one trains to, replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import ranks
import secateur
from adapted import finish, sparse_llama, zeros_of

TESTS = Path(ranks.__file__).parent
SOURCE = Path(secateur.__file__).parents[1]
LIMIT = 110  # seconds for one group of processes
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(*words: str | Path) -> str:
    """Run a program, which starts others, and return what all have written.

    Fails with that text if the program fails, or does not end; no process outlives it.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    with subprocess.Popen(
        list(map(str, words)),
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
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in (*ranks.ADAPTERS, *ranks.WHOLE):
        ranks.train(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train, each with the whole model."""
    folder = tmp_path_factory.mktemp("replicated")
    launch(*LAUNCHER, TESTS / "ranks.py", "ddp", folder, *ranks.ADAPTERS, *ranks.WHOLE)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train, each with half of the model."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(*LAUNCHER, TESTS / "ranks.py", "fsdp", folder, *ranks.ADAPTERS, "all weights")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def check_equal(found: Path, wanted: Path) -> None:
    """Fail unless two folders hold the same trained tensors to 1e-5."""
    one, other = tensors(found), tensors(wanted)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check_merges(folder: Path, kind: str) -> None:
    """Fail unless a saved adapter merges with exactly the zeros that it promises."""
    base = sparse_llama()
    wanted = zeros_of(base)
    tuned = PeftModel.from_pretrained(base, folder / kind)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items() if "mask" in name}
    merged = tuned.merge_and_unload()
    found = zeros_of(merged)
    if kind == "pst":
        assert before
        return
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", [*ranks.ADAPTERS, *ranks.WHOLE])
def test_two_replicas_train_what_one_process_does(kind, alone, replicated):
    check_equal(replicated / kind, alone / kind)
