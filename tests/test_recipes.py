"""Recipes and their data: what is understood, what is guessed and said, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peft
import recipe_data as data
from peft.recipes import costs, rates
from peft.recipes.data import draw, find_columns, load_splits
from peft.recipes.errors import RecipeError
from peft.recipes.methods import build_config, method_info, methods
from peft.recipes.recipe import TASKS, DataSection, GenerationSection, MethodSection, make_recipe, read_recipe
from peft.recipes.sources import read_source
from peft.recipes.tasks import TASKS as TASK_CLASSES
from peft.recipes.templates import template

GOOD = """\
task: sequence-classification
model: packaged:minilm
method:
  name: lora
  r: 4
data:
  train: reviews.csv
training:
  epochs: 2
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_a_recipe_with_short_forms_and_overrides(recipe_file):
    recipe = read_recipe(
        recipe_file(GOOD), ["epochs=5", "method.lora_dropout=1e-1", "data=other.csv", "training.learning_rate=1e-3"]
    )
    assert (recipe.model.name, recipe.training.epochs, recipe.data.train) == ("packaged:minilm", 5, "other.csv")
    assert recipe.method.options == {"r": 4, "lora_dropout": 0.1}
    assert recipe.training.learning_rate == 1e-3
    assert str(recipe.folder) == "runs/sequence-classification-lora"
    assert read_recipe(recipe_file(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs: 2", "epoch: 2"), r"line 9: unknown key 'epoch' in training \(did you mean 'epochs'"),
        (("training:", "trainning:"), r"line 8: unknown key 'trainning' \(did you mean 'training'"),
        (("sequence-classification", "sequence-clasification"), r"line 1: task is .* \(did you mean 'sequence-classification'"),
        (("epochs: 2", "epochs: many"), r"line 9: training.epochs is 'many'; it should be a number"),
        (("epochs: 2", "epochs: -1"), r"line 9: training.epochs is -1; it should be greater than 0"),
        (("  train: reviews.csv", "  test: reviews.csv"), r"line 6: data.train is missing"),
        (("  epochs: 2", "  epochs: 2\n  epochs: 3"), r"line 10: 'epochs' stands here for the second time \(first on line 9\)"),
        (("  epochs: 2", "  epochs: [2"), r"line 10: no valid YAML"),
        (("  train: reviews.csv", "  train: a.csv\n  columns: {txt: body}"),
         r"line 8: data.columns: unknown role 'txt' \(did you mean 'text'"),
        (("task: sequence-classification\n", ""), r"recipe.yaml: task is missing. Give one of sequence-classification,"),
        (("data:\n  train: reviews.csv\n", ""), r"recipe.yaml: data is missing. Give a file, folder, Hub id"),
        (("model: packaged:minilm\n", ""), r"model is missing. Give a Hub id, folder"),
        (("training:", "tasks: {mood: {task: seq2seq, data: a.csv}}\ntraining:"), r"give either `task` and `data`, or `tasks`"),
        (("epochs: 2", "epochs: yes"), r"line 9: training.epochs: it is true; it should be a number"),
        (("training:\n  epochs: 2", "training: 2"), r"line 8: training is 2; it should hold keys and values"),
        (("  train: reviews.csv", "  trian: reviews.csv"), r"recipe.yaml, line 7: unknown key 'trian' in data \(did you mean 'train'\?\)$"),
        (("task: sequence-classification", "tasks:\n  a/b: {task: seq2seq, data: x.csv}"), r"line 1: tasks: 'a/b' cannot be the name of"),
        ((GOOD, ""), "is empty. `peft init` writes one"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_the_line_and_the_mend(recipe_file, change, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe_file(GOOD.replace(*change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("  r: 4", "  rr: 4"), r"recipe.yaml, line 5: method.rr: the method 'lora' has no such option"),
        (("  r: 4", "  r: 0"), r"recipe.yaml, line 5: method 'lora': `r` should be"),
        (("name: lora", "name: lorra"), r"recipe.yaml, line 4: There is no method 'lorra'"),
        (("reviews.csv", "review.csv"), r"recipe.yaml, line 7: There is no file 'review.csv'"),
        (
            ("  train: reviews.csv", "  train: reviews.csv\n  columns: {text: body}"),
            r"recipe.yaml, line 8: data.columns.text: .* no column 'body'",
        ),
        (
            ("  train: reviews.csv", "  train: reviews.csv\n  test: new.csv"),
            r"recipe.yaml, line 8: There is no file 'new.csv'",
        ),
        (
            ("  train: reviews.csv", "  train: reviews.csv\n  test: validation"),
            r"line 8: data.test is 'validation', but 'reviews.csv' has no such split",
        ),
        (
            ("training:", "  validation_size: 0\ntraining:\n  early_stopping: 1"),
            r"line 10: training.early_stopping needs rows to evaluate on",
        ),
        (
            ("epochs: 2", "report_to: [wandbb]\n  epochs: 2"),
            r"line 9: training.report_to: 'wandbb' is not known \(did you mean 'wandb'",
        ),
        (
            ("epochs: 2", "report_to: [comet_ml]\n  epochs: 2"),
            r"line 9: training.report_to: comet_ml is not installed: pip install comet_ml",
        ),
        (
            ("epochs: 2", "trainer: {lr: 1}\n  epochs: 2"),
            r"line 9: training.trainer.lr: transformers' TrainingArguments has no such",
        ),
        (("packaged:minilm", "./no-such-model"), r"recipe.yaml, line 2: There is no model folder './no-such-model'"),
    ],
)
def test_what_is_found_later_points_at_the_line_too(recipe_file, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    data.write_csv(tmp_path / "reviews.csv", data.reviews(24))
    path = recipe_file(GOOD.replace(*change))
    with pytest.raises(RecipeError, match=message):
        peft.finetune(path, tell=None)
    assert not (tmp_path / "runs" / "sequence-classification-lora").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "'epochs' is no override: write key=value"),
        ("lerning_rate=1", r"Unknown key 'lerning_rate' .* \(did you mean 'learning_rate'"),
        ("training.lerning_rate=1", r"unknown key 'lerning_rate' in training \(did you mean 'learning_rate'"),
        ("name=x", "several sections: write model.name or method.name or data.name"),
    ],
)
def test_a_wrong_override_is_refused(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe_file(GOOD), [override])


def test_a_missing_recipe_names_the_one_beside_it(recipe_file):
    path = recipe_file(GOOD)
    with pytest.raises(RecipeError, match=r"did you mean 'recipe\.yaml'"):
        read_recipe(path.with_name("recipes.yaml"))


@pytest.mark.parametrize("task", TASKS)
def test_the_written_template_is_a_valid_recipe(recipe_file, task):
    text = template(task)
    assert read_recipe(recipe_file(text)).task == task
    # Every commented key is a key: with all of them in force the recipe is still understood.
    active = "\n".join(line.replace("#   ", "  ", 1) if line.startswith("#   ") else line for line in text.splitlines())
    read_recipe(
        recipe_file(
            active.replace("# generation:", "generation:").replace("  validation: null", "").replace("  r: 8", "")
        )
    )


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert recipe.tasks or recipe.task


# -- methods -----------------------------------------------------------------------------------------------------------


def test_every_registered_method_can_be_named_and_has_a_learning_rate():
    from peft.registry import registered_types

    known = methods()
    assert {"lora", "full", "head"} <= set(known)
    assert {i.peft_type for i in known.values() if i.peft_type} >= {t for t in registered_types() if t.isupper()}
    for name, info in known.items():
        assert all(rates.learning_rate(name, task) > 0 for task in TASKS)
        if info.peft_type and info.peft_type in ("LORA",):
            assert build_config(MethodSection(name=name), "SEQ_CLS").peft_type == info.peft_type
            assert info.paper


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "lorra"}, r"no method 'lorra' \(did you mean 'lora'"),
        ({"name": "lora", "rank": 4}, r"method\.rank: the method 'lora' has no such option"),
        ({"name": "lora", "lora_alfa": 4}, r"method\.lora_alfa: .* \(did you mean 'lora_alpha'"),
        ({"name": "lora", "r": 0}, r"method 'lora': `r` should be a positive integer"),
        ({"name": "full", "r": 2}, r"the method 'full' has no options"),
    ],
)
def test_a_wrong_method_is_refused(section, message):
    with pytest.raises(RecipeError, match=message):
        build_config(MethodSection(**section), None)


