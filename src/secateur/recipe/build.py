"""Names and numbers to method objects, and back: what a recipe says in words becomes what the engine calls.

Importing this module imports no method; building one imports its file, and torch with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from secateur.core.errors import RecipeError
from secateur.core.registry import Entry, Kind
from secateur.methods.registry import REGISTRY
from secateur.recipe.complaints import collect, complain
from secateur.recipe.yaml_loader import Positions

# the words of other libraries for hyper-parameters, where a method has the field on the right and not the word itself
ALIASES = {
    "percdamp": "damping",
    "dampening_frac": "damping",
    "blocksize": "block_size",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "rank": "r",
    "alpha": "lora_alpha",
}


def build_method(spec: Any, kind: Kind, *, where: str = "method") -> Any:
    """Return the method object that `spec` stands for.

    Args:
        spec: a name, a mapping with a `name` and fields (which may be methods), or an object, returned as it is.
        kind: what contract it must fulfil.
        where: the argument it was given as, for messages.

    Raises:
        RecipeError: if the name is unknown or of another kind, or fields are unknown or out of range; all at once.
    """
    if isinstance(spec, str):
        return _construct(REGISTRY.find(spec, kind), {}, where)
    if isinstance(spec, Mapping):
        fields = dict(spec)
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise RecipeError(
                f"`{where}` needs a `name`", hint=f"write `{{name: ..., field: value}}` with the name of a {kind}"
            )
        return _construct(REGISTRY.find(name, kind), fields, where)
    entry = REGISTRY.entry_of(spec)
    if entry is not None and entry.kind != kind:
        raise RecipeError(f"`{where}` is `{entry.name}`, a {entry.kind}, where a {kind} is needed")
    verb, told = _VERBS.get(kind), _TOLD.get(kind, ())
    if spec is None or (verb and not callable(getattr(spec, verb, None))):
        raise RecipeError(
            f"`{where}` should be a {kind}, got {type(spec).__name__}",
            hint=f"give a name, a mapping with a `name`, or an object that has `{verb}`",
        )
    missing = next((name for name in told if not hasattr(spec, name)), None)
    if missing is not None:
        raise RecipeError(
            f"`{where}` is a {type(spec).__name__} without `{missing}`, which a {kind} needs",
            hint=f"give the class {' and '.join(f'`{name}`' for name in told)}, see `secateur.core.contracts`",
        )
    return spec


def describe(method: Any) -> dict[str, Any]:
    """Return `method` as plain data that `build_method` takes: its name and every field.

    A method that is not on the shelf is described by its class and what it holds, so that two that differ are told apart.
    """
    entry = REGISTRY.entry_of(method)
    name = entry.name if entry else f"{type(method).__module__}.{type(method).__qualname__}"
    if entry is not None and entry.kind == "adapter":
        return {"name": name, **{field: _plain(getattr(method, field)) for field in fields_of(entry)}}
    if not dataclasses.is_dataclass(method):
        return {"name": name, **{field: _plain(value) for field, value in getattr(method, "__dict__", {}).items()}}
    fields = dataclasses.fields(method)
    return {"name": name, **{field.name: _plain(getattr(method, field.name)) for field in fields if field.init}}


def fields_of(entry: Entry) -> dict[str, Any]:
    """Return the hyper-parameters of a method with their defaults as plain data; a required one has None."""
    cls = entry.load()
    if entry.kind == "adapter":  # PEFT's own dataclasses: the method's fields first, then those that all adapters share
        ours = [base for base in cls.__mro__ if base.__module__.startswith("secateur.")]
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in cls.records}
        names = [name for base in ours for name in vars(base).get("__annotations__", ()) if name in fields]
        return {name: _plain(fields[name].default) for name in names}
    found = getattr(cls, "__pydantic_fields__", {})
    return {
        name: None if info.is_required() else _plain(info.get_default(call_default_factory=True))
        for name, info in found.items()
    }


_VERBS: dict[str, str] = {"pruner": "prune", "block tuner": "tune", "planner": "plan"}
_TOLD: dict[str, tuple[str, ...]] = {  # what is read of a method beside its verb
    "pruner": ("needs", "scope"),
    "block tuner": ("dense_path",),
    "planner": ("copies", "backward"),
}
_CONTRACTS: dict[str, Kind] = {"Pruner": "pruner", "BlockTuner": "block tuner", "Planner": "planner"}


def _construct(entry: Entry, given: dict[str, Any], where: str) -> Any:
    """Return an object of the entry's class with the fields `given`."""
    cls = entry.load()
    checked = _checking(entry) if entry.kind == "adapter" else cls
    known: dict[str, Any] = getattr(checked, "__pydantic_fields__", {})
    values: dict[str, Any] = {}
    words: dict[str, str] = {}  # as which each was given
    for word, value in given.items():
        name = ALIASES[word] if word not in known and ALIASES.get(word) in known else word
        if name in values:
            raise RecipeError(f"`{where}` gives `{name}` of {entry.name} twice, as `{words[name]}` and as `{word}`")
        words[name] = word
        info = known.get(name)
        inner = _contract(info.annotation) if info is not None else None
        if inner is not None and isinstance(value, str | Mapping):
            value = _nested(value, info, inner, f"{where}.{name}")
        values[name] = value
    try:
        found = checked(**values)
    except ValidationError as error:
        positions = Positions("")
        items = ({**item, "loc": (where, *item["loc"])} for item in error.errors(include_url=False))
        raise collect(complain(item, positions, known, ALIASES) for item in items) from None
    return found if checked is cls else cls(**{name: getattr(found, name) for name in values})


