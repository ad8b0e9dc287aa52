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
from collections.abc import Iterable, Iterator
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
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
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
                said = f"{self.section}.{name} is {text(value)}"
                raise InputError(f"{said}; {expected(kind, str(value))}")


@functools.cache
def kinds(section: type) -> dict[str, object]:
    """The annotation of every field."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def entries(config) -> Iterator[tuple[str, object, object]]:
    """Of a dataclass of sections every setting: `section.field`, its value, what it may be."""
    for section in dataclasses.fields(config):
        if section.type is not str:
            values = getattr(config, section.name)
            for name, kind in kinds(section.type).items():
                yield f"{section.name}.{name}", getattr(values, name), kind


def allows(kind, value) -> bool:
    """Whether a value is what it would be read as from text."""
    try:
        return parse(kind, text(value, digits="")) == value
    except ValueError:
        return False


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


def expected(kind, word: str) -> str:
    """What is said where `word` is given instead of what is allowed."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return f"expected {describe(kind)}{nearest(word, map(str, choices))}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def text(value, digits: str = "g") -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(text(part, digits) for part in value)
    if isinstance(value, float):
        return f"{value:{digits}}"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def change(config, overrides: Iterable[str]):
    """A dataclass of sections with fields changed as `section.field=value` strings say, together.

    Raises InputError for an unknown section or field, or for a value that is not allowed.
    """
    changes: dict[str, dict] = {}
    sections = {f.name: kinds(f.type) for f in dataclasses.fields(config) if f.type is not str}
    for override in overrides:
        path, equals, value = override.partition("=")
        section, dot, name = (part.strip() for part in path.partition("."))
        fields = sections.get(section, {})
        if not equals or not dot:
            problem = "expected section.field=value, for example optim.steps=500"
        elif not fields:
            known = (setting for setting, *_ in entries(config))
            problem = f"there is no section {section!r}{nearest(path, known)}"
        elif name not in fields:
            problem = f"{section} has no field {name!r}{nearest(name, fields)}"
        else:
            try:
                changes.setdefault(section, {})[name] = parse(fields[name], value.strip())
                continue
            except ValueError:
                problem = expected(fields[name], value)
        raise InputError(f"--set {override}: {problem}")
    return dataclasses.replace(
        config,
        **{s: dataclasses.replace(getattr(config, s), **values) for s, values in changes.items()},
    )


def parse(kind, word: str):
    """A value of the annotated kind; tuples are comma separated, optional fields take `none`.

    Raises ValueError where the text is none. No float may be infinite or NaN.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        if word.lower() == "none" and types.NoneType in options:
            return None
        return parse(next(option for option in options if option is not types.NoneType), word)
    if origin is Annotated:
        value = parse(options[0], word)
        if value not in options[1]:
            raise ValueError
        return value
    if origin is tuple:
        parts = word.strip("()[] ").split(",")
        return tuple(parse(o, part.strip()) for o, part in zip(options, parts, strict=True))
    if origin is Literal:
        known = {str(option): option for option in options}
    elif kind is bool:
        word, known = word.lower(), BOOLS
    elif kind is float and not math.isfinite(float(word)):
        raise ValueError
    else:
        return kind(word)
    if word not in known:
        raise ValueError
    return known[word]