def test_names_are_taken_in_either_spelling():
    assert method_info("LORA") is not None and method_info("Lora").name == "lora"


# -- data --------------------------------------------------------------------------------------------------------------


def splits_of(task="sequence-classification", seed=0, **section):
    section = DataSection(**section)
    task = TASK_CLASSES[task](section, GenerationSection())
    splits = load_splits(section, task.roles, seed, task.group, task.check)
    task.learn(splits)
    return splits, task


def test_formats_read_the_same(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = data.reviews(12)
    data.write_csv(tmp_path / "a.csv", rows)
    (tmp_path / "b.csv").write_text("text;label\n" + "".join(f"{r['text']};{r['label']}\n" for r in rows))
    (tmp_path / "c.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    data.write_json_lines(tmp_path / "d.jsonl", rows)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for path in tmp_path.iterdir():
        assert read_source(str(path))["train"].rows == rows, path.name


def test_folders_of_splits_and_folders_of_labels(tmp_path):
    rows = data.reviews(12)
    data.write_csv(tmp_path / "train.csv", rows[:8])
    data.write_json_lines(tmp_path / "dev.jsonl", rows[8:])
    found = read_source(str(tmp_path))
    assert (len(found["train"].rows), len(found["validation"].rows)) == (8, 4)
    for i, row in enumerate(rows):
        (tmp_path / "texts" / row["label"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / row["label"] / f"{i}.txt").write_text(row["text"])
    assert {r["label"] for r in read_source(str(tmp_path / "texts"))["train"].rows} == {"pos", "neg"}


def test_splits_are_stratified_disjoint_and_fixed_by_the_seed(tmp_path):
    rows = data.reviews(100)
    path = str(data.write_csv(tmp_path / "r.csv", rows[:90] + [{"text": f"x {i}", "label": "pos"} for i in range(10)]))
    one, _ = splits_of(train=path, validation_size=0.2, test_size=10)
    again, _ = splits_of(train=path, validation_size=0.2, test_size=10)
    other, _ = splits_of(train=path, validation_size=0.2, test_size=10, seed=1)
    assert (one.train, one.validation, one.test) == (again.train, again.validation, again.test)
    assert one.test != other.test
    assert [len(s) for s in (one.train, one.validation, one.test)] == [70, 20, 10]
    texts = [row["text"] for s in (one.train, one.validation, one.test) for row in s]
    assert len(set(texts)) == 100
    for split in (one.train, one.validation, one.test):
        assert abs(sum(r["label"] == "pos" for r in split) / len(split) - 0.55) < 0.06


def test_draw_gives_rare_groups_their_share():
    import random

    rows = [{"g": "a"}] * 90 + [{"g": "b"}] * 10
    drawn, rest = draw(rows, 20, lambda r: r["g"], random.Random(0))
    assert sum(r["g"] == "b" for r in drawn) == 2 and len(rest) == 80


def test_bad_rows_are_counted_and_shown(tmp_path):
    good = data.reviews(30)
    lines = ["text,label", *(f"{r['text']},{r['label']}" for r in good), "one field", ",pos", "no label,", "a,b,c"]
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    splits, _ = splits_of(train=str(tmp_path / "r.csv"))
    note = next(n for n in splits.notes if n.startswith("Left out"))
    assert (
        "4 of 34 rows of r.csv cannot be used" in note
        and "line 32: 1 fields, the header has 2" in note
        and "and 1 more" in note
    )
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 30


def test_repeated_rows_are_taken_out_and_said(tmp_path):
    path = data.write_csv(tmp_path / "r.csv", data.reviews(30) * 2)
    splits, _ = splits_of(train=str(path))
    assert any(n.startswith("30 repeated rows") for n in splits.notes)


def test_columns_are_guessed_and_said(tmp_path):
    rows = [{"review": r["text"], "stars": r["label"]} for r in data.reviews(30)]
    splits, _ = splits_of(train=str(data.write_csv(tmp_path / "r.csv", rows)))
    assert "Columns taken: review as text, stars as label." in splits.notes
    assert set(splits.train[0]) == {"text", "label"}


@pytest.mark.parametrize(
    ("rows", "section", "message"),
    [
        ([{"body_text": "x", "y": 1}], {}, r"no column for 'text'; its columns are body_text, y. Say which: data.columns.text=COLUMN"),
        ([{"text": "x", "label": 1}], {"columns": {"text": "texts"}}, r"no column 'texts' \(did you mean 'text'"),
        ([{"text": "x", "label": 1}], {"columns": {"tokens": "text"}}, r"data.columns.tokens has no meaning for this task"),
        ([{"text": f"x {i}", "label": "same"} for i in range(9)], {}, r"All 7 training rows have the label 'same'"),
        ([{"text": "", "label": 1}] * 3, {}, r"No row of the given rows can be used: row 1: the text is empty"),
        ([{"text": f"x {i}", "label": i % 2} for i in range(9)], {"train_rows": 99}, r"train_rows asks for 99 rows, but 7 are there"),
        ([{"text": f"x {i}", "label": i % 2} for i in range(9)], {"test_size": 50}, r"50 rows are to be held back, but only 9"),
        ([{"text": f"x {i}", "label": i % 2} for i in range(9)], {"labels": ["a", "b"], "test": [{"text": "z", "label": "c"}]},
         r"1 test rows have labels that are not among 'a', 'b': 'c'"),
    ],
)  # fmt: skip
def test_wrong_data_is_refused(rows, section, message):
    with pytest.raises(RecipeError, match=message):
        splits_of(train=rows, **section)


def test_missing_files_and_unknown_packages_are_refused(tmp_path):
    data.write_csv(tmp_path / "reviews.csv", data.reviews(4))
    with pytest.raises(RecipeError, match=r"no file .*\(did you mean 'reviews\.csv'"):
        read_source(str(tmp_path / "review.csv"))
    with pytest.raises(
        RecipeError, match="known are packaged:imdb, packaged:rotten-tomatoes, packaged:topic, packaged:ner"
    ):
        read_source("packaged:imbd")
    with pytest.raises(RecipeError, match=r"needs a file named train"):
        read_source(str(tmp_path))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(RecipeError, match="holds no data: it is empty"):
        read_source(str(tmp_path / "empty.csv"))


def test_a_callable_and_a_function_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows_of_data.py").write_text(
        "def rows():\n    return {'train': [{'text': 'a', 'label': 1}], 'test': []}\n"
    )
    assert read_source("my_rows_of_data:rows")["train"].rows == [{"text": "a", "label": 1}]
    assert read_source(lambda: data.reviews(3))["train"].rows == data.reviews(3)
    with pytest.raises(RecipeError, match="cannot be imported"):
        read_source("my_rows_of_data:row")


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["b", "a"], "single", ["a", "b"]),
        ([2, 10, 1], "single", ["1", "2", "10"]),
        ([[], ["x"], ["x", "y"]], "multi-label", ["x", "y"]),
        ([0.5, 1.0, 2.0], "regression", []),
    ],
)
def test_the_kind_of_labels_is_seen(labels, kind, names):
    rows = [{"text": f"t {i}", "label": label} for i, label in enumerate(labels * 6)]
    _, task = splits_of(train=rows)
    assert (task.kind, task.labels) == (kind, names)


