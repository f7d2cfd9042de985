"""From sources to splits: columns mapped to roles, rows checked, splits drawn by the seed and stratified by label."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import did_you_mean
from .errors import RecipeError, blame
from .recipe import DataSection
from .sources import SPLITS, Row, Table, read_source

# Columns that a role is usually called by, the commonest first.
USUAL = {
    "text": (
        "text",
        "sentence",
        "review",
        "content",
        "comment",
        "tweet",
        "body",
        "premise",
        "sentence1",
        "question1",
        "document",
    ),
    "text_pair": ("text_pair", "hypothesis", "sentence2", "question2", "text2"),
    "label": (
        "label",
        "labels",
        "class",
        "category",
        "sentiment",
        "target",
        "stars",
        "rating",
        "score",
        "intent",
        "topic",
    ),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels", "entities", "pos_tags"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "response": ("response", "completion", "output", "answer"),
    "source": ("source", "src", "document", "article", "text", "input", "dialogue"),
    "target": ("target", "tgt", "summary", "highlights", "output", "translation"),
    "id": ("id",),
}


# Columns that belong together as a text and its pair, and those that make a prompt together.
PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"), ("question", "passage"),
    ("text1", "text2"),
)  # fmt: skip
PROMPTS = (("instruction", "input"), ("instruction", "context"))


@dataclass
class Splits:
    """Rows by role, ready for a task.

    Args:
        train: To train on.
        validation: To choose by; empty where the recipe wants none.
        test: To measure on; empty where the recipe wants none.
        pool: All rows of the training source, also those drawn for the other splits or left out: what labels there are.
        label_names: Names of the labels, where the source or the recipe gives them.
        notes: What was found and decided, for the user to read.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    pool: list[Row]
    label_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Roles:
    """Which roles a task reads.

    Args:
        choices: Sets of roles; the first whose columns are all there is taken.
        optional: Roles taken where they are there.
        label: The role that labels are in, if any.
        key: Rows alike in these roles count as the same row.
    """

    choices: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    label: str | None = None

    @property
    def all(self) -> set[str]:
        return {role for choice in self.choices for role in choice} | set(self.optional)


def load_splits(
    section: DataSection, roles: Roles, seed: int, group: Callable[[Row], Hashable], check: Callable[[Row], str | None]
) -> Splits:
    """Read the sources, map columns, set bad rows aside, and make the splits.

    Args:
        section: The recipe's data section.
        roles: What the task reads.
        seed: Of the draws.
        group: Label of a row, for stratifying.
        check: Tells what is wrong with a row, if anything.

    Raises:
        RecipeError: A source or a column is missing, or a split is empty.
    """
    tables, notes = _tables(section), []
    columns = find_columns(tables["train"], section.columns, roles)
    guessed = {r: " and ".join(c) if isinstance(c, list) else c for r, c in columns.items() if r not in section.columns}
    if guessed:
        notes.append(f"Columns taken: {', '.join(f'{c} as {r}' if c != r else str(c) for r, c in guessed.items())}.")
    splits: dict[str, list[Row]] = {}
    for split, table in tables.items():
        try:
            splits[split] = _mapped(table, columns, check, notes)
        except RecipeError as error:
            if split == "train" or getattr(section, split) is not None:
                raise
            # Contests keep the labels of their test rows to themselves.
            notes.append(f"The source's {split} rows are left out, and others drawn in their place: {error}")
    _without_repeats(splits, roles, notes)

    rng = random.Random(seed)
    rest = pool = splits["train"]
    if "test" not in splits and (size := section.test_rows or section.test_size):
        splits["test"], rest = draw(rest, _count(size, len(pool), rest), group, rng)
    if "validation" not in splits and (size := section.validation_rows or section.validation_size):
        splits["validation"], rest = draw(rest, _count(size, len(pool), rest), group, rng)
    splits["train"] = rest
    for split in ("train", "validation", "test"):
        rows, limit = splits.get(split, []), getattr(section, f"{split}_rows")
        if limit is not None and limit > len(rows):
            raise RecipeError(
                f"data.{split}_rows asks for {limit:,} rows, but {len(rows):,} are there. Ask for fewer, or leave it out.",
                f"data.{split}_rows",
            )
        splits[split], _ = draw(rows, limit if limit is not None else len(rows), group, rng)
    if not splits["train"]:
        raise RecipeError(
            "No rows are left to train on. Lower data.validation_size and data.test_size, or give more data."
        )
    label_column = columns.get(roles.label or "")
    names = tables["train"].label_names.get(label_column) if isinstance(label_column, str) else None
    notes.append("Rows: " + ", ".join(f"{len(splits[s]):,} {s}" for s in ("train", "validation", "test")) + ".")
    return Splits(splits["train"], splits["validation"], splits["test"], pool, section.labels or names, notes)


