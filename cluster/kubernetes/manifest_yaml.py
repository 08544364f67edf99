"""Resources as YAML that people can read and review."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def as_yaml(resources: Sequence[dict[str, Any]]) -> str:
    """The resources as a YAML stream: fields in their order, texts of several lines as blocks, nothing by reference."""
    return "---\n".join(yaml.dump(resource, Dumper=_Dumper, sort_keys=False, width=1000) for resource in resources)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # items stand further in than the key they belong to


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
