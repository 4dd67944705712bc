"""An adapter folder read as text and tables: what it says about itself, and whether its files are whole.

Nothing of it is executed and no tensor is read, so this needs neither torch nor peft.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from secateur.core.errors import InputError, RecipeError, did_you_mean
from secateur.core.fetch import file_sha256
from secateur.models.folder_checks import check_file
from secateur.models.safetensors_header import FLOATS, Stored, read_header
from secateur.models.strict_json import MEGABYTE, read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
METHODS = {
    "LORA": "lora",  # PEFT's own, `dora` with its row lengths
    "secateur_spp": "spp",
    "secateur_masked": "masked_lora",
    "secateur_s2ft": "s2ft",
    "secateur_pst": "pst",
}  # peft_type -> short name, as `secateur methods` has it

_OWN = re.compile(r"base_model\.model\.(.+?)\.(secateur_\w+|lora_[A-Za-z_]+)(\.weight|\.bias)?")
_RANKED = {"secateur_spp_row": 0, "secateur_masked_down": 0, "secateur_pst_down": 0, "lora_A": 0, "lora_embedding_A": 0}


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT adapter folder whose configuration and table of tensors were read and are sound.

    Attributes:
        path: the folder.
        config: the content of `adapter_config.json`.
        tensors: what the header of `adapter_model.safetensors` says, by name.
        method: short name of the method, as in `secateur methods`, or `lora` or `dora` for PEFT's own.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    method: str

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.absolute().name

    @property
    def base(self) -> str | None:
        """What the configuration calls the model that the adapter is for."""
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None

    @property
    def modules(self) -> dict[str, dict[str, Stored]]:
        """The adapter's own tensors by module, then by their kind, such as `lora_A`."""
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in self.tensors.items():
            if match := _OWN.fullmatch(name):
                found.setdefault(match[1], {})[match[2]] = stored
        return found

    @property
    def whole_modules(self) -> list[str]:
        """The tensors that are trained whole beside the adapter's own, such as a new head."""
        return sorted(name for name in self.tensors if not _OWN.fullmatch(name))

    @property
    def ranks(self) -> list[int]:
        """The ranks that its linears have, ascending, none for methods without."""
        kinds = (item for own in self.modules.values() for item in own.items())
        return sorted({stored.shape[_RANKED[kind]] for kind, stored in kinds if kind in _RANKED and stored.shape})

    @property
    def lines(self) -> int | None:
        """The number of rows and columns that S2FT trains, None for other methods."""
        if self.method != "s2ft":
            return None
        return sum(own["secateur_s2ft_slice"].shape[0] for own in self.modules.values() if "secateur_s2ft_slice" in own)

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return sum(prod(stored.shape) for stored in self.tensors.values() if stored.dtype in FLOATS)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.end - stored.begin for stored in self.tensors.values())

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that name the content of the folder's two files."""
        both = "".join(file_sha256(self.path / name) for name in (CONFIG, WEIGHTS))
        return hashlib.sha256(both.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what is written down about an adapter that became a part of a model."""
        return {"name": self.name, "method": self.method, "fingerprint": self.fingerprint()}


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read and check an adapter folder.

    Raises:
        InputError: it is not there, not whole, or of a method that is not known here.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"there is no adapter folder `{folder}`", hint=f"name a folder that holds `{CONFIG}`")
    if not (folder / CONFIG).exists():
        raise InputError(
            f"`{folder}` has no `{CONFIG}`, so it is not an adapter folder",
            hint=_hint(folder) or "name a folder that `save_pretrained` of a PEFT model wrote",
        )
    try:
        check_file(folder / CONFIG, folder)
        config = read_object(folder / CONFIG, 50 * MEGABYTE)
        method = _method(config, folder / CONFIG)
        if not (folder / WEIGHTS).exists():
            raise InputError(
                f"`{folder}` has no `{WEIGHTS}`",
                hint=f"`{PICKLE}` can run code when it is opened: save the adapter as safetensors"
                if (folder / PICKLE).exists()
                else "the folder is incomplete",
            )
        check_file(folder / WEIGHTS, folder)
        tensors = read_header(folder / WEIGHTS).tensors
    except OSError as error:
        raise InputError(f"`{error.filename or folder}` cannot be read: {error.strerror}") from error
    found = AdapterFolder(folder, config, tensors, method)
    if not found.modules:
        raise InputError(f"`{folder / WEIGHTS}` holds no tensors of a {method} adapter", hint="the file is incomplete")
    return found


def adapter_folders(paths: Sequence[str | Path]) -> list[Path]:
    """Return the adapter folders that `paths` are or hold, in the order of their names, each once.

    Raises:
        RecipeError: there are no paths.
        InputError: a path is not there, or neither is nor holds an adapter folder.
    """
    if not paths:
        raise RecipeError("no adapter is named", hint="name an adapter folder, or a folder that holds some")
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"there is no folder `{path}`", hint="name an adapter folder, or a folder that holds some")
        if (path / CONFIG).exists():
            found.setdefault(path.resolve(), path)
            continue
        try:
            inner = sorted(entry for entry in path.iterdir() if (entry / CONFIG).exists() and entry.name[0] != ".")
        except OSError as error:
            raise InputError(f"`{error.filename or path}` cannot be read: {error.strerror}") from error
        if not inner:
            raise InputError(
                f"`{path}` has no `{CONFIG}` and holds no adapter folder",
                hint=_hint(path) or "name a folder that `save_pretrained` of a PEFT model wrote",
            )
        for entry in inner:
            found.setdefault(entry.resolve(), entry)
    return list(found.values())


def _method(config: dict[str, Any], where: Path) -> str:
    """Return the short name of the method that a configuration is of."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        raise InputError(
            f"`peft_type` in `{where}` is {str(kind)[:80]!r}, which secateur cannot read"
            f"{did_you_mean(str(kind), METHODS)}",
            hint=f"known: {', '.join(METHODS)}",
        )
    # PEFT would import the module that is named there
    if config.get("megatron_config") is not None:
        raise InputError(f"`megatron_config` in `{where}` asks for another program's linears", hint="remove it")
    return "dora" if kind == "LORA" and config.get("use_dora") else METHODS[kind]


def _hint(folder: Path) -> str | None:
    if (folder / "config.json").exists():
        return "it holds a whole model"
    checkpoints = sorted(entry.name for entry in folder.glob("checkpoint-*") if (entry / CONFIG).exists())
    return f"it holds checkpoints: name one, such as {folder / checkpoints[-1]}" if checkpoints else None