def load_rows(
    source: Any, section: DataSection, roles: Roles, check: Callable[[Row], str | None]
) -> tuple[list[Row], list[str]]:
    """Rows of a source for evaluation: its test split, else its validation split, else what it has."""
    tables, notes = read_source(source, section.name), list[str]()
    split = next((s for s in ("test", "validation") if s in tables), next(iter(tables)))
    rows = _mapped(tables[split], find_columns(tables[split], section.columns, roles), check, notes)
    return rows, notes


def _tables(section: DataSection) -> dict[str, Table]:
    with blame("data.train"):
        found = read_source(section.train, section.name)
    tables: dict[str, Table] = {s: found[s] for s in ("train", "validation", "test") if s in found}
    if "train" not in tables:
        raise RecipeError(f"{section.train!r} has no split 'train'; it has {', '.join(found)}.")
    for split in ("validation", "test"):
        asked = getattr(section, split)
        if asked is None:
            continue
        if isinstance(asked, str) and asked in found:
            tables[split] = found[asked]
        else:
            with blame(f"data.{split}"):
                if isinstance(asked, str) and asked in SPLITS:
                    raise RecipeError(
                        f"data.{split} is {asked!r}, but {section.train!r} has no such split; it has {', '.join(found)}."
                    )
                source = read_source(asked, section.name)
            tables[split] = source.get(split) or next(iter(source.values()))
    return tables


