"""`finetune` on the tiny trained model: zeros, resuming, faults, and what is said about settings that cannot be."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from launching import PAIR, launch
from secateur.core import faults
from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError, StateError, TimeLimitReached
from secateur.models.linears import find_all_linears
from secateur.train.checkpoints import last_whole

DATA = "builtin:tiny-instructions"
SHORT = {"data": DATA, "steps": 3, "length": 160, "batch_size": 2, "log_every": 1, "completion_only": False}
ADAPTERS = {
    "spp": {"name": "spp", "r": 4, "dropout": 0.0},
    "masked_lora": {"name": "masked_lora", "r": 4},
    "dora": {"name": "masked_lora", "r": 4, "use_dora": True},
    "s2ft": {"name": "s2ft", "o": 1, "down": 8},
    "s2ft by gradients": {"name": "s2ft", "o": 1, "down": 8, "strategy": "gradient"},
    "pst": {"name": "pst", "pattern": "60%", "r": 2},
}


@pytest.fixture(scope="module")
def sparse(trained_folder, tmp_path_factory):
    """The tiny model pruned to 2:4, as a folder."""
    output = tmp_path_factory.mktemp("sparse") / "model"
    secateur.prune(str(trained_folder), method="magnitude", pattern="2:4", output=output)
    return str(output)


def supports(model):
    return {view.name: view.read() != 0 for view in find_all_linears(model)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_what_is_merged_has_the_zeros_it_had_and_says_what_the_adapter_said(sparse, adapter, ids):
    before = supports(secateur.load(sparse).model)
    tuned, report = secateur.finetune(sparse, adapter=adapter, **SHORT)
    with torch.no_grad():
        beside = tuned(ids).logits
        merged = tuned.merge_and_unload()
        assert torch.allclose(merged(ids).logits, beside, atol=1e-5)
    if adapter["name"] != "pst":  # which chooses its own zeros
        assert same(supports(merged), before)
    assert report["sparsity"] == pytest.approx(0.6 if adapter["name"] == "pst" else 0.5, abs=1e-3)
    assert report["sparsity"] == pytest.approx(secateur.inspect(merged)["sparsity"], abs=1e-9)
    assert len(report["losses"]) == 3
    assert report["sparsity_before"] == pytest.approx(0.5)
    assert 0 < report["trainable"] < 0.5 * sum(weight.numel() for weight in merged.parameters())


def test_a_model_with_a_pst_adapter_is_as_sparse_as_its_mask_says(trained_folder, tmp_path):
    secateur.finetune(trained_folder, adapter=ADAPTERS["pst"], output=tmp_path / "out", **SHORT)
    report = secateur.evaluate(tmp_path / "out", perplexity="builtin:tiny", length=64, limit=1)
    assert report["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_training_learns(sparse):
    settings = {**SHORT, "steps": 20, "log_every": 10, "batch_size": 4, "warmup": 2}
    report = secateur.finetune(sparse, adapter="masked_lora", learning_rate=5e-3, evaluation=DATA, **settings).report
    first, last = report["evaluations"][0], report["evaluations"][-1]
    assert first["step"] == 0
    assert last["step"] == 20
    assert last["loss"] < 0.9 * first["loss"]
    assert report["losses"][-1]["loss"] < report["losses"][0]["loss"]


def test_an_adapter_folder_opens_again_and_answers_alike(sparse, tmp_path, ids):
    tuned = secateur.finetune(sparse, adapter=ADAPTERS["spp"], output=tmp_path / "out", **SHORT).model
    again = secateur.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, tuned(ids).logits)
    assert secateur.evaluate(str(tmp_path / "out"), perplexity="builtin:tiny", length=64, limit=1)["sparsity"] == 0.5
    assert not (tmp_path / "out.unfinished").exists()
    with pytest.raises(InputError, match="adapter beside its base"):
        secateur.prune(str(tmp_path / "out"), method="magnitude")


def test_equal_runs_write_equal_bytes(sparse, tmp_path):
    for name in ("a", "b"):
        secateur.finetune(sparse, adapter=ADAPTERS["masked_lora"], output=tmp_path / name, **SHORT)
    for file in ("adapter_model.safetensors", "adapter_config.json", "secateur.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_merging_writes_a_whole_model_that_is_as_sparse(sparse, tmp_path):
    secateur.finetune(sparse, adapter=ADAPTERS["spp"], merge=True, output=tmp_path / "out", **SHORT)
    assert same(supports(secateur.load(tmp_path / "out").model), supports(secateur.load(sparse).model))


def test_merging_plain_lora_into_a_sparse_model_is_refused(sparse, tmp_path):
    with pytest.raises(InputError, match="would fill"):
        secateur.finetune(sparse, adapter="lora", merge=True, output=tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compact", [False, True])
def test_all_weights_are_trained_under_the_mask(sparse, tmp_path, compact):
    before = secateur.load(sparse).model
    settings = SHORT | {"clip": 0.0}
    tuned = secateur.finetune(sparse, adapter=None, compact_state=compact, weight_decay=0.1, **settings).model
    assert same(supports(tuned), supports(before))
    assert not torch.equal(find_all_linears(tuned)[0].read(), find_all_linears(before)[0].read())


def test_compact_states_give_the_weights_that_full_states_give(sparse):
    settings = SHORT | {"clip": 0.0, "adapter": None}
    one, other = (secateur.finetune(sparse, compact_state=compact, **settings).model for compact in (False, True))
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_cram_works_around_the_optimizer(trained_folder):
    tuned, report = secateur.finetune(str(trained_folder), adapter=None, around={"name": "cram"}, **SHORT)
    assert len(report["losses"]) == 3
    assert all(torch.isfinite(weight).all() for weight in tuned.parameters())


def test_the_model_tokenizer_and_random_generators_of_the_caller_are_left_alone(sparse):
    loaded = secateur.load(sparse)
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    before = random.random.__self__.getstate(), torch.random.get_rng_state().clone(), loaded.tokenizer.pad_token
    secateur.finetune(loaded.model, loaded.tokenizer, adapter=ADAPTERS["spp"], **SHORT)
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert loaded.tokenizer.pad_token == before[2]
    assert same(loaded.model.state_dict(), weights)
    assert "forward" not in vars(loaded.model)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_refused_run_leaves_the_model_and_the_tokenizer_as_they_were(sparse):
    loaded = secateur.load(sparse)
    loaded.tokenizer.pad_token = None
    with pytest.raises(InputError, match="no example"):
        secateur.finetune(
            loaded.model, loaded.tokenizer, adapter=None, inplace=True, **SHORT | {"length": 8, "completion_only": True}
        )
    assert loaded.tokenizer.pad_token is None
    assert "forward" not in vars(loaded.model)


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_curve(sparse, tmp_path):
    command = [
        *(sys.executable, "-m", "secateur", "finetune", sparse, "--data", DATA, "--evaluation", DATA, "--json"),
        *("--adapter", "masked_lora", "--steps", "6", "--length", "128", "--batch-size", "2", "--whole-loss"),
        *("--log-every", "1", "--save-every", "2", "--output", str(tmp_path / "out")),
    ]
    whole = secateur.finetune(
        sparse,
        adapter="masked_lora",
        evaluation=DATA,
        output=tmp_path / "whole",
        **SHORT | {"steps": 6, "length": 128, "save_every": 2},
    ).report
    killed = subprocess.run(
        command, env={**os.environ, faults.VARIABLE: "train.step:5:kill"}, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert last_whole(tmp_path / "out.unfinished" / "checkpoints").name == "checkpoint-4"
    refused = subprocess.run(command, capture_output=True, timeout=120, text=True)
    assert refused.returncode == 6
    assert "--resume" in refused.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, timeout=120, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["losses"] == whole["losses"]
    assert report["evaluations"] == whole["evaluations"]
    assert same(
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        load_file(tmp_path / "whole" / "adapter_model.safetensors"),
    )


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(sparse, tmp_path, monkeypatch):
    settings = SHORT | {"steps": 4, "save_every": 1}
    faults.forget()
    monkeypatch.setenv(faults.VARIABLE, "train.seal:3:raise")
    with pytest.raises(faults.InjectedError):
        secateur.finetune(sparse, adapter=ADAPTERS["spp"], output=tmp_path / "out", **settings)
    monkeypatch.delenv(faults.VARIABLE)
    checkpoints = tmp_path / "out.unfinished" / "checkpoints"
    assert (checkpoints / "checkpoint-3").exists()
    assert last_whole(checkpoints).name == "checkpoint-2"
    report = secateur.finetune(sparse, adapter=ADAPTERS["spp"], output=tmp_path / "out", resume=True, **settings).report
    assert [line["step"] for line in report["losses"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["finetune.save", "publish.manifest", "publish.rename"])
def test_a_run_that_dies_while_it_saves_leaves_the_old_output(sparse, tmp_path, monkeypatch, place):
    secateur.finetune(sparse, adapter=ADAPTERS["spp"], output=tmp_path / "out", **SHORT)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    faults.forget()
    monkeypatch.setenv(faults.VARIABLE, f"{place}:1:raise")
    with pytest.raises(faults.InjectedError):
        secateur.finetune(sparse, adapter=ADAPTERS["spp"], output=tmp_path / "out", overwrite=True, **SHORT, seed=1)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(sparse, tmp_path):
    settings = SHORT | {"steps": 20, "save_every": 1, "warmup": 0.0, "clip": 0.0, "schedule": "constant"}
    with pytest.raises(NumericError, match=r"step \d+ of 20; the last checkpoint, .*checkpoint-\d+") as caught:
        secateur.finetune(sparse, adapter=None, learning_rate=1e30, output=tmp_path / "out", **settings)
    assert "learning_rate" in caught.value.hint
    kept = last_whole(tmp_path / "out.unfinished" / "checkpoints")
    assert all(torch.isfinite(weight).all() for weight in load_file(kept / "model.safetensors").values())
    assert not (tmp_path / "out").exists()


def test_weights_that_the_last_step_breaks_are_not_published(sparse, tmp_path):
    settings = SHORT | {"steps": 1, "save_every": 1, "warmup": 0.0, "adapter": None, "output": tmp_path / "out"}
    with pytest.raises(NumericError, match=r"a trained weight became NaN .* at step 1 of 1; no checkpoint") as caught:
        secateur.finetune(sparse, dtype="float16", **settings)  # AdamW's states vanish, and it divides by them
    assert "bfloat16" in caught.value.hint
    assert list(tmp_path.glob("out*")) == []


def test_time_that_is_over_ends_the_run_with_a_checkpoint_to_go_on_from(sparse, tmp_path):
    settings = SHORT | {"output": tmp_path / "out", "adapter": ADAPTERS["spp"]}
    with pytest.raises(TimeLimitReached, match="after 1 steps"):
        secateur.finetune(sparse, max_minutes=0, **settings)
    report = secateur.finetune(sparse, resume=True, **settings).report
    assert report["steps_done"] == 3
    again = secateur.finetune(sparse, resume=True, **settings).report
    assert "nothing was done" in again["warnings"][-1]


def test_a_run_that_goes_on_is_logged_as_often_as_is_asked_for_now(sparse, tmp_path):
    settings = SHORT | {"output": tmp_path / "out", "adapter": ADAPTERS["s2ft"], "steps": 5}
    with pytest.raises(TimeLimitReached, match="after 1 steps"):
        secateur.finetune(sparse, max_minutes=0, **settings)
    report = secateur.finetune(sparse, resume=True, **settings | {"log_every": 2}).report
    assert [line["step"] for line in report["losses"]] == [1, 2, 4, 5]


def test_other_settings_do_not_go_on_with_a_run(sparse, tmp_path):
    settings = SHORT | {"output": tmp_path / "out", "adapter": ADAPTERS["spp"]}
    with pytest.raises(TimeLimitReached):
        secateur.finetune(sparse, max_minutes=0, **settings)
    with pytest.raises(StateError, match="batch_size"):
        secateur.finetune(sparse, resume=True, **settings | {"batch_size": 1})
    assert secateur.finetune(sparse, overwrite=True, **settings | {"batch_size": 1}).report["steps_done"] == 3


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"data": None}, RecipeError, "`data` is missing"),
        ({"epochs": 1.0}, RecipeError, "`steps` and `epochs`"),
        ({"adapter": "spp2"}, RecipeError, "did you mean `spp`"),
        ({"adapter": "ebft"}, RecipeError, "is a block tuner, not a adapter"),
        ({"adapter": {"name": "spp", "r": 5}}, RecipeError, "r"),
        ({"adapter": {"name": "s2ft", "o": 1000}}, RecipeError, "o"),
        ({"adapter": {"name": "spp", "rank_pattern": {"q_prj": 4}}}, RecipeError, "did you mean `q_proj`"),
        ({"adapter": {"name": "lora", "rank_pattern": {"q_prj": 4}}}, RecipeError, "did you mean `q_proj`"),
        ({"adapter": {"name": "lora", "rank_pattern": {"(": 4}}}, RecipeError, "not a regular expression"),
        ({"adapter": None, "merge": True}, RecipeError, "nothing to merge"),
        ({"compact_state": True}, RecipeError, "compact_state"),
        ({"optimizer": "adamw"}, RecipeError, "`optimizer` is `adamw`"),
        ({"optimizer": "adamw_8bit"}, InputError, "`adamw_8bit` cannot be used"),
        ({"seed": 2**32}, RecipeError, "`seed` is 4294967296"),
        ({"steps": 0}, RecipeError, "`steps` is 0"),
        ({"steps": None, "epochs": 0.0}, RecipeError, "`epochs` is 0.0"),
        ({"max_minutes": float("nan")}, RecipeError, "`max_minutes` is nan"),
        (
            {"evaluation": [{"instruction": "a " * 400, "response": "b"}], "completion_only": True},
            InputError,
            "no example",
        ),
        ({"packing": True, "length": 8, "completion_only": True}, InputError, "no example"),
        ({"log_to": "tensorbord"}, RecipeError, "did you mean `tensorboard`"),
        ({"length": 8, "completion_only": True}, InputError, "no example"),
        ({"data": [{"instruction": "a"}]}, InputError, "record 1: no field"),
        ({"adapter": "lora", "around": "adamw"}, RecipeError, "no optimizer is called"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:40] if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused_before_anything_is_written(sparse, tmp_path, settings, error, said):
    with pytest.raises(error, match=said):
        secateur.finetune(sparse, output=tmp_path / "out", **{**SHORT, **settings})
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "out.lock"])


def test_what_the_data_are_warned_of_is_an_error_with_strict_before_any_training(sparse, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "The gardener cuts the old wood first."}\n' * 2 + "not JSON\n")
    settings = {**SHORT, "data": data, "skip_bad": 1, "steps": 1, "output": tmp_path / "out"}
    for dry in (True, False):
        with pytest.raises(StateError, match=r"as asked: .*data\.jsonl`: 1 malformed lines"):
            secateur.finetune(sparse, adapter=ADAPTERS["spp"], strict=True, dry_run=dry, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    secateur.finetune(sparse, adapter=ADAPTERS["spp"], **settings)


def test_a_dense_base_is_trained_and_said_to_be_dense(trained_folder):
    report = secateur.finetune(str(trained_folder), adapter=ADAPTERS["spp"], **SHORT).report
    assert any("not sparse" in warning for warning in report["warnings"])


def test_packing_and_checkpointing_change_the_cost_and_not_the_result(sparse):
    settings = SHORT | {"adapter": ADAPTERS["masked_lora"]}
    plain = secateur.finetune(sparse, **settings).report
    spared = secateur.finetune(sparse, gradient_checkpointing=True, **settings).report
    packed = secateur.finetune(sparse, packing=True, **settings).report
    for one, other in zip(plain["losses"], spared["losses"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert packed["sequences"] < plain["sequences"]


def test_a_recipe_prunes_fine_tunes_and_measures(trained_folder, tmp_path):
    stages = [
        {"prune": {"method": "wanda", "pattern": "2:4", "calibration": "builtin:tiny", "samples": 4, "length": 64}},
        {"finetune": {"adapter": {"name": "spp", "r": 4}, "data": DATA, "steps": 2, "length": 128, "max_steps": 2}},
        {"evaluate": {"perplexity": "builtin:tiny", "length": 64, "limit": 2}},
    ]
    with pytest.raises(RecipeError):  # one name twice
        secateur.Recipe.from_dict({"model": str(trained_folder), "stages": stages})
    del stages[1]["finetune"]["max_steps"]
    recipe = secateur.Recipe.from_dict({"model": str(trained_folder), "stages": stages})
    report = recipe.run(tmp_path / "run")
    assert [stage["stage"] for stage in report["stages"]] == ["prune", "finetune", "evaluate"]
    assert report["stages"][2]["label"] == "fine-tuned"
    assert report["stages"][2]["sparsity"] == pytest.approx(0.5)
    assert "Fine-tuning with spp" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.timeout(300)
def test_two_processes_train_what_one_does_and_speak_once(sparse, tmp_path):
    asked = [
        *("-m", "secateur", "finetune", sparse, "--adapter", "masked_lora", "--data", DATA, "--steps", "3"),
        *("--length", "96", "--whole-loss", "--log-every", "1", "--device", "cpu", "--json"),
    ]
    found = {}
    for name, how, batch in (("one", [], "4"), ("two", ["-m", "torch.distributed.run", *PAIR], "2")):
        text = launch(sys.executable, *how, *asked, "--batch-size", batch, "--output", tmp_path / name)
        found[name] = json.loads(text[text.index('{"stage"') :])
        assert text.count('{"stage"') == 1
    for one, two in zip(found["one"]["losses"], found["two"]["losses"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_an_adapter_of_a_relative_model_path_opens_from_another_folder(sparse, tmp_path, monkeypatch):
    shutil.copytree(sparse, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    secateur.finetune("model", adapter="masked_lora", output="out", **SHORT | {"steps": 1})
    monkeypatch.chdir("/")
    assert secateur.load(tmp_path / "out").source.kind == "adapter"


def test_what_a_length_cuts_off_is_counted_and_packing_learns_all_of_a_long_text(sparse):
    loaded = secateur.load(sparse)
    data = [{"text": "The river runs north. " * 60}, {"text": "The sea."}]
    tokens = len(loaded.tokenizer(data[0]["text"])["input_ids"]) + 1  # and the end
    settings = {**SHORT, "data": data, "steps": 1, "length": 64, "adapter": "masked_lora"}
    plain = secateur.finetune(loaded.model, loaded.tokenizer, **settings).report
    assert (plain["cut"], plain["cut_tokens"], plain["dropped"]) == (1, tokens - 64, 0)
    assert any(f"{tokens - 64:,} tokens at their ends" in warning for warning in plain["warnings"])
    packed = secateur.finetune(loaded.model, loaded.tokenizer, packing=True, **settings).report
    assert (packed["cut"], packed["cut_tokens"]) == (0, 0)
    assert packed["sequences"] >= tokens / 64


def test_no_sequence_is_longer_than_the_model_has_positions(sparse):
    loaded = secateur.load(sparse)
    config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, vocab_size=len(loaded.tokenizer))
    model = transformers.GPT2LMHeadModel(config)
    settings = SHORT | {"data": [{"text": "The river runs north. " * 60}], "steps": 1, "length": 1024}
    report = secateur.finetune(model, loaded.tokenizer, adapter="masked_lora", **settings).report
    assert any("longer than 32 tokens" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eos_token": None}, "no `eos_token`"),
        ({"chat_template": "{{ raise_exception('no system here') }}"}, "no system here"),
        ({"chat_template": "{% for m in %}"}, "chat template"),
    ],
)
def test_a_tokenizer_that_cannot_write_the_examples_is_an_error_in_words(sparse, changes, said):
    loaded = secateur.load(sparse)
    for name, value in changes.items():
        setattr(loaded.tokenizer, name, value)
    with pytest.raises(InputError, match=said):
        secateur.finetune(loaded.model, loaded.tokenizer, adapter="masked_lora", **SHORT)


def test_a_full_disk_at_a_checkpoint_is_an_error_of_its_own_kind(sparse, tmp_path, monkeypatch):
    faults.forget()
    monkeypatch.setenv(faults.VARIABLE, "train.seal:2:enospc")
    with pytest.raises(ResourceError, match="No space left"):
        secateur.finetune(sparse, adapter="masked_lora", output=tmp_path / "out", **SHORT | {"save_every": 1})
    assert last_whole(tmp_path / "out.unfinished" / "checkpoints").name == "checkpoint-1"
