"""The main job, end to end, on the tiny trained model: orderings, files, resume after SIGKILL, equal bytes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.core import faults
from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError, StateError, TimeLimitReached
from secateur.models.linears import find_all_linears
from secateur.recipe.run import run

CALIBRATION = {"calibration": "builtin:tiny-calibration", "samples": 32, "length": 128}
TEXT = "builtin:tiny-evaluation"


def ppl(model, tokenizer=None, **settings):
    report = secateur.evaluate(model, tokenizer, perplexity=TEXT, length=128, limit=24, **settings)
    return report["perplexity"][TEXT]


@pytest.fixture(scope="module")
def words(trained_folder):
    return AutoTokenizer.from_pretrained(trained_folder)


@pytest.fixture(scope="module")
def pruned(trained_folder, tmp_path_factory):
    """The tiny model pruned to 70 % by SparseGPT, published, and its report."""
    output = tmp_path_factory.mktemp("pruned") / "model"
    return output, secateur.prune(trained_folder, pattern="70%", output=output, **CALIBRATION).report


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_published_model_loads_with_plain_transformers(pruned):
    output, report = pruned
    model = AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    assert (output / "generation_config.json").exists()
    assert secateur.inspect(model)["sparsity"] == pytest.approx(report["sparsity"], abs=1e-9)
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_every_layer_has_a_report_line(pruned, trained_folder):
    names = [linear.name for linear in find_all_linears(AutoModelForCausalLM.from_pretrained(trained_folder))]
    layers = pruned[1]["layers"]
    assert [layer["name"] for layer in layers] == names
    assert all(0 < layer["loss_after"] <= layer["loss_before"] < 1 for layer in layers)
    assert pruned[1]["planned_memory_bytes"] > 0
    assert json.loads(json.dumps(pruned[1])) == pruned[1]


def test_pruning_hurts_and_ebft_repairs(pruned, trained_folder, tmp_path):
    output, _ = pruned
    dense, sparse = ppl(trained_folder), ppl(output)
    tuned = secateur.tune(output, method={"name": "ebft", "epochs": 3}, output=tmp_path / "tuned", **CALIBRATION)
    repaired = ppl(tmp_path / "tuned")
    assert sparse > 1.3 * dense
    assert repaired < 0.9 * sparse
    assert tuned.report["sparsity"] == pytest.approx(pruned[1]["sparsity"], abs=1e-9)
    assert all(block["error_after"] <= block["error_before"] for block in tuned.report["blocks"])
    side = json.loads((tmp_path / "tuned" / "secateur.json").read_text())
    assert side["base_model"]["spec"] == str(trained_folder)


def test_pruning_and_tuning_in_one_sweep_beats_pruning_alone(pruned, trained_folder, tmp_path):
    result = secateur.prune(
        trained_folder, pattern="70%", tuner={"name": "ebft", "epochs": 2}, output=tmp_path / "both", **CALIBRATION
    )
    assert ppl(tmp_path / "both") < ppl(pruned[0])
    assert all(block["error_after"] < block["error_before"] for block in result.report["blocks"])


def test_a_live_model_is_left_alone_unless_told_otherwise(trained_folder, words):
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = secateur.prune(model, words, method="wanda", pattern="2:4", **CALIBRATION)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert result.model is not model
    inplace = secateur.prune(model, words, method="wanda", pattern="2:4", inplace=True, **CALIBRATION)
    assert inplace.model is model
    for one, other in zip(find_all_linears(result.model), find_all_linears(model), strict=True):
        assert torch.equal(one.read(), other.read())


def test_resume_of_a_finished_output_does_nothing_and_of_another_is_refused(pruned, trained_folder):
    output, report = pruned
    before = files(output)
    again = secateur.prune(trained_folder, pattern="70%", output=output, resume=True, **CALIBRATION)
    assert files(output) == before
    assert any("complete already" in warning for warning in again.report["warnings"])
    assert again.report["sparsity"] == pytest.approx(report["sparsity"])
    assert [layer["name"] for layer in again.report["layers"]] == [layer["name"] for layer in report["layers"]]
    with pytest.raises(StateError, match="exists"):
        secateur.prune(trained_folder, pattern="60%", output=output, resume=True, **CALIBRATION)
    assert files(output) == before


def test_token_ids_need_no_tokenizer_and_magnitude_needs_no_data(trained_folder, words):
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    ids = torch.randint(words.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    assert secateur.prune(model, method="wanda", pattern="50%", calibration=ids).report["calibration"]["tokens"] == 128
    assert secateur.prune(model, method="magnitude", pattern="50%").report["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_budget_over_the_whole_model_is_exact_and_uneven(trained_folder, method):
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    ids = torch.randint(500, (4, 64), generator=torch.Generator().manual_seed(0))
    report = secateur.prune(model, method=method, pattern="50% model", calibration=ids).report
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in report["layers"]]
    zeros = sum(round(layer["sparsity"] * size) for layer, size in zip(report["layers"], sizes, strict=True))
    assert zeros == sum(sizes) // 2
    assert len({round(layer["sparsity"], 3) for layer in report["layers"]}) > 3


def test_bitmask_round_trip_is_exact_through_the_api(pruned, tmp_path):
    output, _ = pruned
    told = secateur.export(output, format="bitmask", output=tmp_path / "packed")
    assert told["ratio"] < 0.75
    packed, plain = secateur.load(tmp_path / "packed"), secateur.load(output)
    for (name, one), (other, two) in zip(
        packed.model.state_dict().items(), plain.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(one.view(torch.int32), two.view(torch.int32))
    assert ppl(tmp_path / "packed") == ppl(output)
    back = secateur.export(tmp_path / "packed", format="checkpoint", output=tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert back["sparsity"] == pytest.approx(told["sparsity"])


def test_perplexity_equals_a_plain_loop(trained_folder, words):
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    from secateur.data.text import load_text

    ids = torch.tensor(words(load_text(TEXT, role="evaluation").joined()).input_ids)
    losses = []
    for start in range(0, 24 * 128, 128):
        window = ids[None, start : start + 128]
        with torch.no_grad():
            losses.append(model(window, labels=window).loss)
    assert ppl(trained_folder) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)


SETTINGS = {
    "method": "sparsegpt",
    "pattern": "70%",
    "tuner": {"name": "ebft", "epochs": 1},
    "calibration": "builtin:tiny-calibration",
    "samples": 16,
    "length": 128,
}


def test_the_seconds_of_a_run_that_goes_on_are_those_of_all_its_parts(trained_folder, tmp_path, monkeypatch):
    settings = {"method": "magnitude", "pattern": "50%", "output": tmp_path / "out"}
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", "sweep.solve:1:sleep=1")
    with pytest.raises(TimeLimitReached):
        secateur.prune(trained_folder, max_minutes=0, **settings)
    monkeypatch.delenv("SECATEUR_FAULT")
    assert secateur.prune(trained_folder, resume=True, **settings).report["seconds"] > 1


def test_tuning_does_not_go_on_towards_another_teacher(trained_folder, tmp_path):
    teacher = secateur.load(trained_folder).model
    sparse = secateur.prune(teacher, method="magnitude", pattern="50%").model
    settings = {"method": {"name": "ebft", "epochs": 1}, "calibration": torch.arange(64).reshape(4, 16)}
    with pytest.raises(TimeLimitReached):
        secateur.tune(sparse, teacher=teacher, output=tmp_path / "out", max_minutes=0, **settings)
    other = copy.deepcopy(teacher)
    other.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(StateError, match="belongs to another run: teacher"):
        secateur.tune(sparse, teacher=other, output=tmp_path / "out", resume=True, **settings)
    secateur.tune(sparse, teacher=copy.deepcopy(teacher), output=tmp_path / "out", resume=True, **settings)


def test_a_method_that_reads_no_text_warns_of_none(trained_folder):
    assert secateur.prune(trained_folder, method="magnitude").report["warnings"] == []
    warnings = secateur.prune(trained_folder, method="magnitude", calibration=torch.ones(1, 8)).report["warnings"]
    assert warnings == ["no calibration text was read, because this method looks at weights alone"]


def command(trained_folder, output, *extra):
    return [
        sys.executable, "-m", "secateur", "prune", str(trained_folder), "--method", "sparsegpt", "--pattern", "70%",
        "--calibration", "builtin:tiny-calibration", "--samples", "16", "--length", "128", "--tuner", "ebft",
        "--set", "tuner.epochs=1", "--output", str(output), "--json", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(trained_folder, tmp_path_factory):
    """The output of the run of `command`, never interrupted, in this process."""
    output = tmp_path_factory.mktemp("whole") / "model"
    secateur.prune(trained_folder, output=output, **SETTINGS)
    return output


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["sweep.block:3", "journal.rename:4", "publish.rename:1"])
def test_a_killed_run_goes_on_to_equal_bytes(trained_folder, tmp_path, whole, place):
    output = tmp_path / "killed"
    environment = {**os.environ, "SECATEUR_FAULT": f"{place}:kill"}
    killed = subprocess.run(
        command(trained_folder, output, "--resume"), env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    secateur.prune(trained_folder, output=output, resume=True, **SETTINGS)
    assert files(output) == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_stops_cleanly_and_can_be_resumed(trained_folder, tmp_path):
    output = tmp_path / "out"
    environment = {**os.environ, "SECATEUR_FAULT": "sweep.block:3:sleep=60"}
    with subprocess.Popen(
        command(trained_folder, output), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        journal = tmp_path / "out.unfinished" / "journal.jsonl"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n") >= 2):
            time.sleep(0.1)
        process.terminate()
        out, _ = process.communicate(timeout=45)  # 5 s on an idle machine; the block that it stops takes 60 s
        assert process.returncode == 143
    assert out == ""
    assert not output.exists()
    secateur.prune(trained_folder, output=output, resume=True, **SETTINGS)
    assert output.exists()


def test_refusals_come_before_any_work(trained_folder, tmp_path, pruned):
    output = tmp_path / "out"
    wrong = [
        (StateError, {"output": pruned[0]}, "exists"),
        (RecipeError, {"method": "sparsgpt"}, "did you mean `sparsegpt`"),
        (RecipeError, {"method": {"name": "sparsegpt", "dampening": 1}}, "damping"),
        (RecipeError, {"pattern": "150%"}, "between 0 and 1"),
        (RecipeError, {"pattern": "2:5"}, "divisible by 5"),
        (RecipeError, {"ignore": ["*.nothing"]}, "matches no linear"),
        (RecipeError, {"calibration": None}, "calibration"),
        (RecipeError, {"device": "nowhere"}, "device"),
        (RecipeError, {"max_minutes": 1, "output": None}, "max_minutes"),
        (ResourceError, {"memory_limit": 1000}, "needs"),
        (InputError, {"samples": 10**6}, "too few tokens"),
        (InputError, {"length": 4096}, "4096"),
    ]
    for kind, settings, words_in_message in wrong:
        with pytest.raises(kind, match=words_in_message):
            secateur.prune(trained_folder, **{**CALIBRATION, "output": output, **settings})
        assert not output.exists(), settings
        assert not (tmp_path / "out.unfinished").exists(), settings


def test_tuning_needs_a_teacher_and_zeros(trained_folder, tmp_path):
    with pytest.raises(InputError, match="no zeros to keep"):
        secateur.tune(trained_folder, teacher=trained_folder, **CALIBRATION)
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    with pytest.raises(InputError, match="dense model"):
        secateur.tune(model, AutoTokenizer.from_pretrained(trained_folder), **CALIBRATION)


def test_a_base_model_that_changed_since_is_no_teacher_unless_it_is_named(trained_folder, tmp_path):
    base, sparse = tmp_path / "base", tmp_path / "sparse"
    shutil.copytree(trained_folder, base)
    secateur.prune(base, method="magnitude", output=sparse)
    settings = {**CALIBRATION, "samples": 2, "dry_run": True}
    secateur.tune(sparse, **settings)
    model = secateur.load(base).model
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    model.save_pretrained(base)
    with pytest.raises(InputError, match=f"`{base}` is not the dense model that `{sparse}` was pruned from") as caught:
        secateur.tune(sparse, **settings)
    assert "--teacher" in str(caught.value.hint)
    secateur.tune(sparse, teacher=base, **settings)
    secateur.tune(sparse, teacher=base, output=tmp_path / "tuned", **{**settings, "dry_run": False})
    secateur.tune(tmp_path / "tuned", **settings)  # its base is the teacher that was named


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_base_of_a_model_that_was_pruned_in_memory_is_known_by_its_tensors(trained_folder, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    words = AutoTokenizer.from_pretrained(trained_folder)
    secateur.prune(model, words, method="magnitude", output=tmp_path / "sparse")
    settings = {**CALIBRATION, "samples": 2, "dry_run": True, "dtype": dtype}
    secateur.tune(tmp_path / "sparse", **settings)
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    secateur.prune(model, words, method="magnitude", output=tmp_path / "other")
    with pytest.raises(InputError, match="is not the dense model"):
        secateur.tune(tmp_path / "other", **settings)


def test_a_time_limit_stops_at_a_block_boundary_and_resume_goes_on(trained_folder, tmp_path):
    from secateur.core.errors import TimeLimitReached

    output = tmp_path / "out"
    with pytest.raises(TimeLimitReached, match="after 1 of 4 blocks"):
        secateur.prune(trained_folder, pattern="2:4", output=output, max_minutes=1e-9, **CALIBRATION)
    assert not output.exists()
    secateur.prune(trained_folder, pattern="2:4", output=output, resume=True, **CALIBRATION)
    assert output.exists()
    assert not (tmp_path / "out.unfinished").exists()


def test_frozen_zeros_stay_and_a_lower_target_is_refused(pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned[0])
    zeros = {linear.name: linear.read() == 0 for linear in find_all_linears(model)}
    words = AutoTokenizer.from_pretrained(pruned[0])
    result = secateur.prune(model, words, pattern="80%", freeze_zeros=True, **CALIBRATION)
    for linear in find_all_linears(result.model):
        assert (linear.read()[zeros[linear.name]] == 0).all()
    with pytest.raises(InputError, match="above the target"):
        secateur.prune(model, words, pattern="50%", freeze_zeros=True, **CALIBRATION)


def test_the_head_is_pruned_and_published_on_request(trained_folder, tmp_path):
    names = ["lm_head", "model.embed_tokens"]
    result = secateur.prune(
        trained_folder, pattern="2:4", method="wanda", include=names, output=tmp_path / "out", **CALIBRATION
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head = next(layer for layer in result.report["layers"] if layer["name"] == "lm_head")
    assert head["sparsity"] == pytest.approx(0.5)
    assert (model.lm_head.weight.reshape(-1, 4) != 0).sum(1).max() == 2
    assert result.report["sparsity"] == pytest.approx(secateur.evaluate(tmp_path / "out")["sparsity"])


def test_weights_that_are_not_finite_are_set_to_zero_on_request(trained_folder, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(trained_folder)
    broken.model.layers[0].mlp.up_proj.weight.data[3, 5] = torch.nan
    AutoTokenizer.from_pretrained(trained_folder).save_pretrained(tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    before = files(tmp_path / "broken")
    with pytest.raises(NumericError, match="NaN"):
        secateur.prune(tmp_path / "broken", method="wanda", output=tmp_path / "out", **CALIBRATION)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out.unfinished", ignore_errors=True)
    result = secateur.prune(
        tmp_path / "broken", method="wanda", nonfinite="zero", output=tmp_path / "out", **CALIBRATION
    )
    assert any("1 values of `model.layers.0.mlp.up_proj.weight`" in line for line in result.report["warnings"])
    assert files(tmp_path / "broken") == before
    with pytest.raises(StateError, match="not everything was done as asked: 1 values"):  # with an output or without
        secateur.prune(tmp_path / "broken", method="magnitude", nonfinite="zero", strict=True)


@pytest.mark.parametrize("stage", ["prune", "tune"])
def test_what_a_calibration_text_is_warned_of_is_an_error_with_strict_before_any_work(pruned, tmp_path, stage):
    text = tmp_path / "text.txt"
    text.write_text("again " * 400)
    settings = {"calibration": text, "samples": 2, "length": 16, "output": tmp_path / "out", "dry_run": True}
    call = secateur.prune if stage == "prune" else secateur.tune
    with pytest.raises(StateError, match=r"as asked: calibration: 1 of 2 samples repeat another sample"):
        call(pruned[0], strict=True, **settings)
    settings |= {"dry_run": False}
    with pytest.raises(StateError, match="as asked"):
        call(pruned[0], strict=True, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    call(pruned[0], **settings)


def test_a_published_model_with_another_tokenizer_is_refused(pruned, tmp_path):
    shutil.copytree(pruned[0], tmp_path / "copy")
    words = tmp_path / "copy" / "tokenizer.json"
    words.write_text(words.read_text() + "\n")
    with pytest.raises(InputError, match=r"`tokenizer\.json`.*not the one"):
        secateur.load(tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    secateur.load(tmp_path / "copy")


def test_a_recipe_that_evaluates_on_its_calibration_text_says_so(trained_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number}" for number in range(4000)))
    recipe = secateur.Recipe.from_dict(
        {
            "model": str(trained_folder),
            "stages": [
                {"prune": {"method": "wanda", "calibration": str(text), "samples": 4, "length": 64}},
                {"evaluate": {"perplexity": [str(text)], "length": 64, "limit": 2}},
            ],
        }
    )
    report = run(recipe, tmp_path / "run")
    assert report["stages"][1]["warnings"] == [
        f"100.0% of `{text}` stands in the calibration text `{text}`, so its perplexity flatters"
    ]


def test_a_method_that_needs_no_data_reads_none(trained_folder, tmp_path):
    result = secateur.prune(trained_folder, method="magnitude", calibration=tmp_path / "absent.txt", samples=9)
    assert any("no calibration text was read" in line for line in result.report["warnings"])
    assert result.report["calibration"]["tokens"] == 2