def find_columns(table: Table, given: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """Which column plays which role.

    Args:
        table: The rows.
        given: The recipe's mapping.
        roles: What the task reads.

    Raises:
        RecipeError: A column is not there, or no column plays a role that is needed.
    """
    there = table.columns
    for role, column in given.items():
        if role not in roles.all:
            raise RecipeError(
                f"data.columns.{role} has no meaning for this task; its roles are {', '.join(sorted(roles.all))}.",
                f"data.columns.{role}",
            )
        for name in [column] if isinstance(column, str) else column:
            if name not in there:
                hint = did_you_mean(name, there) or f"; its columns are {', '.join(there)}."
                raise RecipeError(
                    f"data.columns.{role}: {table.origin} has no column {name!r}{hint}", f"data.columns.{role}"
                )
    lower = {name.lower(): name for name in there}
    given = given | _together(lower, given, roles)

    def column_of(role: str, taken: set[str]) -> Any:
        if role in given:
            return given[role]
        return next((lower[c] for c in USUAL[role] if c in lower and lower[c] not in taken), None)

    for choice in roles.choices:
        found: dict[str, Any] = {}
        for role in choice:
            found[role] = column_of(role, {c for c in found.values() if isinstance(c, str)})
        if all(column is not None for column in found.values()):
            break
    else:
        choice = roles.choices[0]
        first = next(role for role in choice if column_of(role, set()) is None)
        raise RecipeError(
            f"{table.origin} has no column for {first!r}; its columns are {', '.join(there)}. Say which: data.columns.{first}=COLUMN."
        )
    for role in roles.optional:
        column = column_of(role, {c for c in found.values() if isinstance(c, str)})
        if column is not None:
            found[role] = column
    return found


def _together(lower: dict[str, str], given: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """Roles of columns that belong together, where the recipe says nothing of either."""
    if "text_pair" in roles.optional and not {"text", "text_pair"} & given.keys():
        for one, other in PAIRS:
            if one in lower and other in lower:
                return {"text": lower[one], "text_pair": lower[other]}
    if "prompt" in roles.all and "messages" not in lower and not {"prompt", "text", "messages"} & given.keys():
        for columns in PROMPTS:
            if "prompt" not in lower and all(c in lower for c in columns):
                return {"prompt": [lower[c] for c in columns]}
    return {}


def _mapped(table: Table, columns: dict[str, Any], check: Callable[[Row], str | None], notes: list[str]) -> list[Row]:
    rows, problems = [], list(table.problems)
    for number, source in enumerate(table.rows, 1):
        row = {role: _cell(source, column, table.label_names) for role, column in columns.items()}
        wrong = check(row)
        if wrong is None:
            rows.append(row)
        else:
            problems.append(f"row {number}: {wrong}")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        if not rows:
            raise RecipeError(f"No row of {table.origin} can be used: {shown}.")
        total = len(table.problems) + len(table.rows)
        notes.append(f"Left out: {len(problems):,} of {total:,} rows of {table.origin} cannot be used ({shown}).")
    return rows


def _cell(row: Row, column: Any, label_names: dict[str, list[str]]) -> Any:
    """A row's value for a column or several; numbers that stand for names of labels become these."""
    if not isinstance(column, str):
        return {name: _cell(row, name, label_names) for name in column}
    value = row.get(column)
    if value is None and "." in column:  # a field inside a column, such as translation.en
        outer, _, inner = column.partition(".")
        value = row[outer].get(inner) if isinstance(row.get(outer), dict) else None
    names = label_names.get(column)
    if names is None:
        return value
    return [_named(v, names) for v in value] if isinstance(value, list) else _named(value, names)


def _named(value: Any, names: list[str]) -> Any:
    is_index = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if is_index else value


def _without_repeats(splits: dict[str, list[Row]], roles: Roles, notes: list[str]) -> None:
    """Rows with the same input stand once, in the split that comes first among test, validation and training."""
    seen: set[str] = set()
    repeats = 0
    for split in ("test", "validation", "train"):
        kept = []
        for row in splits.get(split, ()):
            key = repr([row[role] for role in sorted(row) if role not in ("id", roles.label)])
            if key not in seen:
                seen.add(key)
                kept.append(row)
        if split in splits:
            repeats += len(splits[split]) - len(kept)
            splits[split] = kept
    if repeats:
        notes.append(f"{repeats:,} repeated rows were taken out, so that no input is in two splits.")


def _count(size: float, whole: int, rows: Sequence[Row]) -> int:
    """Rows to hold back: a share of the whole, or a number."""
    if size < 1:
        return min(max(1, round(size * whole)), len(rows))
    if size >= len(rows):
        raise RecipeError(f"{int(size):,} rows are to be held back, but only {len(rows):,} are there. Hold back fewer.")
    return int(size)


def draw(
    rows: list[Row], count: int, group: Callable[[Row], Hashable], rng: random.Random
) -> tuple[list[Row], list[Row]]:
    """Draw rows at random, each group in its share (largest remainders).

    Args:
        rows: To draw from.
        count: How many.
        group: A row's group.
        rng: The source of chance.

    Returns:
        Those drawn, in random order, and the rest.
    """
    by_group: dict[Hashable, list[int]] = defaultdict(list)
    order = list(range(len(rows)))
    rng.shuffle(order)
    for index in order:
        by_group[group(rows[index])].append(index)
    share = count / max(1, len(rows))
    wanted = {g: int(share * len(members)) for g, members in by_group.items()}
    short = count - sum(wanted.values())
    by_remainder = sorted(by_group, key=lambda g: (wanted[g] - share * len(by_group[g]), str(g)))
    for g in by_remainder[:short]:
        wanted[g] += 1
    drawn = {i for g, members in by_group.items() for i in members[: wanted[g]]}
    return [rows[i] for i in order if i in drawn], [rows[i] for i in order if i not in drawn]
