"""Two processes train to the weights that one trains to, replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import ranks
from adapted import sparse_llama, zeros_of
from conftest import TINY_TRAINED
from launching import PAIR, TESTS, launch

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in ranks.KINDS["ddp"]:
        ranks.train(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train and say."""
    folder = tmp_path_factory.mktemp("together")
    launch(sys.executable, "-m", "torch.distributed.run", *PAIR, TESTS / "ranks.py", folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def zeros(kind: str, folder: Path) -> dict[str, Tensor]:
    """Return the zeros of what was saved, merged if it is an adapter."""
    if kind not in ranks.ADAPTERS:
        return {name: tensor == 0 for name, tensor in tensors(folder).items()}
    return zeros_of(PeftModel.from_pretrained(sparse_llama(), folder).merge_and_unload())


each = pytest.mark.parametrize(
    ("mode", "kind"), [(mode, kind) for mode, kinds in ranks.KINDS.items() for kind in kinds]
)


@each
def test_two_processes_train_to_the_weights_of_one(mode, kind, alone, together):
    found, wanted = tensors(together / mode / kind), tensors(alone / kind)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    begun = {name.replace(".default", ""): tensor for name, tensor in ranks.start(kind).state_dict().items()}
    moved = [float((tensor - begun[name]).abs().max()) for name, tensor in wanted.items() if tensor.is_floating_point()]
    assert max(moved) > 0.01  # so that 1e-5 says something


@each
def test_zeros_are_those_of_one_process_to_the_last_bit(mode, kind, alone, together):
    found, wanted = zeros(kind, together / mode / kind), zeros(kind, alone / kind)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if kind not in ("pst", "cram"):
        before = zeros_of(sparse_llama())
        assert all(torch.equal(found[name], before[name]) for name in found)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_masks_that_move_are_the_same_in_all_processes(mode, together):
    first, second = (json.loads((together / mode / f"pst masks {rank}.json").read_text()) for rank in (0, 1))
    assert first
    assert first == second


def test_two_passes_survive_gradients_that_are_views_of_ddps_buffers(together):
    assert json.loads((together / "said 0.json").read_text())["views of buffers"]


def test_masks_given_whole_are_cut_as_the_shards_are(together):
    assert json.loads((together / "said 1.json").read_text())["given masks"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("merge", "StateError: the weight of `model.layers.0.self_attn.q_proj` is sharded over several processes"),
        ("merge s2ft", "StateError: the weight of `model.layers.0.self_attn.o_proj` is sharded over several processes"),
        ("a linear alone", "RecipeError: the weight of `model.layers.0.self_attn.q_proj` is sharded by itself"),
        ("an adapter afterwards", "RecipeError: the weights of the model are sharded already"),
        ("kept only", "RecipeError: `KeptOnly` does not work with sharded weights"),
        ("kept only afterwards", "RecipeError: `KeptOnly` does not work with sharded weights"),
        ("cram", "RecipeError: CrAM does not work with sharded weights"),
        ("cram afterwards", "RecipeError: CrAM does not work with sharded weights"),
        ("masks from before", "RecipeError: the masks are not of the parameters that are trained"),
        ("a dense model", "InputError: the model is not sparse"),
    ],
)
def test_what_cannot_work_on_shards_is_refused_by_every_process(case, message, together):
    for rank in (0, 1):
        assert json.loads((together / f"said {rank}.json").read_text())[case].startswith(message)


def blocks(language: str) -> list[str]:
    """Return the blocks of the guide in one language."""
    guide = TESTS.parent / "docs" / "guides" / "distributed.md"
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's script has been run by one process."""
    folder = tmp_path_factory.mktemp("guide")
    before, script, _ = blocks("python")
    (folder / "train.py").write_text(script)
    with contextlib.chdir(folder):
        exec(before.replace("builtin:smollm2-135m", str(TINY_TRAINED)) + script, {})
    (folder / "adapter").rename(folder / "alone")
    return folder


@pytest.mark.parametrize("command", blocks("console"), ids=["replicas", "shards"])
def test_the_guides_commands_train_what_one_process_does(command, guide):
    words = shlex.split(command.replace("\\\n", " "))
    assert (words[0], words[-1]) == ("accelerate", "train.py")
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:-1], "--main_process_port", "0"]
    launch(*program, TESTS / "ranks.py", "train.py", folder=guide, ACCELERATE_USE_CPU="true")
    found, wanted = tensors(guide / "adapter"), tensors(guide / "alone")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    shutil.rmtree(guide / "adapter")