def test_labels_of_rows_that_were_drawn_for_other_splits_are_labels():
    rows = [{"tokens": [f"w{i}", "x"], "tags": ["B-a" if i else "B-rare", "O"]} for i in range(20)]
    for seed in range(20):  # in some of these the rare tag is not among the training rows
        splits, task = splits_of("token-classification", seed, train=rows, validation_size=5, test_size=5)
        assert task.labels == ["O", "B-a", "I-a", "B-rare", "I-rare"]
        among = any("B-rare" in row["tags"] for row in splits.train)
        assert task.notes == ([] if among else ["No training row has the tag 'B-rare'."])


def test_the_columns_of_an_instruction_set_are_joined():
    rows = [{"instruction": f"Do {i}", "input": "this" if i % 2 else "", "output": "done"} for i in range(20)]
    splits, _ = splits_of("causal-lm", train=rows, columns={"prompt": ["instruction", "input"], "response": "output"})
    assert {"instruction", "input"} == set(splits.train[0]["prompt"])


# What the best-known data sets of the Hub look like: columns, their kinds, two rows.
HUB = {
    "yelp": (
        "sequence-classification",
        {"text": "string", "label": ["1", "2"]},
        [{"text": "bad", "label": 0}, {"text": "good", "label": 1}],
    ),
    "sst2": (
        "sequence-classification",
        {"sentence": "string", "label": ["neg", "pos"]},
        [{"sentence": "bad", "label": 0}, {"sentence": "good", "label": 1}],
    ),
    "qnli": (
        "sequence-classification",
        {"question": "string", "sentence": "string", "label": ["yes", "no"]},
        [{"question": "who", "sentence": "me", "label": 0}, {"question": "why", "sentence": "so", "label": 1}],
    ),
    "go_emotions": (
        "sequence-classification",
        {"text": "string", "labels": [["joy", "fear"]]},
        [{"text": "a", "labels": [0]}, {"text": "b", "labels": [0, 1]}],
    ),
    "conll2003": (
        "token-classification",
        {"tokens": ["string"], "pos_tags": [["N", "V"]], "ner_tags": [["O", "B-x", "I-x"]]},
        [{"tokens": ["Ann"], "pos_tags": [0], "ner_tags": [1]}, {"tokens": ["ran"], "pos_tags": [1], "ner_tags": [0]}],
    ),
    "alpaca": (
        "causal-lm",
        {"instruction": "string", "input": "string", "output": "string"},
        [{"instruction": "do", "input": "", "output": "done"}],
    ),
    "xsum": ("seq2seq", {"document": "string", "summary": "string"}, [{"document": "long", "summary": "short"}]),
}
TAKEN = {
    "yelp": {"text": "good", "label": "2"},
    "sst2": {"text": "good", "label": "pos"},
    "qnli": {"text": "why", "text_pair": "so", "label": "no"},
    "go_emotions": {"text": "b", "label": ["joy", "fear"]},
    "conll2003": {"tokens": ["ran"], "tags": ["O"]},
    "alpaca": {"prompt": {"instruction": "do", "input": ""}, "response": "done"},
    "xsum": {"source": "long", "target": "short"},
}


