"""Where rows come from: files, folders, the Hub, packages, a Python callable. Rows that cannot be read are kept count of."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import did_you_mean
from . import packaged
from .errors import RecipeError, need

Row = dict[str, Any]

SPLITS = {
    "train": ("train", "training", "train_sft"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing", "test_sft"),
}
# Names that people use, and where the data sets are today.
HUB_NAMES = {
    "imdb": ("stanfordnlp/imdb", None), "yelp": ("fancyzhx/yelp_polarity", None), "yelp_review_full": ("Yelp/yelp_review_full", None),
    "sst2": ("nyu-mll/glue", "sst2"), "sst-2": ("nyu-mll/glue", "sst2"), "cola": ("nyu-mll/glue", "cola"), "mrpc": ("nyu-mll/glue", "mrpc"),
    "rte": ("nyu-mll/glue", "rte"), "stsb": ("nyu-mll/glue", "stsb"), "tweet_eval": ("cardiffnlp/tweet_eval", "sentiment"),
    "ag_news": ("fancyzhx/ag_news", None), "conll2003": ("eriktks/conll2003", None), "squad": ("rajpurkar/squad", None),
    "squad_v2": ("rajpurkar/squad_v2", None), "xsum": ("EdinburghNLP/xsum", None), "alpaca": ("tatsu-lab/alpaca", None),
    "qqp": ("nyu-mll/glue", "qqp"), "qnli": ("nyu-mll/glue", "qnli"), "mnli": ("nyu-mll/glue", "mnli"),
    "emotion": ("dair-ai/emotion", None),
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", None), "dbpedia_14": ("fancyzhx/dbpedia_14", None),
    "go_emotions": ("google-research-datasets/go_emotions", "simplified"), "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
    "dolly": ("databricks/databricks-dolly-15k", None), "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}  # fmt: skip


@dataclass
class Table:
    """Rows of one split.

    Args:
        rows: The rows, columns by name.
        origin: Where they are from, for messages.
        problems: What could not be read, one line each.
        label_names: Names of labels by column, where the source knows them.
    """

    rows: list[Row]
    origin: str
    problems: list[str] = field(default_factory=list)
    label_names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first come; fields inside a column as ``column.field``."""
        names: dict[str, None] = {}
        for row in self.rows[:100]:
            for key, value in row.items():
                names[key] = None
                if isinstance(value, dict):
                    names.update(dict.fromkeys(f"{key}.{inner}" for inner in value))
        return list(names)


def read_source(source: Any, config: str | None = None) -> dict[str, Table]:
    """Read a source.

    Args:
        source: A file (CSV, TSV, JSON lines, JSON, Parquet, CoNLL), a folder, a Hub id, ``packaged:NAME``, ``module:function``,
            a callable, or rows.
        config: Configuration of a Hub data set.

    Returns:
        Tables by split: ``train`` alone where the source has no splits.

    Raises:
        RecipeError: It is not there, or nothing in it can be read.
    """
    if callable(source):
        return _from_callable(source)
    if not isinstance(source, (str, Path)):
        return {"train": Table(list(source), "the given rows")}
    name = str(source)
    if name.startswith(packaged.PREFIX):
        packaged.packaged_path(name, packaged.DATA)
        rows, names = packaged.SOURCES[name.removeprefix(packaged.PREFIX)]()
        return {"train": Table(rows, name, label_names=names)}
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": read_file(path)}
    if path.is_dir():
        return _read_folder(path)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return _from_callable(_import(name))
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"There is no file {name!r}{did_you_mean(path.name, beside) or '.'}")
    return _from_hub(name, config)


# -- files -------------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> Table:
    """Read one file, by its ending.

    Raises:
        RecipeError: Unknown ending, or no row can be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"{str(path)!r} has an ending that is not known; known are {', '.join(READERS)}.")
    table = Table([], path.name)
    try:
        for item in reader(path):
            if isinstance(item, str):
                table.problems.append(item)
            else:
                table.rows.append(item)
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
    if not table.rows:
        what = (
            f"none of its {len(table.problems)} rows can be read: {table.problems[0]}"
            if table.problems
            else "it is empty"
        )
        raise RecipeError(f"{str(path)!r} holds no data: {what}.")
    return table


def _delimited(delimiter: str | None) -> Callable[[Path], Iterator[Row | str]]:
    def read(path: Path) -> Iterator[Row | str]:
        csv.field_size_limit(sys.maxsize)
        with path.open(encoding="utf-8-sig", newline="") as file:
            sign = delimiter
            if sign is None:  # a .csv with semicolons is what some spreadsheets write
                head = file.readline()
                sign = ";" if head.count(";") > head.count(",") else ","
                file.seek(0)
            lines = csv.reader(file, delimiter=sign)
            header = next(lines, None)
            for fields in lines:
                if not fields:
                    continue
                if len(fields) != len(header or ()):
                    yield f"line {lines.line_num}: {len(fields)} fields, the header has {len(header or ())}"
                else:
                    yield dict(zip(header or (), fields, strict=True))

    return read


def _json_lines(path: Path) -> Iterator[Row | str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield f"line {number}: no valid JSON ({error.msg})"
                continue
            yield row if isinstance(row, dict) else f"line {number}: a {type(row).__name__}, not an object"


def _json(path: Path) -> Iterator[Row | str]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(path)  # many files of lines are called .json
        return
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    rows = values if isinstance(values, list) else [values]
    for number, row in enumerate(_flat_squad(rows), 1):
        yield row if isinstance(row, dict) else f"item {number}: a {type(row).__name__}, not an object"


def _flat_squad(rows: list[Any]) -> Iterator[Any]:
    """SQuAD's own files nest paragraphs and questions."""
    for row in rows:
        if not isinstance(row, dict) or "paragraphs" not in row:
            yield row
            continue
        for paragraph in row["paragraphs"]:
            for asked in paragraph["qas"]:
                yield {
                    "id": asked.get("id"), "question": asked["question"], "context": paragraph["context"], "answers": asked["answers"]
                }  # fmt: skip


