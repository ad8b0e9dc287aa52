"""Settings from the command line: `section.field=value`."""

import dataclasses
import difflib
import types
import typing
from dataclasses import replace

from selfocc import InputError


def change(config, override: str):
    """A dataclass of dataclasses with one field changed as `section.field=value` says.

    Raises InputError for an unknown section or field, or for a value of the wrong type.
    """
    path, equals, text = override.partition("=")
    section, dot, name = path.partition(".")
    if not equals or not dot:
        raise InputError(
            f"--set {override}: expected section.field=value, for example optim.steps=500"
        )
    sections = [f.name for f in dataclasses.fields(config) if f.name != "preset"]
    if section not in sections:
        known = [f"{s}.{f.name}" for s in sections for f in dataclasses.fields(getattr(config, s))]
        raise InputError(f"--set {override}: there is no section {section!r}{nearest(path, known)}")
    part = getattr(config, section)
    kinds = typing.get_type_hints(type(part))
    if name not in kinds:
        raise InputError(f"--set {override}: {section} has no field {name!r}{nearest(name, kinds)}")
    try:
        value = _parse(text.strip(), kinds[name])
    except ValueError as error:
        raise InputError(f"--set {override}: {error}") from None
    return replace(config, **{section: replace(part, **{name: value})})


def nearest(word: str, known) -> str:
    """`; did you mean ...?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parse(text: str, kind):
    """A value of the annotated type; tuples are comma separated, optional fields take `none`."""
    if isinstance(kind, types.UnionType):
        options = typing.get_args(kind)
        if text.lower() == "none" and types.NoneType in options:
            return None
        return _parse(text, next(option for option in options if option is not types.NoneType))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        parts = [part.strip() for part in text.strip("()[] ").split(",")]
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(parts)
        if len(parts) != len(kinds):
            raise ValueError(f"expected {len(kinds)} numbers separated by commas")
        return tuple(_parse(part, k) for part, k in zip(parts, kinds, strict=True))
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError("expected true or false")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {kind.__name__}, got {text!r}") from None
