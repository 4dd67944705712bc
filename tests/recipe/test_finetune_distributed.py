"""`finetune` in shards (FSDP2): two processes train, stop, go on and publish what one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import finetuning
import secateur
from conftest import TINY_TRAINED
from finetuning import ADAPTERS, MERGED, STOPPED
from launching import PAIR, TESTS, launch
from secateur.core.errors import RecipeError
from secateur.models.linears import find_all_linears
from secateur.train.checkpoints import last_whole

SHARDS = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # what `accelerate launch` says
}

pytestmark = pytest.mark.timeout(600)  # of both groups, which take 60 where nothing else runs


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model pruned to 2:4, as a folder."""
    output = tmp_path_factory.mktemp("sparse") / "model"
    secateur.prune(str(TINY_TRAINED), method="magnitude", pattern="2:4", output=output)
    return str(output)


@pytest.fixture(scope="module")
def alone(sparse: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains and says."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in ADAPTERS:
        finetuning.tell(0, folder, kind, sparse, **finetuning.settings(kind, 1, **finetuning.WATCHED))
    for kind in STOPPED:
        finetuning.tell(0, folder, f"{kind} resumed", sparse, **finetuning.settings(kind, 1, **finetuning.ADAMW))
    finetuning.tell(0, folder, "killed", sparse, **finetuning.settings("masked_lora", 1, **finetuning.KILLED))
    return folder


@pytest.fixture(scope="module")
def together(sparse: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train and say, until they are killed."""
    program = (sys.executable, "-m", "torch.distributed.run", *PAIR, TESTS / "finetuning.py")
    for _ in range(2):  # refused runs leave gathers behind, which may abort a process before it is killed
        folder = tmp_path_factory.mktemp("together")
        text = launch(*program, sparse, folder, fails=True, **SHARDS)
        last = last_whole(folder / "killed.unfinished" / "checkpoints")
        if last is not None:
            break
    assert last is not None, text
    assert last.name == "checkpoint-4"
    return folder


def said(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name} {rank}.json").read_text())


def tensors(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same(found: Path, wanted: Path) -> None:
    one, other = tensors(found), tensors(wanted)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_curve(found: dict, wanted: dict) -> None:
    for curve in ("losses", "evaluations"):
        assert [line["step"] for line in found[curve]] == [line["step"] for line in wanted[curve]]
        for one, other in zip(found[curve], wanted[curve], strict=True):
            assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_processes_train_to_the_weights_of_one(kind, alone, together):
    assert_same(together / kind, alone / kind)
    for rank in (0, 1):
        assert_same_curve(said(together, kind, rank)["report"], said(alone, kind)["report"])
    losses = [line["loss"] for line in said(alone, kind)["report"]["evaluations"]]
    assert abs(losses[-1] - losses[0]) > 1e-3  # so that 1e-5 says something


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_process_gets_the_whole_model_and_the_sums_of_all_of_it(kind, alone, together):
    wanted = said(alone, kind)
    for rank in (0, 1):
        found = said(together, kind, rank)
        assert found["devices"] == ["cpu"]
        assert found["eval"]
        assert found["logits"] == pytest.approx(wanted["logits"], abs=1e-4)
        for name in ("sparsity", "trainable", "trainable_share", "sequences"):
            assert found["report"][name] == wanted["report"][name]


@pytest.mark.parametrize("kind", [*MERGED, "all weights"])
def test_zeros_are_those_of_one_process_to_the_last_bit(kind, sparse, alone, together):
    wanted = secateur.load(alone / kind).model
    name = kind
    if kind != "all weights":
        wanted, name = wanted.merge_and_unload(), f"{kind} merged"
    found = secateur.load(together / name).model
    before = secateur.load(sparse).model
    for views in zip(*map(find_all_linears, (found, wanted, before)), strict=True):
        mine, other, old = (view.read() for view in views)
        assert torch.equal(mine == 0, other == 0)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
        if kind != "pst":  # which chooses its own zeros
            assert torch.equal(mine == 0, old == 0)


def test_sparing_memory_changes_nothing(alone, together):
    assert_same(together / "spared", alone / "spp")


@pytest.mark.parametrize("kind", STOPPED)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(kind, alone, together):
    for rank in (0, 1):
        assert (
            "TimeLimitReached: the time limit was reached after 1 steps"
            in said(together, f"{kind} stopped", rank)["error"]
        )
        assert_same_curve(said(together, f"{kind} resumed", rank)["report"], said(alone, f"{kind} resumed")["report"])
    assert_same(together / f"{kind} resumed", alone / f"{kind} resumed")
    assert not (together / f"{kind} resumed.unfinished").exists()


def test_every_process_sees_that_nothing_is_left_to_do(together):
    for rank in (0, 1):
        assert "nothing was done" in said(together, "nothing to do", rank)["report"]["warnings"][-1]


def test_a_step_that_is_not_finite_stops_all_processes_and_the_last_checkpoint_stays(together):
    for rank in (0, 1):
        assert said(together, "burnt", rank)["error"].startswith("NumericError: ")
    assert last_whole(together / "burnt.unfinished" / "checkpoints") is not None
    assert not (together / "burnt").exists()


def test_the_command_goes_on_after_a_kill_with_the_same_curve(sparse, alone, together):
    words = finetuning.settings("masked_lora", 2, **finetuning.KILLED)
    given = ["--adapter", "masked_lora", "--set", "adapter.r=4", "--whole-loss", "--resume", "--json"]
    for name in ("data", "evaluation"):
        given += [f"--{name}", words.pop(name)]
    for name in words.keys() - {"adapter", "completion_only"}:
        given += ["--set", f"{name}={words[name]}"]
    given += ["--output", together / "killed"]
    shards = ["--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", 2, *shards]
    program = ["--main_process_port", 0, TESTS / "finetuning.py", "--command", "finetune", sparse]
    text = launch(*map(str, [*launcher, *program, *given]), ACCELERATE_USE_CPU="true")
    report = json.loads(text[text.index('{"stage"') :])
    assert_same_curve(report, said(alone, "killed")["report"])
    assert_same(together / "killed", alone / "killed")


@pytest.mark.parametrize(
    ("version", "settings", "message"),
    [
        ("1", {}, "FSDP version 1"),
        ("2", {"adapter": None, "around": "cram"}, "`around` does not work with sharded weights"),
        ("2", {"adapter": None, "compact_state": True}, "`compact_state` does not work with sharded weights"),
        ("2", {"inplace": True}, "`inplace` does not work with sharded weights"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_anything_is_read(version, settings, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(RecipeError, match=message) as caught:
        secateur.finetune(torch.nn.Linear(2, 2), data="nowhere", **settings)
    assert caught.value.hint
    if version == "1":
        assert "--fsdp_version 2" in caught.value.hint
