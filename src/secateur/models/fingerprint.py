"""A short name for the bytes of a model, cheap enough to take at every start.

What it proves: two models with one fingerprint have the same file names and sizes, the same configuration, tokenizer
and tensor tables byte for byte, and the same weights wherever they were sampled. A model trained, pruned or converted
differently differs in nearly every tensor, so it gets another fingerprint. What it does not prove: that no single
weight between two samples was changed. Files up to 64 MB are read whole, so for small models it is a digest of all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from secateur.core.errors import InputError

WHOLE = 64_000_000  # bytes: files up to this size are hashed whole
SAMPLES = 1024  # of 4 KiB each, spread evenly over a larger file
_PIECE = 4096
_MAX_HEADER = 100_000_000

_KINDS = {".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".bin", ".gguf", ".py"}
_OURS = {"manifest.json", "secateur.json"}  # what we write beside a model is not the model


def fingerprint(path: Path) -> str:
    """Return 64 hexadecimal digits that name a model folder or file.

    Args:
        path: a folder, of which the files that make up a model count, or one file.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = [path]
        if path.is_dir():
            entries = (entry for entry in path.iterdir() if entry.suffix in _KINDS and entry.name not in _OURS)
            files = sorted(entry for entry in entries if entry.is_file())
        for file in files:
            name = file.name if path.is_dir() else "model"  # a renamed file is the same model
            digest.update(f"{name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
            digest.update(_content(file))
    except OSError as error:
        raise InputError(f"`{error.filename or path}` cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    """Return the digest of a small file, or of the header and the samples of a large one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256()
        header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 1_000_000
        file.seek(0)
        digest.update(file.read(8 + min(header, _MAX_HEADER)))
        for sample in range(SAMPLES):
            file.seek(sample * (size - _PIECE) // (SAMPLES - 1))
            digest.update(file.read(_PIECE))
        return digest.digest()
