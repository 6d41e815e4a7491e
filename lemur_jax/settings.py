"""From gin files and command-line bindings to one validated config: the only door for gin.

gin sets fields of frozen dataclasses and nothing else. Before gin runs, every statement is read
once with gin's own parser, so that all problems are reported together, each with file and line:
unknown classes and fields (with the nearest known name), wrong types, missing macros, missing
fields.
"""

import dataclasses
import difflib
import io
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config_parser

from lemur_jax.config import ConfigError

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class _Reference:
    """`@Class()` or `%MACRO` as the first reading sees it."""

    name: str
    is_macro: bool


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return _Reference(scoped_configurable_name, is_macro=False)

    def macro(self, macro_name):
        return _Reference(macro_name, is_macro=True)


def load(
    root: type,
    files: Sequence[str],
    bindings: Sequence[str],
    classes: Sequence[type],
    unused: Mapping[str, Any] | None = None,
) -> tuple[Any, str]:
    """Builds `root` from gin.

    Args:
      root: the dataclass to build, e.g. TrainConfig.
      files: gin files in order; later bindings win. Included files are looked up beside the
        including file, then in the repository's configs/.
      bindings: "NAME=VALUE" strings of --gin.NAME=VALUE; they win over every file.
      classes: all dataclasses that gin may set, `root` among them.
      unused: {"Class.field": value} of fields that the caller will not look at: they need not be
        set, and macros that nothing else uses need not be either.

    Returns:
      The config, and gin text that is enough to build it again.

    Raises:
      ConfigError: with every problem found, each naming where it was written.
    """
    known = {cls.__name__: cls for cls in classes}
    reading = _Reading(known, unused or {})
    for name in files:
        reading.read_file(name, "--gin_file")
    for binding in bindings:
        reading.read_binding(binding)
    reading.check_references()
    reading.check_required(root)
    if reading.problems:
        raise ConfigError(reading.problems)

    gin.clear_config(clear_constants=True)
    for cls in known.values():
        _register(cls)
    try:
        gin.parse_config(_structure(known))
        for text in reading.sources:
            gin.parse_config(text)
        for name, value in (unused or {}).items():
            gin.bind_parameter(name, value)
        _check_leaves(root, known)
        _check_referred(reading.referred())
        config = gin.get_configurable(root.__name__)()
        return config, _without_comments(gin.operative_config_str())
    finally:
        gin.clear_config(clear_constants=True)


def _register(cls: type) -> None:
    try:
        gin.external_configurable(cls, cls.__name__)
    except ValueError as error:
        if "already exists" not in str(error):
            raise


def _structure(known: dict[str, type]) -> str:
    """Bindings for fields that are themselves configs: nobody has to write `= @ModelConfig()`."""
    lines = []
    for name, cls in known.items():
        for field, kind in typing.get_type_hints(cls).items():
            if isinstance(kind, type) and kind.__name__ in known:
                lines.append(f"{name}.{field} = @{kind.__name__}()")
    return "\n".join(lines)


def _check_leaves(root: type, known: dict[str, type]) -> None:
    """Builds the inner configs one by one, so that the problems of all of them are reported."""
    problems = []
    for kind in typing.get_type_hints(root).values():
        if isinstance(kind, type) and kind.__name__ in known:
            try:
                gin.get_configurable(kind.__name__)()
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)


def _check_referred(names: Sequence[str]) -> None:
    """Builds what tuples refer to (sources, steps), so that the problems of all are reported."""
    problems = []
    for name in names:
        scope, _, cls = name.rpartition("/")
        try:
            with gin.config_scope(scope or None):
                gin.get_configurable(cls)()
        except ConfigError as error:
            problems += error.problems
        except TypeError:
            continue  # a required field is not set: an error only where the reference is used
    if problems:
        raise ConfigError(problems)


def _without_comments(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines).strip() + "\n"


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(names))}"


