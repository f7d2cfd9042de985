"""What pydantic finds wrong with a recipe, in words for people, with the line of the file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping

import pydantic
from pydantic import BaseModel

from ..core.errors import did_you_mean

Path = tuple[str, ...]
Lines = Mapping[Path, int | None]
SectionOf = Callable[[Path], type[BaseModel] | None]
SHORT = {"model": "name", "method": "name", "data": "train"}
"""The key that a section's name alone stands for."""


def where(path: Path, source: str, lines: Lines) -> str:
    """How an error about a key begins: with file and line where the file says it."""
    known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    line = lines[known] if known is not None else None
    if line is not None:
        return f"{source}, line {line}: "
    return f"{source}: " if source and known is None else ""


# What pydantic finds, in other words.
WORDS = {
    "dict_type": "hold keys and values", "model_type": "hold keys and values", "list_type": "be a list: [a, b]",
    "int_parsing": "be a whole number", "int_type": "be a whole number", "int_from_float": "be a whole number",
    "float_parsing": "be a number", "float_type": "be a number", "bool_parsing": "be true or false", "bool_type": "be true or false",
    "string_type": "be text",
}  # fmt: skip


def explain(error: pydantic.ValidationError, source: str, lines: Lines, section_of: SectionOf) -> Iterator[str]:
    """Pydantic's findings, one line each, for people.

    Args:
        error: What pydantic found.
        source: The file, or nothing.
        lines: Line of each key by its path; ``None`` for what the command line says.
        section_of: Gives the class of the section at a path.
    """
    findings = {tuple(str(part) for part in f["loc"]): f for f in reversed(error.errors())}
    misspelt = {
        (*path[:-1], meant)
        for path, finding in findings.items()
        if finding["type"] == "extra_forbidden"
        for meant in _closest(path, section_of(path[:-1]))
    }
    said: set[tuple[str, ...]] = set()
    for path, finding in reversed(findings.items()):
        if path[:2] == ("data", "columns") and len(path) > 3:
            path = path[:3]  # the choices of a union: one line is enough
        if path in said or (finding["type"] == "missing" and path in misspelt):
            continue
        said.add(path)
        place, name = where(path, source, lines), ".".join(path)
        match finding["type"]:
            case "extra_forbidden":
                section = section_of(path[:-1])
                known = list(section.model_fields) if section else []
                inside = f" in {'.'.join(path[:-1])}" if path[:-1] else ""
                hint = did_you_mean(path[-1], known) or f"; known are {', '.join(known)}."
                yield f"{place}unknown key {path[-1]!r}{inside}{hint}"
            case "missing":
                yield f"{place}{name} is missing. {_description(path, section_of)}"
            case "literal_error":
                choices = finding["ctx"]["expected"].replace("'", "")
                hint = did_you_mean(str(finding["input"]), choices.replace(" or ", ", ").split(", "))
                yield f"{place}{name} is {finding['input']!r}{hint}; it should be {choices}."
            case "value_error":
                yield f"{place}{f'{name}: ' if name else ''}{finding['ctx']['error']}."
            case kind if kind in WORDS:
                yield f"{place}{name} is {finding['input']!r}; it should {WORDS[kind]}."
            case _:
                yield f"{place}{name} is {finding['input']!r}; {_lower(finding['msg'])}."


def _closest(path: Path, section: type[BaseModel] | None) -> list[str]:
    """Keys that a misspelt one may stand for."""
    return difflib.get_close_matches(path[-1], list(section.model_fields)) if section else []


def _description(path: Path, section_of: SectionOf) -> str:
    section = section_of(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    if path[-1] in SHORT and (short := section_of(path[-1:])) is not None:
        field = short.model_fields[SHORT[path[-1]]]
    text = field.description if field is not None else None
    return f"Give a {text}." if text else f"Add it: {path[-1]}: …"


def _lower(message: str) -> str:
    return (message[:1].lower() + message[1:]).replace("input should", "it should")
