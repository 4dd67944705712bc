"""Adapters in folders: merged, fused, switched, exported, listed; and every way in which that must be refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import secateur
from adapted import SETTINGS, adapt, config_of, finish, prune_, random_ids, shake
from conftest import TINY_TRAINED, random_llama
from secateur.core import faults
from secateur.core.errors import InputError, NumericError, RecipeError, StateError
from secateur.methods.registry import REGISTRY
from secateur.models.fingerprint import fingerprint
from secateur.models.publish import is_complete
from secateur.recipe import adapters
from secateur.recipe.adapter_folder import METHODS
from secateur.recipe.switch_file import SWITCH_FILE
from secateur.train.adapter_config import method_name

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory):
    """Makes each model and adapter once; tests get copies."""
    MADE.clear()
    MADE["folder"] = tmp_path_factory.mktemp("made")
    return MADE


MADE: dict = {}


def copy_of(key: tuple, make, folder: Path) -> Path:
    """Return `folder`, filled with what `make` writes for `key`."""
    if key not in MADE:
        MADE[key] = MADE["folder"] / str(len(MADE))
        make(MADE[key])
    shutil.copytree(MADE[key], folder)
    return folder


def save_base(folder: Path, dtype=torch.float32, sparse: bool = True, seed: int = 0, mask_seed: int = 5) -> Path:
    """Write a random sparse LLaMA."""

    def make(path: Path) -> None:
        model = random_llama(seed=seed)
        if sparse:
            prune_(model, seed=mask_seed)
        model.to(dtype).save_pretrained(path)

    return copy_of((dtype, sparse, seed, mask_seed), make, folder)


def save_adapter(base: Path, folder: Path, kind: str, seed: int = 1, **settings) -> Path:
    """Train nothing, but give an adapter of some kind values that matter, and save it."""

    def make(path: Path) -> None:
        model = secateur.load(base).model
        if kind in ("lora", "dora"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = get_peft_model(model, LoraConfig(**{**LORA, "use_dora": kind == "dora", **settings}))
        else:
            model = adapt(model, config_of(kind, **settings))
            shake(model, seed)
            finish(model)
        model.save_pretrained(path)

    copy_of((fingerprint(base), kind, seed, repr(settings)), make, folder)
    edit(folder, base_model_name_or_path=str(base))
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, and the names of its siblings."""
    files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
    return files | dict.fromkeys(sorted(entry.name for entry in folder.parent.iterdir()), "there")