def _parquet(path: Path) -> Iterator[Row | str]:
    need("pyarrow", "A Parquet file")
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        yield from parquet.read_table(path).to_pylist()
    except arrow.ArrowInvalid as error:
        raise RecipeError(f"{str(path)!r} is no valid Parquet file: {str(error).splitlines()[0]}") from None


def _conll(path: Path) -> Iterator[Row | str]:
    yield from packaged.read_conll(path.read_text(encoding="utf-8-sig"))


def _lines(path: Path) -> Iterator[Row | str]:
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            yield {"text": line}


READERS: dict[str, Callable[[Path], Iterable[Row | str]]] = {
    ".csv": _delimited(None), ".tsv": _delimited("\t"), ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".parquet": _parquet,
    ".conll": _conll, ".iob2": _conll, ".bio": _conll, ".txt": _lines,
}  # fmt: skip


def _read_folder(path: Path) -> dict[str, Table]:
    """Files named after splits, or a folder of texts for each label (with or without a folder for each split above)."""
    found: dict[str, Table] = {}
    for split, names in SPLITS.items():
        for entry in sorted(path.iterdir()):
            if (
                entry.is_file()
                and entry.suffix.lower() in READERS
                and re.split(r"[-_.]", entry.stem)[0].lower() in names
            ):
                part = read_file(entry)
                if split in found:
                    found[split].rows += part.rows
                    found[split].problems += part.problems
                else:
                    found[split] = part
            elif entry.is_dir() and entry.name.lower() in names and (texts := _texts_by_label(entry)):
                found[split] = texts
    if not found and (texts := _texts_by_label(path)):
        found["train"] = texts
    if "train" not in found:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise RecipeError(
            f"The folder {str(path)!r} holds no training data: it needs a file named train with one of {', '.join(READERS)}, or a "
            f"folder of .txt files for each label. Found: {inside}."
        )
    return found


def _texts_by_label(path: Path) -> Table | None:
    rows = [
        {"text": file.read_text(encoding="utf-8"), "label": folder.name}
        for folder in sorted(p for p in path.iterdir() if p.is_dir())
        for file in sorted(folder.glob("*.txt"))
    ]
    return Table(rows, f"{path.name}/") if rows else None


# -- Python and the Hub ------------------------------------------------------------------------------------------------


def _import(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"The data {name!r} cannot be imported: {error}.") from None
    finally:
        sys.path.remove("")


def _from_callable(function: Callable[[], Any]) -> dict[str, Table]:
    name = f"{getattr(function, '__name__', 'the callable')}()"
    result = function()
    splits = result if isinstance(result, dict) else {"train": result}
    return {split: Table(list(rows), name) for split, rows in splits.items()}


def _from_hub(name: str, config: str | None) -> dict[str, Table]:
    need("datasets", f"The data set {name!r} of the Hub")
    import datasets

    known, known_config = HUB_NAMES.get(name, (name, None))
    try:
        loaded = datasets.load_dataset(known, config or known_config)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"{name!r} is no file or folder here, and as a data set of the Hub it cannot be loaded: {reason.rstrip('.')}. "
            f"Packaged data: {', '.join(packaged.PREFIX + n for n in packaged.DATA)}."
        ) from None
    return {_split_name(split): _hub_table(rows, f"{known}, {split}") for split, rows in loaded.items()}


def _split_name(name: Any) -> str:
    return next((split for split, names in SPLITS.items() if str(name) in names), str(name))


def _hub_table(rows: Any, origin: str) -> Table:
    names = {}
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        if getattr(inner, "names", None):
            names[column] = list(inner.names)
    return Table(list(rows), origin, label_names=names)
