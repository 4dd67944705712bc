"""The versions that decide a result, for reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide a result."""
    found: dict[str, str] = {}
    for package in ("secateur", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
