"""Whatever a model folder holds, the answer is a model or an `InputError`: at once, with no request, no program, no file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bad import models as bad
from secateur.core.errors import InputError
from secateur.models.files import load
from secateur.models.folder_checks import check_folder

CASES = int(os.environ.get("SECATEUR_FUZZ_CASES", "1500"))
LOADS = int(os.environ.get("SECATEUR_FUZZ_LOADS", "60"))
EXTREMES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**40, 0.5, 1e308, -0.0, "", "x", "../x", "/etc/passwd", "\0", "é" * 50,
    [], [1], {}, {"a": 1}, [[[]]], ["x"], {"rope_type": "x"}, "auto", "sdpa",
]  # fmt: skip

seen: list[str] = []
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        seen.append(f"{event} {arguments}")
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes and "pytest" not in str(arguments[0]) and not str(arguments[0]).startswith("/dev/"):
        seen.append(f"written {arguments[0]}")


sys.addaudithook(watch)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Let the libraries be imported before anything is timed or watched."""
    load(bad.sound_folder(tmp_path_factory.mktemp("warm") / "model"))


@pytest.fixture(autouse=True)
def watched(imported):
    global watching
    seen.clear()
    watching = True
    yield
    watching = False
    assert seen == []


def mutate(data: bytes, random: Random) -> bytes:
    """Change a few bytes: flip, delete, repeat, insert, cut, or put another number."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(found) + 1)
        match random.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << random.randrange(8)
            case 1:
                del found[at : at + random.randrange(1, 20)]
            case 2:
                found[at:at] = found[at : at + random.randrange(1, 40)]
            case 3:
                found[at:at] = random.choice((b'"', b"{", b"[", b"-", b"9" * 30, b"\\u0000", b"1e999", b",", b"\xff"))
            case 4 if random.random() < 0.2:
                del found[at:]
            case _:
                digits = [place for place, byte in enumerate(found[:4000]) if 48 <= byte <= 57]
                if digits:
                    found[random.choice(digits)] = random.choice(b"0123456789")
    return bytes(found)


@pytest.mark.parametrize("name", [bad.SINGLE, bad.INDEX, bad.FIRST, "config.json", "tokenizer_config.json"])
def test_mutated_files_are_checked_or_refused(name, tmp_path):
    make = bad.sound_folder if name == bad.SINGLE else bad.sharded_folder
    folder = make(tmp_path / "model")
    bad.write_tokenizer(folder)
    sound, random, refused = (folder / name).read_bytes(), Random(name), 0
    for _ in range(CASES // 5):
        (folder / name).write_bytes(mutate(sound, random))
        try:
            check_folder(folder)
        except InputError:
            refused += 1
    assert refused > CASES // 25


def test_configurations_with_any_value_load_or_are_refused(tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    bad.write_tokenizer(folder)
    more = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    more |= {
        "pad_token_id": 0,
        "attention_bias": False,
        "head_dim": 4,
        "torch_dtype": "float32",
        "tokenizer_class": "x",
    }
    sound, random = {**bad.CONFIG, **more}, Random(1)
    for _ in range(LOADS):
        changed = dict(sound)
        for _ in range(random.choice((1, 1, 2))):
            changed[random.choice(list(sound))] = random.choice(EXTREMES)
        (folder / "config.json").write_text(json.dumps(changed))
        _load(folder, changed)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_side_files_with_any_bytes_load_or_are_refused(name, tmp_path):
    folder = bad.sound_folder(tmp_path / "model")
    bad.write_tokenizer(folder, model_max_length=32, add_bos_token=True, extra_special_tokens=["<x>"])
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "max_length": 20, "eos_token_id": [1, 2]}')
    sound, random = (folder / name).read_bytes(), Random(name)
    for _ in range(LOADS // 3):
        (folder / name).write_bytes(mutate(sound, random))
        _load(folder, (folder / name).read_bytes())


def _load(folder: Path, shown: Any) -> None:
    try:
        load(folder)
    except InputError:
        pass
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} for {shown}") from error
