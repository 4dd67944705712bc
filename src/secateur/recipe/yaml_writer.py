"""Write YAML that readers of version 1.1 and 1.2 understand alike."""

from __future__ import annotations

from typing import Any

import yaml

from secateur.recipe.yaml_loader import plain_scalar


def to_yaml(data: Any) -> str:
    """Return plain data as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 could take for something else."""

    def represent_text(self, text: str) -> yaml.Node:
        style = None if plain_scalar(text) is text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
