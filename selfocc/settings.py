"""Settings: what a field may hold, how it is read from text, and what is said of anything else.

A section of the configuration is a frozen dataclass whose annotations say what is allowed. It is
checked whenever one is made: by a preset, on the command line, from a checkpoint, in a test.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from selfocc import InputError


@dataclass(frozen=True)
class Range:
    """Numbers of at least `least` (or above it) and at most `most`."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.most < math.inf and not self.above:
            return f" from {self.least} to {self.most}"
        least = f" above {self.least}" if self.above else f" of at least {self.least}"
        return least + (f" and at most {self.most}" if self.most < math.inf else "")


UNIONS = types.UnionType, typing.Union
Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


class Section:
    """Base of a section: `class DataConfig(Section, name="data")`, a frozen dataclass.

    Raises InputError for a field that holds what its annotation does not allow.
    """

    def __init_subclass__(cls, name: str):
        cls.section = name

    def __post_init__(self):
        for name, kind in kinds(type(self)).items():
            value = getattr(self, name)
            if not allows(kind, value):
                shown = value if isinstance(value, str) else text(value)
                raise InputError(
                    f"{self.section}.{name} is {shown}; expected {describe(kind)}"
                    f"{nearest(str(value), words(kind))}"
                )


@functools.cache
def kinds(section: type) -> dict[str, object]:
    """The annotation of every field."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def allows(kind, value) -> bool:
    """Whether a value is of the annotated kind. No float may be infinite or NaN."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(allows(option, value) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is Annotated:
        return allows(options[0], value) and value in options[1]
    if origin is tuple:
        pairs = zip(options, value, strict=True) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and len(value) == len(options) and all(
            allows(option, part) for option, part in pairs
        )  # fmt: skip
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def describe(kind) -> str:
    """What is allowed, in words."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return " or ".join(describe(option) for option in options)
    if origin is Literal:
        return " | ".join(map(str, options))
    if origin is Annotated:
        return f"{describe(options[0])}{options[1]}"
    if origin is tuple:
        each = " or ".join(dict.fromkeys(map(describe, options)))
        return f"{len(options)} numbers separated by commas, each {each}"
    return {
        int: "a whole number", float: "a number", bool: "true | false", str: "text",
        types.NoneType: "none",
    }[kind]  # fmt: skip


def words(kind) -> Iterable[str]:
    """The words among which one is chosen, if any."""
    return map(str, typing.get_args(kind)) if typing.get_origin(kind) is Literal else ()


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def text(value) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def change(config, overrides: Iterable[str]):
    """A dataclass of sections with fields changed as `section.field=value` strings say, together.

    Raises InputError for an unknown section or field, or for a value that is not allowed.
    """
    changes: dict[str, dict] = {}
    sections = {f.name: f.type for f in dataclasses.fields(config) if f.type is not str}
    for override in overrides:
        path, equals, value = override.partition("=")
        section, dot, name = (part.strip() for part in path.partition("."))
        if not equals or not dot:
            raise InputError(
                f"--set {override}: expected section.field=value, for example optim.steps=500"
            )
        if section not in sections:
            known = [f"{s}.{name}" for s, kind in sections.items() for name in kinds(kind)]
            raise InputError(
                f"--set {override}: there is no section {section!r}{nearest(path, known)}"
            )
        fields = kinds(sections[section])
        if name not in fields:
            raise InputError(
                f"--set {override}: {section} has no field {name!r}{nearest(name, fields)}"
            )
        try:
            changes.setdefault(section, {})[name] = parse(fields[name], value.strip())
        except ValueError:
            raise InputError(
                f"--set {override}: expected {describe(fields[name])}"
                f"{nearest(value, words(fields[name]))}"
            ) from None
    return dataclasses.replace(
        config,
        **{s: dataclasses.replace(getattr(config, s), **values) for s, values in changes.items()},
    )


def parse(kind, word: str):
    """A value of the annotated kind; tuples are comma separated, optional fields take `none`.

    Raises ValueError where the text is none.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        if word.lower() == "none" and types.NoneType in options:
            return None
        return parse(next(option for option in options if option is not types.NoneType), word)
    if origin is Literal:
        return {str(option): option for option in options}.get(word, word)
    if origin is Annotated:
        return parse(options[0], word)
    if origin is tuple:
        parts = word.strip("()[] ").split(",")
        return tuple(parse(o, part.strip()) for o, part in zip(options, parts, strict=True))
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if word.lower() not in known:
            raise ValueError
        return known[word.lower()]
    return kind(word)