def edit(folder: Path, **changes) -> None:
    """Change fields of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids()).logits


# --- merge ---


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "pst"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_folder_has_the_zeros_of_its_base_and_the_outputs_of_its_adapter(kind, dtype, tmp_path):
    base = save_base(tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    before = digests(base)
    model, report = secateur.merge(adapter, output=tmp_path / "merged")
    assert report["zero_pattern"]["identical"]
    assert report["zero_pattern"]["linears"] == report["zero_pattern"]["identical_linears"] == 15
    assert report["sparsity"] == report["sparsity_before"] > 0.45
    old, new = weights_of(base), weights_of(tmp_path / "merged")
    assert all(torch.equal(old[name] == 0, new[name] == 0) for name in old)
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert {**before, "merged": "there"} == digests(base)
    plain = secateur.load(tmp_path / "merged").model
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=0)
    if dtype == torch.float32:
        unmerged = PeftModel.from_pretrained(secateur.load(base).model, adapter)
        torch.testing.assert_close(logits(plain), logits(unmerged.eval()), rtol=1e-4, atol=1e-5)


def test_the_side_file_says_what_was_merged_and_into_what(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "my-adapter", "spp")
    secateur.merge(adapter, output=tmp_path / "merged")
    side = json.loads((tmp_path / "merged" / "secateur.json").read_text())
    assert side["stage"] == "merge"
    assert side["base_model"]["spec"] == str(base)
    assert len(side["base_model"]["fingerprint"]) == len(side["adapter"]["fingerprint"]) == 64
    assert (side["adapter"]["name"], side["adapter"]["method"]) == ("my-adapter", "spp")
    assert "peft" in side["versions"]
    assert side["weights"]["model.layers.0.mlp.down_proj"]["zeros"] > 0


def test_equal_merges_write_equal_bytes(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", "s2ft")
    for name in ("one", "two"):
        secateur.merge(adapter, output=tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_pst_adapter_prunes_by_its_mask(tmp_path):
    base = save_base(tmp_path / "base", sparse=False)
    _, report = secateur.merge(save_adapter(base, tmp_path / "adapter", "pst"))
    assert (report["sparsity_before"], round(report["sparsity"], 2)) == (0.0, 0.6)
    assert report["zero_pattern"]["filled"] == 0


def test_a_pst_adapter_whose_mask_moves_is_not_merged(tmp_path):
    base = save_base(tmp_path / "base", sparse=False)
    model = adapt(secateur.load(base).model, config_of("pst"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(StateError, match="still moving"):
        secateur.merge(tmp_path / "adapter", output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_filling_zeros_needs_a_word(kind, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    with pytest.raises(InputError, match="would fill") as caught:
        secateur.merge(adapter, output=tmp_path / "merged")
    assert "--keep-mask" in caught.value.hint
    assert not (tmp_path / "merged").exists()
    filled = secateur.merge(adapter, fill_zeros=True).report
    assert filled["sparsity"] < filled["sparsity_before"]
    assert any("filled" in note for note in filled["warnings"])
    masked = secateur.merge(adapter, keep_mask=True, output=tmp_path / "merged").report
    assert masked["zero_pattern"]["identical"]
    assert any("lost" in note for note in masked["warnings"])
    old, new = weights_of(base), weights_of(tmp_path / "merged")
    assert all(torch.equal(old[name] == 0, new[name] == 0) for name in old)
    with pytest.raises(RecipeError, match="contradict"):
        secateur.merge(adapter, keep_mask=True, fill_zeros=True)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_plain_lora_on_a_dense_base_is_merged_as_peft_does(kind, tmp_path):
    base = save_base(tmp_path / "base", sparse=False)
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    model = secateur.merge(adapter).model
    theirs = PeftModel.from_pretrained(secateur.load(base).model, adapter).merge_and_unload()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_a_zero_by_chance_does_not_make_a_base_sparse(tmp_path):
    model = random_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[3, 3] = 0.0
    model.save_pretrained(tmp_path / "base")
    report = secateur.merge(save_adapter(tmp_path / "base", tmp_path / "adapter", "lora")).report
    assert report["zero_pattern"]["filled"] == 1
    assert any("filled 1 zeros" in note for note in report["warnings"])


def test_a_trained_zero_of_s2ft_is_refused_too(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", "s2ft", keep_sparsity=False)
    with pytest.raises(InputError, match="would fill"):
        secateur.merge(adapter)


def test_a_head_that_was_trained_whole_is_merged(base, tmp_path):
    model = adapt(secateur.load(base).model, config_of("spp", modules_to_save=["lm_head"]))
    shake(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    merged = secateur.merge(tmp_path / "adapter", output=tmp_path / "merged").model
    torch.testing.assert_close(weights_of(tmp_path / "merged")["lm_head.weight"], merged.lm_head.weight)
    torch.testing.assert_close(merged.lm_head.weight, weights_of(base)["lm_head.weight"] + 1)


def test_a_live_model_is_copied(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", "spp")
    live = secateur.load(base).model
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    model = secateur.merge(adapter, model=live).model
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


def test_the_tokenizer_of_the_adapter_goes_before_that_of_the_base(tmp_path):
    from transformers import AutoTokenizer

    adapter = save_adapter(TINY_TRAINED, tmp_path / "adapter", "s2ft")
    words = AutoTokenizer.from_pretrained(TINY_TRAINED)
    words.chat_template = "{{ messages }}"
    words.save_pretrained(adapter)
    secateur.merge(adapter, output=tmp_path / "merged")
    assert secateur.load(tmp_path / "merged").tokenizer.chat_template == "{{ messages }}"
    words.add_tokens([f"new{number}" for number in range(5000)])
    words.save_pretrained(adapter)
    with pytest.raises(InputError, match="tokens, the model"):
        secateur.merge(adapter)


# --- merge: faults ---


def broken(name: str, folder: Path) -> None:
    """Break an SPP adapter folder in the way that `name` says."""
    weights = folder / "adapter_model.safetensors"
    match name:
        case "no configuration":
            (folder / "adapter_config.json").unlink()
        case "configuration is no JSON":
            (folder / "adapter_config.json").write_text("{")
        case "unknown method":
            edit(folder, peft_type="secateur_sppp")
        case "no method":
            edit(folder, peft_type=None)
        case "another program":
            edit(folder, peft_type="LORA", megatron_config={"x": 1})
        case "no weights":
            weights.unlink()
        case "pickle":
            weights.rename(folder / "adapter_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-7])
        case "header cut":
            weights.write_bytes(weights.read_bytes()[:20])
        case "garbage":
            weights.write_bytes(b"\xff" * 400)
        case "missing tensor":
            edit_tensors(folder, lambda tensors: tensors.pop(sorted(tensors)[3]))
        case "misshapen tensor":
            edit_tensors(folder, lambda tensors: tensors.update({min(tensors): torch.zeros(3, 1)}))
        case "superfluous tensor":
            edit_tensors(folder, lambda t: t.update({"base_model.model.x.secateur_spp_row": torch.zeros(3, 1)}))
        case "no tensors of it":
            edit_tensors(folder, lambda t: (t.clear(), t.update({"x": torch.zeros(1)})))
        case "bad setting":
            edit(folder, r=-3)
        case "format of the future":
            edit(folder, format_version=99)
        case "record of weights":
            records = json.loads((folder / "adapter_config.json").read_text())["base_weights"]
            edit(folder, base_weights=dict.fromkeys(records, "x"))


FAULTS = {
    "no configuration": "has no `adapter_config.json`",
    "configuration is no JSON": "not valid JSON",
    "unknown method": "`peft_type` in .* is 'secateur_sppp'.*did you mean `secateur_spp`",
    "no method": "`peft_type` in .* is 'None'",
    "another program": "megatron_config",
    "no weights": "has no `adapter_model.safetensors`",
    "pickle": "has no `adapter_model.safetensors`",
    "truncated": "is truncated",
    "header cut": "is truncated",
    "garbage": "header of",
    "missing tensor": "tensor `.*` of .* is missing",
    "misshapen tensor": r"tensor `.*secateur_spp_column.*` of .* has shape \[3, 1\], but the model asks for \[32, 1\]",
    "superfluous tensor": "has no place in the model",
    "no tensors of it": "holds no tensors of a spp adapter",
    "bad setting": "adapter_config.json` cannot be read: `r` must be a whole number from 1",
    "format of the future": "format version 99",
    "record of weights": "malformed",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_refused_by_name_and_nothing_is_written(fault, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", "spp")
    broken(fault, adapter)
    before = digests(tmp_path / "adapter")
    with pytest.raises(InputError, match=FAULTS[fault]):
        secateur.merge(adapter, model=base, output=tmp_path / "merged")
    assert digests(tmp_path / "adapter") == before


@pytest.mark.parametrize("kind", ["spp", "s2ft", "lora", "masked_lora"])
def test_an_adapter_that_is_not_finite_is_refused(kind, tmp_path):
    base = save_base(tmp_path / "base", sparse=kind != "lora")
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    edit_tensors(adapter, lambda tensors: tensors[min(tensors)].view(-1)[0].fill_(float("nan")))
    with pytest.raises(NumericError, match="has 1 values that are NaN or infinite"):
        secateur.merge(adapter, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_overflows_is_refused(tmp_path):
    base = save_base(tmp_path / "base", torch.float16)
    adapter = save_adapter(base, tmp_path / "adapter", "s2ft")
    edit_tensors(adapter, lambda tensors: [tensor.fill_(1e6) for tensor in tensors.values()])
    with pytest.raises(NumericError, match="NaN or infinite"):
        secateur.merge(adapter, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["spp", "masked_lora", "s2ft"])
def test_an_adapter_for_another_model_or_mask_is_refused(kind, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    other = save_base(tmp_path / "other", seed=3)
    with pytest.raises(InputError, match="the adapter is for another model"):
        secateur.merge(adapter, model=other)
    masked = save_base(tmp_path / "masked", mask_seed=6)
    with pytest.raises(InputError, match="under another mask"):
        secateur.merge(adapter, model=masked)
    wide = tmp_path / "wide"
    random_llama(hidden=64).save_pretrained(wide)
    with pytest.raises(InputError, match=r"is 64x128, not 32x64|is 64x64, not 32x32"):
        secateur.merge(adapter, model=wide)


def test_lora_for_a_model_of_another_shape_is_refused(tmp_path):
    base = save_base(tmp_path / "base", sparse=False)
    adapter = save_adapter(base, tmp_path / "adapter", "lora")
    random_llama(hidden=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"has shape \[4, 32\], but the model asks for \[4, 64\]|has shape \[4, 64\]"):
        secateur.merge(adapter, model=tmp_path / "wide")
    random_llama(layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match="has no place in the model"):
        secateur.merge(adapter, model=tmp_path / "short")


def test_a_base_that_is_not_known_or_not_there_is_asked_for(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", "spp")
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(InputError, match=r"base model `.*base` that `.*adapter_config.json` names") as caught:
        secateur.merge(adapter)
    assert "--model" in caught.value.hint
    assert secateur.merge(adapter, model=tmp_path / "moved").report["zero_pattern"]["identical"]
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"`base_model_name_or_path` .* is empty") as caught:
        secateur.merge(adapter)
    assert "--model" in caught.value.hint


def test_an_existing_output_and_the_inputs_are_never_overwritten(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", "spp")
    secateur.merge(adapter, output=tmp_path / "merged")
    with pytest.raises(StateError, match="exists"):
        secateur.merge(adapter, output=tmp_path / "merged")
    secateur.merge(adapter, output=tmp_path / "merged", overwrite=True)
    for output in (base, base / "inside", adapter, tmp_path):
        with pytest.raises(InputError, match=r"the output `.*` (is|holds|lies in) the folder of the"):
            secateur.merge(adapter, output=output, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(base)
    with pytest.raises(InputError, match="is the folder of the base model"):
        secateur.merge(adapter, output=link, overwrite=True)


@pytest.mark.parametrize("place", ["save.config", "save.switch", "save.side", "publish.manifest", "publish.rename"])
def test_a_failure_in_the_middle_of_saving_leaves_the_old_output_whole(place, base, tmp_path, monkeypatch):
    adapter = save_adapter(base, tmp_path / "adapter", "s2ft")
    secateur.merge(adapter, output=tmp_path / "merged")
    before = digests(tmp_path / "merged")
    other = save_adapter(base, tmp_path / "other", "s2ft", seed=9)
    monkeypatch.setenv(faults.VARIABLE, f"{place}:1:raise")
    faults.forget()
    with pytest.raises(faults.InjectedError):
        secateur.merge(other, output=tmp_path / "merged", overwrite=True)
    monkeypatch.delenv(faults.VARIABLE)
    assert {**before, "other": "there", ".merged.lock": "there"} == {
        **digests(tmp_path / "merged"),
        ".merged.lock": "there",
    }
    assert is_complete(tmp_path / "merged")


# --- list ---


def test_a_listing_names_method_width_and_size_without_a_model(base, tmp_path):
    folder = tmp_path / "adapters"
    for kind in ("spp", "masked_lora", "s2ft", "lora", "dora"):
        save_adapter(base, folder / kind, kind)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / "empty").mkdir()
    found = adapters.list_adapters(folder)
    lines = {line["name"]: line for line in found["adapters"]}
    assert lines.keys() == {"spp", "masked_lora", "s2ft", "lora", "dora", "broken"}
    assert [lines[name]["method"] for name in ("spp", "masked_lora", "s2ft", "lora", "dora")] == [
        "spp", "masked_lora", "s2ft", "lora", "dora",
    ]  # fmt: skip
    assert (lines["spp"]["rank"], lines["spp"]["lines"], lines["spp"]["linears"]) == (4, None, 14)
    assert (lines["s2ft"]["rank"], lines["s2ft"]["lines"], lines["s2ft"]["linears"]) == (None, 57, 4)
    assert lines["lora"]["parameters"] == 2 * 4 * (32 + 32 + 64 + 32)
    assert lines["lora"]["bytes"] == 4 * lines["lora"]["parameters"]
    assert lines["spp"]["fits"] is None
    assert "peft_type" in lines["broken"]["error"]


def test_a_listing_says_which_adapters_fit_a_model_and_why_not(base, tmp_path):
    folder = tmp_path / "adapters"
    other = save_base(tmp_path / "other", mask_seed=6)
    for kind in ("spp", "s2ft", "lora"):
        save_adapter(base, folder / kind, kind)
    save_adapter(other, folder / "elsewhere", "spp")
    random_llama(hidden=64).save_pretrained(tmp_path / "wide")
    save_adapter(tmp_path / "wide", folder / "wide", "lora")
    lines = {line["name"]: line for line in adapters.list_adapters([folder], model=base)["adapters"]}
    assert {name for name, line in lines.items() if line["fits"]} == {"spp", "s2ft", "lora"}
    assert "under another mask" in lines["elsewhere"]["why"]
    assert "is 32x32, not 64x64" in lines["wide"]["why"] or "is 32x64, not 64x128" in lines["wide"]["why"]


@pytest.mark.parametrize("kind", ["spp", "masked_lora", "pst", "lora", "dora", "s2ft"])
def test_an_adapter_whose_configuration_belies_its_tensors_does_not_fit(base, tmp_path, kind):
    folder = save_adapter(base, tmp_path / "adapter", kind)
    before = torch.get_rng_state()
    (line,) = adapters.list_adapters(folder, model=secateur.load(base).model)["adapters"]
    assert line["fits"], line["why"]
    if kind == "s2ft":
        units = json.loads((folder / "adapter_config.json").read_text())["units"]
        units["down"]["0"] = units["down"]["0"][:-1]
        edit(folder, units=units)
    else:
        edit(folder, r=8)
    (line,) = adapters.list_adapters(folder, model=base)["adapters"]
    assert line["fits"] is False
    assert re.search(r"tensor `.*` of .* has shape \[.*\], but `adapter_config.json` asks for \[.*\]", line["why"])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError):  # as it is when somebody wants to use it
        secateur.load(folder)


def test_an_adapter_without_some_of_its_tensors_does_not_fit(base, tmp_path):
    folder = save_adapter(base, tmp_path / "adapter", "spp")
    edit_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    (line,) = adapters.list_adapters(folder, model=base)["adapters"]
    assert line["fits"] is False
    assert "is missing" in line["why"]


def test_folders_without_adapters_are_refused(base, tmp_path):
    for path, words in ((tmp_path / "nowhere", "no folder"), (base, "has no `adapter_config.json`")):
        with pytest.raises(InputError, match=words):
            adapters.list_adapters(path)


def test_every_adapter_of_the_shelf_has_its_short_name():
    for entry in REGISTRY:
        if entry.name == "lora":
            assert METHODS["LORA"] == entry.name
        elif entry.kind == "adapter":
            assert METHODS[str(method_name(entry.load()))] == entry.name


# --- switch ---


@pytest.fixture
def switchable(base, tmp_path) -> dict[str, Path]:
    """Three S2FT adapters of different selections, and a folder with the first merged."""
    found = {
        "one": save_adapter(base, tmp_path / "one", "s2ft", seed=1),
        "two": save_adapter(base, tmp_path / "two", "s2ft", seed=2, **{"coupled": True}),
        "three": save_adapter(base, tmp_path / "three", "s2ft", seed=3, o=1, down=5),
    }
    edit(found["three"], seed=11)
    secateur.merge(found["one"], output=tmp_path / "merged")
    return {**found, "merged": tmp_path / "merged"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_sequence_of_switches_that_ends_at_none_gives_the_bits_of_the_base(dtype, tmp_path):
    base = save_base(tmp_path / "base", dtype)
    names = {}
    for seed, (name, settings) in enumerate(
        {"one": {}, "two": {"coupled": True}, "three": {"o": 1, "down": 5}}.items()
    ):
        names[name] = save_adapter(base, tmp_path / name, "s2ft", seed, **settings)
        secateur.merge(names[name], output=tmp_path / f"merged-{name}")
    model = tmp_path / "merged-one"
    wanted = {name: (tmp_path / f"merged-{name}" / "model.safetensors").read_bytes() for name in names}
    for name in ("two", "three", "one", "one", "none", "three", "none", "none", "two", "none"):
        report = adapters.switch(model, names.get(name, "none")).report
        assert is_complete(model)
        assert report["zero_pattern"]["identical"]
        side = json.loads((model / "secateur.json").read_text())
        if name == "none":
            old, new = weights_of(base), weights_of(model)
            assert old.keys() == new.keys()
            assert all(torch.equal(old[key].view(torch.uint8), new[key].view(torch.uint8)) for key in old)
            assert side["switch"]["adapter"] is None
            assert not (model / SWITCH_FILE).exists()
        else:
            assert (model / "model.safetensors").read_bytes() == wanted[name]
            assert side["switch"]["adapter"]["name"] == name
        assert side["base_model"]["spec"] == str(base)


def test_a_switch_needs_no_base_and_may_go_elsewhere(switchable, base, tmp_path):
    shutil.rmtree(base)
    (switchable["merged"] / "README.md").write_text("mine")
    before = digests(switchable["merged"])
    report = adapters.switch(switchable["merged"], switchable["two"], output=tmp_path / "elsewhere").report
    assert (report["taken_out"]["name"], report["adapter"]["name"]) == ("one", "two")
    assert {**before, "elsewhere": "there", ".elsewhere.lock": "there"} == {
        **digests(switchable["merged"]),
        ".elsewhere.lock": "there",
    }
    adapters.switch(switchable["merged"], switchable["two"])
    assert (switchable["merged"] / "README.md").read_text() == "mine"
    same = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("elsewhere", "merged"))
    assert len(set(same)) == 1


def test_what_is_stored_to_take_an_adapter_out_is_no_more_than_the_lines_it_changed(switchable, tmp_path):
    stored = load_file(switchable["merged"] / SWITCH_FILE)
    lines = sum(len(tensor) for name, tensor in stored.items() if name.endswith(".index"))
    assert lines == adapters.list_adapters(switchable["one"])["adapters"][0]["lines"]
    assert sum(tensor.nbytes for tensor in stored.values()) == lines * (8 + 4 * 32)


def spoilt(name: str, folder: Path) -> None:
    side = folder / "secateur.json"
    match name:
        case "lines lost":
            (folder / SWITCH_FILE).unlink()
        case "lines cut":
            (folder / SWITCH_FILE).write_bytes((folder / SWITCH_FILE).read_bytes()[:-9])
        case "other linears":
            found = json.loads(side.read_text())
            found["switch"]["linears"].popitem()
            side.write_text(json.dumps(found))
        case "no record":
            found = json.loads(side.read_text())
            del found["switch"]
            side.write_text(json.dumps(found))
        case "malformed":
            found = json.loads(side.read_text())
            name = min(found["switch"]["linears"])
            found["switch"]["linears"][name]["columns"] = "yes"
            side.write_text(json.dumps(found))
        case "trained since":
            tensors = weights_of(folder)
            for tensor in tensors.values():
                tensor.mul_(1.01)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


SPOILT = {
    "lines lost": f"no `{SWITCH_FILE}`",
    "lines cut": "is truncated",
    "other linears": "does not hold the linears",
    "no record": "no S2FT adapter that can be taken out",
    "malformed": "malformed",
    "trained since": "were changed since the adapter was merged",
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_model_whose_adapter_cannot_be_taken_out_is_left_alone(fault, switchable):
    spoilt(fault, switchable["merged"])
    before = digests(switchable["merged"])
    with pytest.raises(InputError, match=SPOILT[fault]):
        adapters.switch(switchable["merged"], "none")
    assert digests(switchable["merged"]) == before


def test_a_switch_to_what_does_not_fit_is_refused(switchable, base, tmp_path):
    before = digests(switchable["merged"])
    for path, words in (
        (save_adapter(base, tmp_path / "spp", "spp"), "only rows and columns of S2FT"),
        (tmp_path / "nowhere", "no adapter folder"),
        (save_adapter(save_base(tmp_path / "other", mask_seed=9), tmp_path / "masked", "s2ft"), "under another mask"),
    ):
        with pytest.raises(InputError, match=words):
            adapters.switch(switchable["merged"], path)
    with pytest.raises(InputError, match="no S2FT adapter that can be taken out"):
        adapters.switch(base, switchable["one"])
    with pytest.raises(InputError, match="no model folder"):
        adapters.switch(tmp_path / "nowhere", "none")
    assert digests(switchable["merged"]).items() >= {k: v for k, v in before.items() if v != "there"}.items()


@pytest.mark.parametrize("place", ["save.switch", "publish.manifest", "publish.aside", "publish.rename"])
def test_a_switch_in_place_that_fails_leaves_the_model_whole(place, switchable, monkeypatch):
    before = (switchable["merged"] / "model.safetensors").read_bytes()
    monkeypatch.setenv(faults.VARIABLE, f"{place}:1:raise")
    faults.forget()
    with pytest.raises(faults.InjectedError):
        adapters.switch(switchable["merged"], switchable["two"])
    monkeypatch.delenv(faults.VARIABLE)
    assert (switchable["merged"] / "model.safetensors").read_bytes() == before
    assert is_complete(switchable["merged"])
    adapters.switch(switchable["merged"], switchable["two"])


# --- fuse and export ---


def test_fused_s2ft_adapters_are_their_weighted_sum(switchable, base, tmp_path):
    report = adapters.fuse({switchable["one"]: 0.7, switchable["two"]: -0.3}, output=tmp_path / "fused")
    assert report["method"] == "s2ft"
    sums = {name: weight.double() for name, weight in weights_of(base).items()}
    for name, factor in (("one", 0.7), ("two", -0.3)):
        model = secateur.merge(switchable[name]).model
        for key, weight in weights_of(base).items():
            sums[key] += factor * (model.state_dict()[key].double() - weight.double())
    fused = secateur.merge(tmp_path / "fused", output=tmp_path / "merged-fused")
    assert fused.report["zero_pattern"]["identical"]
    for key, weight in sums.items():
        torch.testing.assert_close(fused.model.state_dict()[key].double(), weight, rtol=1e-5, atol=1e-6)
    adapters.switch(switchable["merged"], tmp_path / "fused")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 7}, "lora_alpha": 3}])
def test_fused_lora_adapters_are_their_weighted_sum(settings, tmp_path):
    base = save_base(tmp_path / "base", sparse=False)
    one = save_adapter(base, tmp_path / "one", "lora", seed=1, **settings)
    two = save_adapter(base, tmp_path / "two", "lora", seed=2, r=3, target_modules=["q_proj", "up_proj"])
    adapters.fuse({one: 0.5, two: -2.0}, output=tmp_path / "fused")
    sums = {name: weight.double() for name, weight in weights_of(base).items()}
    for path, factor in ((one, 0.5), (two, -2.0)):
        model = secateur.merge(path).model
        for key, weight in weights_of(base).items():
            sums[key] += factor * (model.state_dict()[key].double() - weight.double())
    fused = secateur.merge(tmp_path / "fused").model
    for key, weight in sums.items():
        torch.testing.assert_close(fused.state_dict()[key].double(), weight, rtol=1e-5, atol=1e-6)


def test_fusing_what_has_no_sum_is_refused(switchable, base, tmp_path):
    one, two = switchable["one"], switchable["two"]
    spp, lora = (save_adapter(base, tmp_path / kind, kind) for kind in ("spp", "lora"))
    dora = save_adapter(base, tmp_path / "dora", "dora")
    other = save_adapter(save_base(tmp_path / "other"), tmp_path / "lora-of-other", "lora")
    cases = (
        ({}, RecipeError, "no adapter is given"),
        ({one: float("nan"), two: 1.0}, RecipeError, "must be a finite number, got nan"),
        ({one: float("inf")}, RecipeError, "must be a finite number, got inf"),
        ({one: "x"}, RecipeError, "must be a finite number, got 'x'"),
        ({one: 1.0, str(one) + "/": 1.0}, RecipeError, "named twice"),
        ({one: 1.0, lora: 1.0}, InputError, "is a s2ft adapter and .* is a lora one"),
        ({spp: 1.0}, InputError, "cannot be fused: its update is a product"),
        ({dora: 1.0}, InputError, "cannot be fused: its row lengths"),
        ({lora: 1.0, other: 1.0}, InputError, "is for the base model `.*base` and .* for `.*other`"),
    )
    for given, error, words in cases:
        with pytest.raises(error, match=words):
            adapters.fuse(given, output=tmp_path / "fused")
    with pytest.raises(InputError, match=r"under another mask|for another model"):
        adapters.fuse({one: 1.0}, output=tmp_path / "fused", model=save_base(tmp_path / "third", mask_seed=8))
    assert not (tmp_path / "fused").exists()
    with pytest.raises(InputError, match="is the folder of the adapter"):
        adapters.fuse({one: 1.0}, output=one, overwrite=True)
    edit(lora, kasa_config={"x": 1})
    with pytest.raises(InputError, match=r"`kasa_config` .* has no exact sum"):
        adapters.fuse({lora: 1.0}, output=tmp_path / "fused")


def test_an_exported_adapter_is_lora_with_the_same_outputs(switchable, base, tmp_path):
    report = adapters.export_lora_adapter(switchable["two"], output=tmp_path / "lora")
    assert report["method"] == "lora"
    ours = PeftModel.from_pretrained(secateur.load(base).model, switchable["two"]).eval()
    theirs = PeftModel.from_pretrained(secateur.load(base).model, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    with pytest.raises(StateError, match="exists"):
        adapters.export_lora_adapter(switchable["two"], output=tmp_path / "lora")
    with pytest.raises(InputError, match="is a lora adapter of PEFT already"):
        adapters.export_lora_adapter(tmp_path / "lora", output=tmp_path / "again")
    with pytest.raises(InputError, match="no product of two small matrices"):
        adapters.export_lora_adapter(save_adapter(base, tmp_path / "spp", "spp"), output=tmp_path / "again")
