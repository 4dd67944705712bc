"""Model folders that are refused before any library opens them, each with its reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bad import models as bad
from effort import effort
from secateur.core.errors import InputError
from secateur.models.folder_checks import check_folder, shard_names, survey


def tree(path: Path) -> dict[str, tuple[int, int]]:
    return {str(entry): (entry.lstat().st_size, entry.lstat().st_mtime_ns) for entry in path.rglob("*")}


@pytest.mark.parametrize("name", bad.FOLDERS)
def test_a_broken_folder_is_refused_with_its_reason(name, tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    apply, part = bad.FOLDERS[name]
    apply(folder)
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        check_folder(folder)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 600
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", bad.SHARDS)
def test_broken_shards_are_refused_with_their_reason(name, tmp_path):
    folder = bad.sharded_folder(tmp_path / "model")
    apply, part = bad.SHARDS[name]
    apply(folder)
    with pytest.raises(InputError) as caught:
        check_folder(folder)
    assert part in str(caught.value)


def test_sound_folders_are_let_through(tmp_path):
    for make in (bad.sound_folder, bad.sharded_folder):
        folder = make(tmp_path / make.__name__)
        bad.write_tokenizer(folder)
        check_folder(folder)
        found = survey(folder)
        assert found.tensors.keys() == bad.SHAPES.keys()
        assert found.stored_dtype() == "F32"
        assert found.has_tokenizer and not found.pickled and not found.runs_code


def test_something_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        check_folder(tmp_path / "nothing")


def test_pickled_weights_need_permission(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    bad.write_pickle(folder, tmp_path / "canary")
    with pytest.raises(InputError, match="only as pickle") as caught:
        check_folder(folder)
    assert caught.value.hint is not None and "--allow-pickle" in caught.value.hint
    check_folder(folder, allow_pickle=True)
    assert survey(folder, allow_pickle=True).pickled


def test_code_needs_permission_and_must_be_in_the_folder(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    bad.write_code(folder, tmp_path / "canary")
    with pytest.raises(InputError, match="it was not run"):
        check_folder(folder)
    assert survey(folder, trust_remote_code=True).runs_code
    bad.set_config(folder, auto_map={"AutoConfig": "somebody/else--modeling.Config"})
    with pytest.raises(InputError, match="another repository"):
        check_folder(folder, trust_remote_code=True)


def test_links_of_the_hub_cache_may_stay(tmp_path):
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    bad.sound_folder(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    check_folder(folder)
    (tmp_path / "elsewhere").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside the model's folder"):
        check_folder(folder)


def test_a_link_that_stays_inside_is_let_through(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    (folder / bad.SINGLE).rename(folder / "weights.data")
    (folder / bad.SINGLE).symlink_to("weights.data")
    check_folder(folder)


def test_a_dangling_link_is_refused(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    (folder / "tokenizer.json").symlink_to(folder / "gone")
    with pytest.raises(InputError, match="cannot be read"):
        check_folder(folder)


def test_a_stale_file_name_of_another_machine_is_harmless(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    bad.write_tokenizer(
        folder, tokenizer_file="/home/nobody/.cache/tokenizer.json", special_tokens_map_file="/etc/passwd"
    )
    check_folder(folder)


def test_the_dtype_of_most_bytes_is_the_stored_one(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    header = bad.header_of(list(bad.SHAPES))
    header["model.norm.weight"].update(dtype="BF16", shape=[2 * bad.HIDDEN])
    bad.write(folder / bad.SINGLE, header, b"".join(bad.values(name) for name in bad.SHAPES))
    assert survey(folder).stored_dtype() == "F32"


def test_shard_names_are_checked_without_the_shards(tmp_path):
    folder = bad.sharded_folder(tmp_path / "model")
    (folder / bad.FIRST).unlink()
    (folder / bad.SECOND).unlink()
    assert shard_names(folder / bad.INDEX) == [bad.FIRST, bad.SECOND]
    bad.set_index(folder, lambda mapped: mapped.update(x="../x.safetensors"))
    with pytest.raises(InputError, match="only plain names"):
        shard_names(folder / bad.INDEX)


def test_a_large_header_takes_work_in_proportion_to_its_tensors(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")

    def calls(count: int) -> int:
        names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(count)]
        header = {
            name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]}
            for at, name in enumerate(names)
        }
        bad.write(folder / bad.SINGLE, header, bytes(4 * count))
        assert len(survey(folder).tensors) == count
        return effort(lambda: survey(folder)).calls

    assert calls(20_000) < 2.1 * calls(10_000)


def test_checks_need_no_torch():
    code = "import sys, secateur.models.folder_checks, secateur.core.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