def fake_hub(monkeypatch, columns, rows, splits=("train", "test")):
    import datasets

    def kind(of):
        if isinstance(of, list):
            return datasets.ClassLabel(names=of) if len(of) > 1 else datasets.List(kind(of[0]))
        return datasets.Value(of)

    features = datasets.Features({name: kind(of) for name, of in columns.items()})
    asked = []

    def load(name, config=None):
        asked.append((name, config))
        return datasets.DatasetDict({s: datasets.Dataset.from_list(rows, features) for s in splits})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", HUB)
def test_well_known_data_sets_of_the_hub_are_understood(monkeypatch, name):
    task, columns, rows = HUB[name]
    asked = fake_hub(monkeypatch, columns, rows, splits=("train",))
    splits, _ = splits_of(task, train=name, validation_size=0, test_size=0)
    assert asked[0][0].count("/") == 1  # the short name stands for one with an owner
    assert TAKEN[name] in splits.train


def test_a_test_split_that_keeps_its_labels_to_itself_is_left_out_and_said(monkeypatch):
    _, columns, _ = HUB["sst2"]
    rows = [{"sentence": f"text {i}", "label": i % 2} for i in range(20)]
    fake_hub(monkeypatch, columns, rows, splits=("train",))
    import datasets

    whole = datasets.load_dataset("x")
    whole["test"] = whole["train"].map(lambda row: {"sentence": f"hidden {row['sentence']}", "label": -1})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: whole)
    splits, _ = splits_of(train="sst2", test_size=4)
    assert len(splits.test) == 4 and all(row["label"] in ("neg", "pos") for row in splits.test)
    assert any(
        n.startswith("The source's test rows are left out, and others drawn in their place") for n in splits.notes
    )


