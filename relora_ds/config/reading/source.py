"""Reading YAML and JSON files into documents that keep the line of every key.

YAML is read with the scalars of the YAML 1.2 core schema, because YAML 1.1 (PyYAML's default) turns
`no` into a boolean, `1e-3` into text, `010` into eight and `2024-01-01` into a date.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

from relora_ds.config.reading.document import Document, KeyPath, Place, key_name, show
from relora_ds.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    f"{_TAG}null": re.compile(r"^(?:null|Null|NULL|~|)$"),
    f"{_TAG}bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    f"{_TAG}int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    f"{_TAG}float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}


def read_yaml(path: str | Path) -> Document:
    """Read a YAML file whose root is a mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not text, not YAML, or not a mapping.
    """
    return _document(read_text(path), str(path))


def read_json(path: str | Path) -> Document:
    """Read a JSON file whose root is an object.

    Raises:
        ConfigError: the file is missing, unreadable, not text, not JSON, or not an object.
    """
    text = read_text(path)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: is not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: is not usable JSON: {error}") from None
    # JSON is YAML, which gives us lines; only tabs between tokens have to go (PyYAML refuses them,
    # JSON strings cannot hold them)
    return _document(text.replace("\t", " "), str(path))


def read_text(path: str | Path) -> str:
    """Text of a regular UTF-8 file of at most `MAX_BYTES`.

    Raises:
        ConfigError: it does not exist, is no regular file, is too large, or is not UTF-8 text.
    """
    try:
        # opening a pipe or a device could block for ever
        regular = stat.S_ISREG(Path(path).stat().st_mode)
        content = _head(path) if regular else b""
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: is not a path ({error})") from None
    if not regular:
        kind = "a directory" if Path(path).is_dir() else "not a regular file"
        raise ConfigError(f"{path}: is {kind}: give the path of a file")
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes: no configuration file is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: is not UTF-8 text (byte 0x{content[error.start]:02x}): "
            "a binary file or another encoding"
        ) from None


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def parse_value(text: str, place: Place) -> Any:
    """One YAML value given outside of a file, such as the right side of `method.rank=64`.

    Raises:
        ConfigError: it is not YAML, or holds duplicate keys.
    """
    builder = _Builder(lambda mark: place)
    value = builder.build(_compose(text, lambda mark: place), ())
    if builder.problems:
        raise ConfigError(builder.problems)
    return value


def dump_yaml(data: dict[str, Any]) -> str:
    """Block-style YAML, keys in the given order, that `read_yaml` reads back to equal data."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, width=100)


def _document(text: str, name: str) -> Document:
    def locate(mark: yaml.Mark) -> Place:
        return Place(name, mark.line + 1, mark.column + 1)

    builder = _Builder(locate)
    data = builder.build(_compose(text, locate), ())
    if data is None:
        raise ConfigError(f"{name}: is empty: a mapping of keys is needed")
    if not isinstance(data, dict):
        raise ConfigError(f"{builder.places[()]}: must be a mapping of keys, is {show(data)}")
    builder.places[()] = Place(name)
    return Document(name, data, builder.places, builder.problems, builder.unread)


def _compose(text: str, locate: Callable[[yaml.Mark], Place]) -> yaml.Node | None:
    loader = None
    try:
        loader = _CoreLoader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        place = locate(error.problem_mark or error.context_mark or yaml.Mark("", 0, 0, 0, None, 0))
        hint = ": indent with spaces, not with tabs" if "\\t" in str(error.problem) else ""
        context = f"{error.context}, " if error.context else ""
        raise ConfigError(f"{place}: is not valid YAML: {context}{error.problem}{hint}") from None
    except yaml.YAMLError as error:
        place = locate(yaml.Mark("", 0, 0, 0, None, 0))
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{place.source}: is not valid YAML: {reason}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _CoreLoader(yaml.SafeLoader):
    """Composes nodes under the YAML 1.2 core schema; neither aliases nor bottomless nesting."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[Any]]] = {}  # pyright: ignore
    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            # an alias can hold its own parent, and ten of them can blow a file up to gigabytes
            reason = "aliases (*name) are not supported: write the value out"
            raise ComposerError(None, None, reason, event.start_mark)
        if self.depth >= MAX_DEPTH:
            reason = f"nested more than {MAX_DEPTH} levels deep"
            raise ComposerError(None, None, reason, event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            reason = f"holds more than {MAX_VALUES} values: no configuration file does"
            raise ComposerError(None, None, reason, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern in _CORE_SCHEMA.items():
    _CoreLoader.add_implicit_resolver(_tag, _pattern, None)


class _CoreDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the core schema would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write shared values out: our loader refuses aliases."""
        return True


for _tag, _pattern in _CORE_SCHEMA.items():
    _CoreDumper.add_implicit_resolver(_tag, _pattern, None)


class _Builder:
    """Turns nodes into plain data; notes the place of every value and the problems on the way."""

    def __init__(self, locate: Callable[[yaml.Mark], Place]) -> None:
        self.locate = locate
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[str] = []
        self.unread: set[KeyPath] = set()

    def build(self, node: yaml.Node | None, path: KeyPath) -> Any:
        """The data under `node`, which stands at `path`."""
        if node is None:
            return None
        self.places.setdefault(path, self.locate(node.start_mark))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        return self._problem(path, f"the tag {node.tag} is not supported: write plain data")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.locate(key_node.start_mark)
            key = _whole(key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self.problems.append(f"{place}: a key must be text, not a list or a mapping")
                continue
            if key in result:
                name = key_name((*path, key))
                first = self.places[(*path, key)].line
                before = "" if first is None else f" first on line {first};"
                self.problems.append(f"{place}: {name}: duplicate key;{before} keep one of them")
                continue
            self.places[(*path, key)] = place
            result[key] = self.build(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Hashable:
        text, tag = node.value, node.tag
        if tag == f"{_TAG}str":
            whole = _whole(text)
            if whole is None:
                return self._problem(path, "holds half of a surrogate pair, which is not text")
            return whole
        pattern = _CORE_SCHEMA.get(tag)
        if pattern is None or not pattern.match(text):
            return self._problem(path, f"the tag {tag} is not supported: write plain data")
        if tag == f"{_TAG}null":
            return None
        if tag == f"{_TAG}bool":
            return text.lower() == "true"
        if tag == f"{_TAG}float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        # 64 bits is 20 digits; the length is tested first because huge conversions are refused
        if len(text) > 70 or not -(2**63) <= int(text, base) < 2**63:
            return self._problem(path, f"is {show(text)}, but an integer must fit into 64 bits")
        return int(text, base)

    def _problem(self, path: KeyPath, message: str) -> None:
        name = f"{key_name(path)}: " if path else ""
        self.problems.append(f"{self.places[path]}: {name}{message}")
        self.unread.add(path)


def _whole(text: str) -> str | None:
    """Text with the escaped surrogate pairs of JSON joined; None if a half is left over."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None
