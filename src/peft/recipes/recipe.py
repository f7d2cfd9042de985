"""The recipe: what a training run is told, checked before anything is loaded, with errors that point at the line."""

from __future__ import annotations

import contextlib
import os
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import RecipeError, need

need("pydantic", "A recipe")

import pydantic  # noqa: E402
import yaml  # noqa: E402
from pydantic import (  # noqa: E402
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_serializer,
    field_validator,
    model_validator,
)

from ..core.errors import did_you_mean  # noqa: E402
from .explaining import SHORT, explain, where  # noqa: E402

TaskName = Literal[
    "sequence-classification", "token-classification", "question-answering", "causal-lm", "seq2seq",
]  # fmt: skip
TASKS: tuple[str, ...] = TaskName.__args__  # type: ignore[attr-defined]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: Any) -> Any:
        """``epochs: yes`` is a slip, and pydantic would take it for 1."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"it is {str(value).lower()}; it should be a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows."""
    return (
        set(typing.get_args(annotation))
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else {annotation}
    )


class ModelSection(Section):
    """Which model is adapted."""

    name: str = Field(description="Hub id, folder, .gguf file, or packaged:minilm / packaged:smollm2")
    revision: str | None = Field(None, description="revision on the Hub")
    tokenizer: str | None = Field(None, description="another tokenizer than the model's")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="type of the frozen weights"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="fields of the model's configuration to change")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class MethodSection(BaseModel):
    """How it is adapted; every further key is a field of the method's configuration."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    name: str = Field("lora", description="`peft methods` lists them; full: every weight; head: the new head alone")

    @property
    def options(self) -> dict[str, Any]:
        """Fields of the method's configuration that the recipe sets."""
        return dict(self.model_extra or {})


class DataSection(Section):
    """What it learns from."""

    train: Any = Field(description="file, folder, Hub id, packaged:imdb / packaged:ner, or module:function")
    validation: Any = Field(None, description="the same, or the name of a split; not given: taken from train")
    test: Any = Field(
        None, description="the same, or the name of a split; not given: the source's own, or taken from train"
    )
    name: str | None = Field(None, description="configuration of a Hub data set, such as sst2 of nyu-mll/glue")
    columns: dict[str, str | list[str]] = Field(
        default_factory=dict, description="role: column; not given: guessed and said"
    )
    labels: list[str] | None = Field(None, description="names of the labels, in the order of their numbers")
    validation_size: float = Field(0.1, ge=0, description="share (below 1) or number of rows held back for validation")
    test_size: float = Field(0.1, ge=0, description="the same for the test, where the source has none")
    train_rows: int | None = Field(None, ge=1, description="use so many rows, drawn by the seed")
    validation_rows: int | None = Field(None, ge=1)
    test_rows: int | None = Field(None, ge=1)
    max_length: int | None = Field(
        None, ge=2, description="tokens kept of an input; not given: what the model can take, up to 512"
    )
    max_target_length: int = Field(128, ge=2, description="tokens kept of a target (seq2seq)")
    stride: int = Field(64, ge=0, description="tokens that windows over a long context share (question-answering)")
    kind: Literal["auto", "single", "multi-label", "regression"] = Field(
        "auto", description="what the label column holds (sequence-classification)"
    )
    packing: bool = Field(False, description="fill each row up with several texts (causal-lm)")
    prompt_template: str | None = Field(
        None, description="Python format string for rows without a chat template (causal-lm)"
    )
    prefix: str = Field("", description="put before each input, for example 'summarize: ' (seq2seq)")

    @field_serializer("train", "validation", "test", when_used="json")
    def _named(self, source: Any) -> Any:
        """Rows and callables are no part of a file: their place is kept."""
        if source is None or isinstance(source, str):
            return source
        return getattr(source, "__name__", None) or (
            str(source) if isinstance(source, os.PathLike) else "<rows given in Python>"
        )

    @field_validator("columns")
    @classmethod
    def _known_roles(cls, columns: dict[str, Any]) -> dict[str, Any]:
        roles = (
            "text", "text_pair", "label", "tokens", "tags", "question", "context", "answers", "prompt", "response", "messages",
            "source", "target", "id",
        )  # fmt: skip
        for role in columns:
            if role not in roles:
                raise ValueError(f"unknown role {role!r}{did_you_mean(role, roles)}; roles are {', '.join(roles)}")
        return columns