def test_the_hub_out_of_reach_is_one_line():
    with pytest.raises(
        RecipeError,
        match=r"'no-such-set' is no file or folder here, and as a data set of the Hub it cannot be loaded: .*$",
    ) as found:
        read_source("no-such-set")
    assert "\n" not in str(found.value)


def test_fields_inside_a_column_are_named_with_a_dot():
    rows = [{"translation": {"de": f"Wort {i}", "en": f"word {i}"}} for i in range(12)]
    with pytest.raises(RecipeError, match=r"its columns are translation, translation\.de, translation\.en\. Say which"):
        splits_of("seq2seq", train=rows)
    splits, _ = splits_of("seq2seq", train=rows, columns={"source": "translation.en", "target": "translation.de"})
    assert {"source": "word 3", "target": "Wort 3"} in [*splits.train, *splits.validation, *splits.test]


def test_a_role_is_not_played_by_a_column_that_plays_another():
    table = read_source([{"question": "q", "answer": "a"}])["train"]
    assert find_columns(table, {}, TASK_CLASSES["causal-lm"].roles) == {"prompt": "question", "response": "answer"}


def test_make_recipe_wants_a_mapping():
    with pytest.raises(RecipeError, match="should hold keys and values"):
        make_recipe(["task"])  # type: ignore[arg-type]


def test_the_documented_learning_rates_are_those_in_force():
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert rates.markdown() in text, "put what `python -m peft.recipes.rates` prints into docs/recipes.md"
    assert rates.COLUMNS == TASKS and rates.RATES.keys() == rates.SOURCES.keys()
    assert set(rates.MEASURED) <= rates.RATES.keys()


@pytest.mark.skipif(not costs.STATUS.exists(), reason="ru_maxrss is all that this system tells")
def test_the_memory_of_a_process_is_not_that_of_the_one_that_started_it():
    held = bytearray(1_500_000_000)
    held[::4096] = bytes(len(held[::4096])).replace(b"\0", b"x")  # all of it resident
    line = "from peft.recipes.costs import peak_resident; print(peak_resident())"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < len(held) < costs.peak_resident()
