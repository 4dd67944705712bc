"""Prune language models and win the quality back: every method behind one interface.

Nothing heavy is imported before it is used. `evaluate`, `export` and `methods` are functions as well as the packages
that hold the rest of their rooms, so those packages are callable: `secateur.evaluate(model, ...)`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.core.pattern import NM, Unstructured
    from secateur.methods.adapters.masked_lora import MaskedLoraConfig as MaskedLoraConfig
    from secateur.methods.adapters.pst import PstConfig as PstConfig
    from secateur.methods.adapters.s2ft import S2ftConfig as S2ftConfig
    from secateur.methods.adapters.spp import SppConfig as SppConfig
    from secateur.methods.optimizers.cram import CrAM
    from secateur.methods.registry import methods, register_adapters
    from secateur.recipe.adapters import merge
    from secateur.recipe.compare import compare
    from secateur.recipe.schema import Recipe
    from secateur.recipe.stages import evaluate, export, finetune, inspect, load, prune, tune
    from secateur.recipe.suggest import suggest

    __version__: str

__all__ = [
    "NM",
    "CrAM",
    "Recipe",
    "Unstructured",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "merge",
    "methods",
    "prune",
    "register_adapters",
    "suggest",
    "tune",
]

_STAGES = "secateur.recipe.stages"
_ADAPTERS = {  # not in `__all__`, because they need an extra
    "MaskedLoraConfig": "secateur.methods.adapters.masked_lora",
    "PstConfig": "secateur.methods.adapters.pst",
    "S2ftConfig": "secateur.methods.adapters.s2ft",
    "SppConfig": "secateur.methods.adapters.spp",
}
_HOMES = {
    "NM": "secateur.core.pattern",
    "Unstructured": "secateur.core.pattern",
    "CrAM": "secateur.methods.optimizers.cram",
    "Recipe": "secateur.recipe.schema",
    "compare": "secateur.recipe.compare",
    "merge": "secateur.recipe.adapters",
    "suggest": "secateur.recipe.suggest",
    "methods": "secateur.methods.registry",
    "register_adapters": "secateur.methods.registry",
    **_ADAPTERS,
    **dict.fromkeys(("prune", "tune", "finetune", "evaluate", "inspect", "export", "load"), _STAGES),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        value = globals()[name] = _version()
        return value
    if name not in _HOMES:
        raise AttributeError(f"module `secateur` has no attribute `{name}`")
    if name in _ADAPTERS:  # who names one of them may load any of them
        import_module("secateur.methods.registry").register_adapters()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def _version() -> str:
    """Return the installed version; reading it is a third of the import, so it waits until somebody asks."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("secateur")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ADAPTERS})


class _Room(ModuleType):
    """A package that is called like the public function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function, where `inspect.signature` and `help` look for it."""
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(_HOMES[name]), name)


for _name in ("evaluate", "export", "methods"):
    import_module(f"secateur.{_name}").__class__ = _Room