class TrainingSection(Section):
    """How it learns."""

    epochs: float = Field(3, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps, whatever the epochs")
    batch_size: int = Field(8, ge=1)
    eval_batch_size: int = Field(32, ge=1)
    gradient_accumulation: int = Field(1, ge=1, description="batches for one step")
    learning_rate: float | None = Field(
        None, gt=0, description="not given: by method and task, `peft methods` shows the table"
    )
    lora_plus_ratio: float | None = Field(None, gt=0, description="learn B so many times faster than A (LoRA+)")
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, description="share of the steps (below 1), or their number")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    length_grouping: bool = Field(True, description="batches of inputs of like length: less padding")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; not given: once an epoch")
    early_stopping: int | None = Field(None, ge=1, description="stop after so many evaluations without gain")
    keep_best: bool = Field(True, description="keep the weights of the best evaluation, not the last")
    checkpoints: int = Field(2, ge=1, description="checkpoints kept while training; they are removed at the end")
    keep_checkpoints: bool = False
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; not given: at each evaluation")
    report_to: list[str] = Field(default_factory=list, description="tensorboard, wandb, mlflow, trackio …")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of transformers' TrainingArguments"
    )


class GenerationSection(Section):
    """How text is generated, where the task does that."""

    max_new_tokens: int = Field(64, ge=1)
    num_beams: int = Field(1, ge=1)
    do_sample: bool = False
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


class TaskEntry(Section):
    """One of several tasks on one base: what differs from the recipe around it."""

    task: TaskName
    data: DataSection
    method: MethodSection | None = None
    training: TrainingSection | None = None


class Recipe(Section):
    """A training run: task, model, method, data, training.

    Args:
        task: The task; left out where ``tasks`` is given.
        model: The model, or its name alone.
        method: The method, or its name alone.
        data: The data, or the name of the source alone.
        training: How it learns.
        generation: How it generates text.
        tasks: Several tasks on one base, by adapter name.
        shared: One adapter that all ``tasks`` train together, with a head for each.
        examples: Inputs to answer when training has ended.
        out: Folder of the result.
        seed: Of the splits, the order, the new weights.
    """

    task: TaskName | None = None
    model: ModelSection
    method: MethodSection = Field(default_factory=lambda: MethodSection(name="lora"))
    data: DataSection | None = None
    training: TrainingSection = Field(default_factory=lambda: TrainingSection())
    generation: GenerationSection = Field(default_factory=lambda: GenerationSection())
    tasks: dict[str, TaskEntry] = Field(default_factory=dict)
    shared: bool = Field(False, description="all `tasks` train one adapter together, with a head for each")
    examples: list[str] = Field(
        default_factory=list, description="texts to answer when training has ended (JSON objects for several columns)"
    )
    out: str = Field(
        "runs/{task}-{method}", description="folder of the result; {task}, {method} and {seed} are filled in"
    )
    seed: int = 0
    _source: str = PrivateAttr("")
    _lines: dict[tuple[str, ...], int | None] = PrivateAttr(default_factory=dict)

    @field_validator("tasks")
    @classmethod
    def _names_of_adapters(cls, tasks: dict[str, TaskEntry]) -> dict[str, TaskEntry]:
        for name in tasks:
            if not name or any(sign in name for sign in "./\\,="):
                raise ValueError(f"{name!r} cannot be the name of an adapter: leave out '.', '/', '\\\\', ',' and '='")
        return tasks

    @model_validator(mode="after")
    def _one_or_several(self) -> Recipe:
        if self.tasks:
            if self.task or self.data:
                raise ValueError("give either `task` and `data`, or `tasks` with one entry for each task")
            own = [
                f"tasks.{n}.{key}" for n, t in self.tasks.items() for key in ("method", "training") if getattr(t, key)
            ]
            if self.shared and own:
                raise ValueError(f"`shared` tasks train together, with one method: {own[0]} belongs beside `tasks`")
        elif self.shared:
            raise ValueError("`shared` is for several `tasks`")
        elif self.task is None:
            raise ValueError(f"task is missing. Give one of {', '.join(TASKS)}")
        elif self.data is None:
            raise ValueError(f"data is missing. Give a {DataSection.model_fields['train'].description}")
        return self

    def __eq__(self, other: object) -> bool:
        """Whether it says the same; where it was read does not count."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def where(self, key: str) -> str:
        """The line of a key, or of the section around it, as errors begin: empty for what no file says."""
        return where(tuple(key.split(".")), self._source, self._lines)

    @contextlib.contextmanager
    def pointing(self) -> Iterator[None]:
        """Within this context errors that name a key get its line."""
        try:
            yield
        except RecipeError as error:
            where = self.where(error.key) if error.key else ""
            if not where:
                raise
            raise RecipeError(f"{where}{error}") from None

    def entry(self, name: str) -> Recipe:
        """The recipe of one of several tasks."""
        own = self.tasks[name]
        one = Recipe(
            task=own.task, model=self.model, method=own.method or self.method, data=own.data, seed=self.seed,
            training=own.training or self.training, generation=self.generation, examples=self.examples,
            out=str(self.folder / name),
        )  # fmt: skip
        one._source = self._source
        one._lines = self._lines | {path[2:]: n for path, n in self._lines.items() if path[:2] == ("tasks", name)}
        return one

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        task = self.task or "+".join(self.tasks)
        return Path(
            self.out.replace("{task}", task).replace("{method}", self.method.name).replace("{seed}", str(self.seed))
        )

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data, without what was left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)

    def to_yaml(self) -> str:
        """The recipe as a file."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection, "method": MethodSection, "data": DataSection, "training": TrainingSection, "generation": GenerationSection,
}  # fmt: skip


