"""Loading: what is refused, what is kept, and that nothing runs or is fetched on the way."""

from __future__ import annotations

import json
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from bad import models as bad
from secateur.core.errors import InputError, NumericError, RecipeError
from secateur.models.files import fingerprint, load, refuse_nonfinite, save_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local model must not cause a request")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = bad.sound_folder(tmp_path / "model")
    bad.write_tokenizer(path)
    return path


def files(path: Path) -> dict[str, bytes]:
    return {str(entry.relative_to(path)): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def resident(kind: str = "RssAnon") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def test_a_sound_folder_loads_with_tokenizer_and_source(folder):
    model, tokenizer, source = load(folder)
    assert not model.training
    assert tokenizer("a b c")["input_ids"] == [3, 4, 5]
    assert (source.spec, source.kind, source.path, source.revision) == (str(folder), "folder", folder, None)
    assert source.fingerprint == fingerprint(folder)
    assert source.notes == ()
    weight = model.model.norm.weight
    assert weight.detach().numpy().tobytes() == bad.values("model.norm.weight")


def test_a_folder_loads_from_shards(tmp_path):
    assert equal(load(bad.sharded_folder(tmp_path / "b")).model, load(bad.sound_folder(tmp_path / "a")).model)


def test_a_missing_tokenizer_is_noted(tmp_path):
    loaded = load(bad.sound_folder(tmp_path / "model"))
    assert loaded.tokenizer is None
    assert loaded.source.notes == ("the model has no tokenizer files",)


def test_an_unwanted_tokenizer_is_not_even_opened(folder):
    (folder / "tokenizer.json").write_text("{")
    loaded = load(folder, tokenizer=False)
    assert loaded.tokenizer is None and loaded.source.notes == ()


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "Nonesuch"}}', '{"added_tokens": 3}'])
def test_a_broken_tokenizer_is_an_input_error(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("name", bad.MISFITS)
def test_configuration_and_weights_that_do_not_fit_are_refused_without_taking_memory(name, folder):
    apply, part = bad.MISFITS[name]
    apply(folder)
    before = resident()
    with pytest.raises(InputError) as caught:
        load(folder)
    assert part in str(caught.value)
    assert resident() - before < 200_000_000


def test_a_table_of_computed_values_may_not_be_huge(tmp_path):
    from transformers import AutoModelForCausalLM, GPTJConfig

    config = GPTJConfig(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    save_model(AutoModelForCausalLM.from_config(config), None, tmp_path / "model", None)
    load(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_bytes())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "n_positions": 2**30}))
    before = resident()
    with pytest.raises(InputError, match="bytes for the table"):
        load(tmp_path / "model")
    assert resident() - before < 100_000_000


@pytest.mark.parametrize("name", ["hidden size 1e12", "shape wraps to the right size", "code in the config"])
def test_load_checks_the_folder_first(name, folder):
    bad.FOLDERS[name][0](folder)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert bad.FOLDERS[name][1] in str(caught.value)


def test_a_tensor_of_a_layer_that_the_configuration_lacks_is_refused(folder):
    names = {**bad.SHAPES, "model.layers.1.mlp.up_proj.weight": [1]}
    header = bad.header_of(list(bad.SHAPES))
    end = max(line["data_offsets"][1] for name, line in header.items() if name != "__metadata__")
    extra = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    header["model.layers.1.mlp.up_proj.weight"] = extra
    data = b"".join(bad.values(name) for name in bad.SHAPES) + bytes(4)
    bad.write(folder / bad.SINGLE, header, data)
    assert len(names) == 13
    with pytest.raises(InputError, match="has no place in the model"):
        load(folder)


@pytest.mark.parametrize("spec", ["/no/such/folder", "./none", "no\0ne", "x" * 5000, "../..//x", "a/b/c", "none.gguf"])
def test_what_names_nothing_is_refused(spec):
    with pytest.raises(InputError, match="there is no model folder or file"):
        load(spec)


def test_a_plain_file_is_no_model(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(InputError, match="neither a model folder nor"):
        load(tmp_path / "x.txt")


def test_an_unknown_builtin_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean `smollm2-135m`"):
        load("builtin:smolm2-135")


def test_a_revision_of_a_local_folder_is_a_mistake(folder):
    with pytest.raises(RecipeError, match="`revision` is 'main'"):
        load(folder, revision="main")


def test_no_canary_is_created(folder, tmp_path):
    canary = tmp_path / "canary"
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% set x = open('" + str(canary) + "', 'w') %}"
    bad.write_tokenizer(folder, chat_template=template)
    load(folder)
    bad.write_code(folder, canary)
    with pytest.raises(InputError, match="asks for Python code"):
        load(folder)
    bad.set_config(folder)
    bad.write_tokenizer(folder, auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})
    with pytest.raises(InputError, match="asks for Python code"):
        load(folder)
    bad.write_tokenizer(folder)
    bad.write_pickle(folder, canary)
    with pytest.raises(InputError, match="only as pickle"):
        load(folder)
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder, allow_pickle=True)
    assert not canary.exists()


def test_code_runs_only_when_it_is_trusted(folder, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    bad.write_code(folder, canary)
    with pytest.raises(InputError, match="cannot be loaded"):  # the code defines no model
        load(folder, trust_remote_code=True)
    assert canary.exists()


def test_trusted_tensors_of_a_pickle_load_and_are_noted(folder):
    reference = load(folder).model
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    (folder / bad.SINGLE).unlink()
    loaded = load(folder, allow_pickle=True)
    assert equal(loaded.model, reference)
    assert "pickle" in loaded.source.notes[0]


def test_weights_stay_mapped_until_they_are_touched(make_llama, tmp_path):
    save_model(make_llama(layers=4, hidden=512, vocabulary=2000), None, tmp_path / "model", None)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    load(tmp_path / "model")
    before = resident()
    loaded = load(tmp_path / "model")
    assert size > 40_000_000
    assert resident() - before < size // 4
    assert loaded.model.dtype == torch.float32


def test_another_dtype_is_taken_only_when_asked(folder):
    assert load(folder).model.dtype == torch.float32
    assert load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    bad.set_config(folder, dtype="float16")  # the configuration is not believed, the stored tensors are
    assert load(folder).model.dtype == torch.float32


def test_the_file_is_not_changed_by_edits_in_place(folder):
    before = files(folder)
    model = load(folder).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert files(folder) == before


def test_a_read_only_folder_loads(folder):
    for entry in folder.iterdir():
        entry.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert load(folder).tokenizer is not None
    finally:
        folder.chmod(0o755)


def test_loading_and_saving_leave_no_trace_in_the_process(folder, tmp_path):
    from transformers.utils import logging

    state = torch.get_rng_state()
    before = (logging.get_verbosity(), torch.get_default_dtype(), Path.cwd(), list(warnings.filters))
    loaded = load(folder)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "out", {})
    assert torch.equal(torch.get_rng_state(), state)
    assert (logging.get_verbosity(), torch.get_default_dtype(), Path.cwd(), list(warnings.filters)) == before


def test_odd_paths_are_fine(tmp_path):
    path = bad.sound_folder(tmp_path / "a path with späces 模型" / ("long" * 40))
    assert load(path).model is not None


def test_weights_that_are_not_finite_are_named(make_llama):
    model = make_llama()
    refuse_nonfinite(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    refuse_nonfinite(model)  # the sum overflows, the values do not
    with torch.no_grad():
        model.lm_head.weight[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with pytest.raises(NumericError, match=r"`lm_head\.weight` has 3 values"):
        refuse_nonfinite(model)