def _checking(entry: Entry) -> type[Any]:
    """Return a model that checks the settings of an adapter, whose class is PEFT's dataclass and checks no types."""
    cls = entry.load()
    types = get_type_hints(cls)
    fields: dict[str, Any] = {name: (types[name], default) for name, default in fields_of(entry).items()}
    settings = ConfigDict(extra="forbid", protected_namespaces=())
    model: type[Any] = create_model(cls.__name__, __config__=settings, **fields)
    return model


def _nested(value: str | Mapping[str, Any], info: Any, kind: Kind, where: str) -> Any:
    """Return the method that a field holds; a mapping without a name keeps the class of the field's default."""
    if isinstance(value, Mapping) and "name" not in value and not info.is_required():
        entry = REGISTRY.entry_of(info.get_default(call_default_factory=True))
        if entry is not None:
            return _construct(entry, dict(value), where)
    return build_method(value, kind, where=where)


def _contract(annotation: Any) -> Kind | None:
    """Return the kind of method that a field of this type holds, or None for an ordinary value."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        kind = _CONTRACTS.get(getattr(candidate, "__name__", ""))
        if kind is not None and getattr(candidate, "__module__", "") == "secateur.core.contracts":
            return kind
    return None


def _plain(value: Any) -> Any:
    """Return `value` as JSON knows it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if REGISTRY.entry_of(value) is not None:
        return describe(value)
    if hasattr(value, "detach") or hasattr(value, "state_dict") or hasattr(value, "tobytes"):
        return _digest(value)
    return str(value)


def _digest(value: Any) -> str:
    """Return what tells a tensor, an array or a module from any other, of which `str` shows a part."""
    if hasattr(value, "state_dict"):
        parts = [
            f"{name} {_digest(part)}" if hasattr(part, "detach") else name for name, part in value.state_dict().items()
        ]
        content, words = "\n".join(parts).encode(), str(value)
    elif hasattr(value, "detach"):
        import torch

        plain = value.detach().cpu().contiguous().reshape(-1)
        content, words = plain.view(torch.uint8).numpy().tobytes(), f"{value.dtype} {tuple(value.shape)}"
    else:
        content, words = value.tobytes(), f"{value.dtype} {tuple(value.shape)}"
    return f"{words} sha256:{hashlib.sha256(content).hexdigest()}"