def make_recipe(
    values: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "", lines: Any = None
) -> Recipe:
    """Check plain data and make a recipe of it.

    Args:
        values: What the file holds.
        overrides: ``key=value``; a key is a path (``training.epochs``), or its last part where that is unique.
        source: The file, named in errors.
        lines: Line numbers by path, from :func:`read_recipe`.

    Raises:
        RecipeError: Unknown or misspelt keys, missing or impossible values.
    """
    if not isinstance(values, dict):
        what = source or "A recipe"
        raise RecipeError(f"{what} should hold keys and values (task: …), found a {type(values).__name__}.")
    values, lines = _spelt_out(values), dict(lines or {})
    for item in overrides:
        path, value = _override(item, values)
        if path == ("method", "name") and (values.get("method") or {}).get("name") not in (None, value):
            values["method"] = {}  # the options were the other method's
        _set(values, path, value)
        lines[path] = None  # what the command line says stands on no line
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise RecipeError("\n".join(explain(error, source, lines, _section))) from None
    recipe._source, recipe._lines = source, lines
    return recipe


def read_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: No such file, no valid YAML, or what :func:`make_recipe` finds.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) or ". `peft init` writes one"
        raise RecipeError(f"There is no recipe {str(path)!r}{hint}.")
    try:
        node = yaml.compose(text := path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{path}{where}: no valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if values is None:
        raise RecipeError(f"The recipe {str(path)!r} is empty. `peft init` writes one.")
    lines = dict(_positions(node, (), str(path)))
    return make_recipe(values, overrides, source=str(path), lines=lines)


def as_recipe(recipe: Any, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a recipe, a dictionary or a path."""
    if isinstance(recipe, Recipe):
        return make_recipe(recipe.model_dump(exclude_unset=True), overrides) if overrides else recipe
    return make_recipe(recipe, overrides) if isinstance(recipe, dict) else read_recipe(recipe, overrides)


# -- YAML and overrides ------------------------------------------------------------------------------------------------


def _spelt_out(values: dict[str, Any]) -> dict[str, Any]:
    """``model: x`` stands for ``model: {name: x}``, and so on; in entries of ``tasks`` too."""
    full = dict(values)
    for key, name in SHORT.items():
        value = full.get(key)
        if value is not None and not isinstance(value, dict) and not isinstance(value, BaseModel):
            full[key] = {name: value}
        elif isinstance(value, dict):
            full[key] = {k: _number(v) if key == "method" else v for k, v in value.items()}
    if isinstance(full.get("tasks"), dict):
        full["tasks"] = {n: _spelt_out(v) if isinstance(v, dict) else v for n, v in full["tasks"].items()}
    return full


def _number(value: Any) -> Any:
    """YAML takes ``1e-3`` for text; a method's configuration wants the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _override(item: str, values: dict[str, Any]) -> tuple[tuple[str, ...], Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"{item!r} is no override: write key=value, for example training.epochs=5.")
    try:
        value = _number(yaml.safe_load(text))
    except yaml.YAMLError:
        value = text
    path = tuple(key.split("."))
    if len(path) > 1 or path[0] in Recipe.model_fields:
        return (
            (path[0], SHORT[path[0]]) if len(path) == 1 and path[0] in SHORT and not isinstance(value, dict) else path
        ), value
    homes = [s for s, section in SECTIONS.items() if key in section.model_fields]
    if len(homes) == 1:
        return (homes[0], key), value
    known = [*Recipe.model_fields, *(f"{s}.{f}" for s, section in SECTIONS.items() for f in section.model_fields)]
    if homes:
        raise RecipeError(f"{key!r} is a key of several sections: write {' or '.join(f'{h}.{key}' for h in homes)}.")
    leaves = {name.rpartition(".")[2] for name in known}
    raise RecipeError(
        f"Unknown key {key!r} in the override {item!r}{did_you_mean(key, leaves) or '.'} Options of the method are written method.{key}=…"
    )


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values[part] = values = dict(values[part])
    values[path[-1]] = value


def _positions(node: Any, path: tuple[str, ...], source: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Line of each key, by its path. A key given twice is an error: YAML would keep the last in silence."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise RecipeError(
                f"{source}, line {line}: {key.value!r} stands here for the second time (first on line {seen[key.value]})."
            )
        seen[key.value] = line
        yield (*path, key.value), line
        yield from _positions(value, (*path, key.value), source)


def _section(path: tuple[str, ...]) -> type[BaseModel] | None:
    """The class of the section at a path."""
    if not path:
        return Recipe
    if path[0] == "tasks":
        return TaskEntry if len(path) == 2 else SECTIONS.get(path[2]) if len(path) == 3 else None
    return SECTIONS.get(path[0])