class _Reading:
    """The first reading: statements with their places, and everything wrong with them."""

    def __init__(self, known: dict[str, type], unused: Mapping[str, Any]):
        self.known = known
        self.unused = set(unused)
        self.problems: list[str] = []
        self.sources: list[str] = []  # texts for gin, includes expanded, in order
        self._bound: dict[tuple[str, str, str], str] = {}  # (scope, class, field) -> place
        self._macros: dict[str, tuple[Any, str]] = {}  # name -> (value, place)
        self._used: list[tuple[_Reference, str, bool]] = []  # the last: it must have a value

    def read_file(self, name: str, asked_by: str, beside: Path | None = None) -> None:
        """Reads a file and, in place, the files it includes."""
        tried = [Path(name)]
        if not os.path.isabs(name):
            tried = [*([beside / name] if beside else [Path(name)]), _CONFIGS / name]
        path = next((p for p in tried if p.is_file()), None)
        if path is None:
            looked = ", ".join(str(p) for p in tried)
            self.problems.append(f"{asked_by}={name}: no such file (looked for {looked})")
            return
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self.problems.append(f"{asked_by}={name}: not a gin file, not even text ({error})")
            return
        self._read(text, str(path), path.parent)

    def read_binding(self, binding: str) -> None:
        """Reads one "NAME=VALUE" of the command line."""
        name, _, value = binding.partition("=")
        place = f"--gin.{name}"
        before = len(self.problems)
        self._read(f"{name} = {value}", place, None)
        if len(self.problems) > before and "not a gin" in self.problems[-1]:
            self.problems[-1] = (
                f"{place}={value}: not a gin value; numbers and True/False/None are written bare, "
                f"strings quoted: {place}='\"{value}\"'"
            )

    def _read(self, text: str, place: str, directory: Path | None) -> None:
        lines, parser = [], None
        try:
            parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
            statements = list(parser)
        except SyntaxError as error:
            where = f"{place}:{error.lineno}" if error.lineno else place
            self.problems.append(f"{where}: not a gin statement: {error.msg}")
            return
        own, start = text.splitlines(), 0
        for statement in statements:
            line = statement.location.line_num
            where = place if directory is None else f"{place}:{line}"
            if isinstance(statement, config_parser.IncludeStatement):
                lines += own[start : line - 1]
                self.sources.append("\n".join(lines))
                lines, start = [], line
                self.read_file(statement.filename, f"{where}: include", directory)
            elif isinstance(statement, config_parser.ImportStatement):
                self.problems.append(f"{where}: import is not allowed: gin only sets config fields")
            elif isinstance(statement, config_parser.BindingStatement):
                self._check_binding(statement, where)
        self.sources.append("\n".join(lines + own[start:]))

    def _check_binding(self, statement: Any, where: str) -> None:
        scope, selector, field, value = statement[:4]
        needed = f"{selector}.{field}" not in self.unused
        self._used += [(ref, where, needed) for ref in _references(value)]
        if not field:  # a macro: NAME = value
            self._macros[selector] = (value, where)
            if selector in self.known or "." in selector:
                self.problems.append(f"{where}: {selector} needs a field: {selector}.FIELD = VALUE")
            return
        if selector not in self.known:
            hint = _near(selector, list(self.known))
            self.problems.append(f"{where}: unknown config {selector!r}{hint}")
            return
        hints = typing.get_type_hints(self.known[selector])
        if field not in hints:
            hint = _near(field, list(hints))
            self.problems.append(f"{where}: {selector} has no field {field!r}{hint}")
            return
        if not _fits(value, hints[field]):
            self.problems.append(
                f"{where}: {selector}.{field} = {value!r} must be {_spell(hints[field])}, "
                f"not {type(value).__name__}"
            )
        self._bound[scope, selector, field] = where

    def check_references(self) -> None:
        """Macros that nobody set, references to nothing, scopes that nothing refers to."""
        seen = set()
        for ref, where, needed in self._used:
            if not needed:
                continue
            if ref.is_macro and ref.name not in seen and ref.name != "gin.REQUIRED":
                seen.add(ref.name)
                value, place = self._macros.get(ref.name, (_Reference("gin.REQUIRED", True), where))
                if value == _Reference("gin.REQUIRED", True):
                    self.problems.append(
                        f"{place}: macro {ref.name} must be set: --gin.{ref.name}=VALUE "
                        f"(strings quoted: --gin.{ref.name}='\"...\"')"
                    )
            elif not ref.is_macro and ref.name.rsplit("/", 1)[-1] not in self.known:
                hint = _near(ref.name, list(self.known))
                self.problems.append(f"{where}: unknown reference @{ref.name}{hint}")
        used_macros = {ref.name for ref, *_ in self._used if ref.is_macro}
        for name, (_, where) in self._macros.items():
            if name not in used_macros:
                hint = _near(name, sorted(used_macros))
                self.problems.append(f"{where}: macro {name} is set but nothing uses it{hint}")
        scopes = {ref.name.rsplit("/", 1)[0] for ref, *_ in self._used if "/" in ref.name}
        for (scope, cls, field), where in self._bound.items():
            if scope and scope not in scopes:
                self.problems.append(
                    f"{where}: {scope}/{cls}.{field} has no effect: "
                    f"nothing refers to @{scope}/{cls}()"
                )

    def referred(self) -> list[str]:
        """Names of all @references, each once, in the order of the files."""
        return list(dict.fromkeys(ref.name for ref, *_ in self._used if not ref.is_macro))

    def check_required(self, root: type) -> None:
        """Fields without a default that nothing binds, in `root` and the configs inside it."""
        bound = {(cls, field) for scope, cls, field in self._bound if not scope}
        todo, done = [root], set()
        while todo:
            cls = todo.pop()
            done.add(cls)
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                kind = hints[field.name]
                if isinstance(kind, type) and kind.__name__ in self.known:
                    if kind not in done:
                        todo.append(kind)
                elif (
                    field.default is dataclasses.MISSING
                    and field.default_factory is dataclasses.MISSING
                    and (cls.__name__, field.name) not in bound
                    and f"{cls.__name__}.{field.name}" not in self.unused
                ):
                    name = f"{cls.__name__}.{field.name}"
                    self.problems.append(
                        f"{name} is required: set it in a gin file or with --gin.{name}=VALUE"
                    )


def _references(value: Any) -> list[_Reference]:
    if isinstance(value, _Reference):
        return [value]
    if isinstance(value, dict):
        return [ref for pair in value.items() for item in pair for ref in _references(item)]
    if isinstance(value, (list, tuple)):
        return [ref for item in value for ref in _references(item)]
    return []


def _fits(value: Any, kind: Any) -> bool:
    """Whether a literal can be a field of this type; references are checked when they are built."""
    if isinstance(value, _Reference) or kind is Any:
        return True
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if origin is tuple and Ellipsis not in typing.get_args(kind):  # one type for each place
        items = typing.get_args(kind)
        same = isinstance(value, (tuple, list)) and len(value) == len(items)
        return same and all(map(_fits, value, items))
    if origin in (tuple, list):
        item = typing.get_args(kind)[0]
        return isinstance(value, (tuple, list)) and all(_fits(v, item) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _spell(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
