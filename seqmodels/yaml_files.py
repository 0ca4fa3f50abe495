"""YAML as people write it: recipes, spaces of a search, a service's settings. Needs pyyaml, which neither models nor
pipelines do: only training and serving import this.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from seqmodels.errors import ConfigError


def read_yaml(path: Path, kind: str) -> Any:
    """What a file holds. kind: what it is called in the ConfigError that is raised where it cannot be read."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{kind} {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{kind} {path} is not UTF-8 (byte {byte:#04x} at {error.start}); convert it first") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date of month 13, or very deep nesting
        raise ConfigError(f"{kind} {path} is not YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str) -> Any:
    """Raises yaml.MarkedYAMLError, ValueError or RecursionError; and yaml.YAMLError, where a key stands twice."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number, as everybody who writes it expects, and takes no key twice."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = (key.tag, key.value)
            if name in lines:
                both = f"lines {lines[name]} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"{key.value!r} stands twice, in {both}; keep one")
            lines[name] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
