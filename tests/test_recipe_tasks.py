"""The tasks of recipes: rows become the right features, outputs the right metrics, and each task trains end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import peft
import recipe_data as data
from peft.recipes.errors import RecipeError
from peft.recipes.recipe import DataSection, GenerationSection
from peft.recipes.tasks import TASKS
from peft.recipes.tasks.base import IGNORED
from peft.recipes.tasks.causal_lm import pack
from peft.recipes.tasks.question_answering import _answers, f1
from peft.recipes.tasks.seq2seq import rouge
from peft.recipes.tasks.token_classification import spans


def make(name, tokenizer, length=32, **section):
    task = TASKS[name](DataSection(train="", **section), GenerationSection())
    task.prepare(tokenizer, length)
    return task


# -- token classification ----------------------------------------------------------------------------------------------


def test_words_are_labelled_at_their_first_piece():
    from transformers import AutoTokenizer

    from peft.recipes import packaged

    tokenizer = AutoTokenizer.from_pretrained(packaged.packaged_path("packaged:minilm", packaged.MODELS))
    task = make("token-classification", tokenizer)
    task.labels = ["O", "B-place", "I-place"]
    (feature,) = task.encode([{"tokens": ["Antananarivo", "is", "far"], "tags": ["B-place", "O", 0]}])
    pieces = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert sum(p.startswith("##") for p in pieces) >= 1
    labelled = [(p, label) for p, label in zip(pieces, feature["labels"], strict=True) if label != IGNORED]
    assert [label for _, label in labelled] == [1, 0, 0] and [p for p, _ in labelled][1:] == ["is", "far"]


def test_entities_are_scored_as_wholes():
    task = make("token-classification", data.tokenizer(bert=True))
    task.labels = ["O", "B-place", "I-place", "B-person", "I-person"]
    rows = [{"tokens": ["Ann", "in", "New", "Rome"], "tags": ["B-person", "O", "B-place", "I-place"]}]
    features = task.encode(rows)

    def outputs(tags):
        return [np.eye(5)[[task.labels.index(t) for t in tags]] * 9.0]

    perfect = task.score(rows, features, outputs(rows[0]["tags"]))
    assert (perfect["f1"], perfect["accuracy"], perfect["details"]["wrong"]) == (1.0, 1.0, [])
    half = task.score(rows, features, outputs(["B-person", "O", "B-place", "O"]))
    assert half["f1"] == pytest.approx(0.5) and half["accuracy"] == 0.75
    assert half["details"]["wrong"][0]["truth"] == "Ann (person), New Rome (place)"


def test_words_beyond_the_cut_count_as_missed():
    task = make("token-classification", data.tokenizer(bert=True), length=4)
    task.labels = ["O", "B-person", "I-person"]
    rows = [{"tokens": ["Ann", "and", "Bob"], "tags": ["B-person", "O", "B-person"]}]
    features = task.encode(rows, "training")
    found = task.score(rows, features, [np.eye(3)[[1, 0]] * 9.0])
    assert (found["precision"], found["recall"]) == (1.0, 0.5)
    assert task.notes == ["1 of 1 training inputs are longer than 4 tokens and were cut."]


def test_spans():
    found = spans(["a", "b", "c", "d"], ["I-x", "B-x", "I-x", "I-y"])
    assert [(e["type"], e["text"]) for e in found] == [("x", "a"), ("x", "b c"), ("y", "d")]


# -- causal language models --------------------------------------------------------------------------------------------


def labelled(tokenizer, feature):
    return tokenizer.decode([i for i, n in zip(feature["input_ids"], feature["labels"], strict=True) if n != IGNORED])


@pytest.mark.parametrize(
    ("row", "chat", "learnt"),
    [
        ({"text": "the film was fine"}, True, "the film was fine </s>"),
        ({"prompt": "who is it ?", "response": "Ann is"}, True, "Ann is </s>"),
        ({"prompt": "who is it ?", "response": "Ann is"}, False, "Ann is </s>"),
        ({"prompt": {"instruction": "say", "input": "who"}, "response": "Bob"}, False, "Bob </s>"),
        (
            {"messages": [
                {"role": "user", "content": "who"}, {"role": "assistant", "content": "Ann"}, {"role": "user", "content": "where"},
                {"role": "assistant", "content": "in Rome"},
            ]},
            True,
            "Ann </s> in Rome </s>",
        ),
    ],
)  # fmt: skip
def test_the_loss_is_on_answers_only(row, chat, learnt):
    tokenizer = data.tokenizer(chat)
    (feature,) = make("causal-lm", tokenizer).encode([row])
    assert labelled(tokenizer, feature) == learnt


def test_messages_are_checked_and_other_forms_understood():
    task = make("causal-lm", data.tokenizer(True))
    row = {"messages": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "Ann"}]}
    assert task.check(row) is None and row["messages"][1] == {"role": "assistant", "content": "Ann"}
    assert task.check({"messages": [{"role": "user", "content": "who"}]}) == "no message is the assistant's"
    assert task.check({"prompt": "x", "response": ""}) == "response is empty"


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(RecipeError, match="no chat template"):
        make("causal-lm", data.tokenizer()).encode([{"messages": [{"role": "assistant", "content": "Ann"}]}])


def test_packed_texts_do_not_see_each_other(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data.save_llama(tmp_path)).eval()
    task = make("causal-lm", data.tokenizer(True))
    features = task.encode([{"text": "the film was fine"}, {"text": "Ann lives in Rome and Bob"}, {"text": "who"}])
    packed = list(pack(features, 16, 0))
    assert [len(p["input_ids"]) for p in packed] == [16]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([f["input_ids"]])).logits[0] for f in features]
        together = model(**{k: v for k, v in task.collate(packed).items() if k != "labels"}, use_cache=False).logits[0]
    torch.testing.assert_close(together[: sum(len(a) for a in alone)], torch.cat(alone), atol=1e-5, rtol=1e-4)
    kept = [n for n in packed[0]["labels"] if n != IGNORED]
    assert kept == [n for f in features for n in f["labels"][1:]]


def test_perplexity_is_that_of_the_answers(tmp_path):
    from transformers import AutoModelForCausalLM

    from peft.recipes.inference import run

    model = AutoModelForCausalLM.from_pretrained(data.save_llama(tmp_path)).eval()
    task = make("causal-lm", data.tokenizer(True))
    rows = [{"prompt": "who", "response": "Ann is fine"}, {"prompt": "where is it", "response": "Rome"}]
    features = task.encode(rows)
    found = task.score(rows, features, run(model, task, features, 2))
    total, count = 0.0, 0
    for f in features:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([f["input_ids"]]), labels=torch.tensor([f["labels"]])).loss.item()
        tokens = sum(n != IGNORED for n in f["labels"][1:])
        total, count = total + loss * tokens, count + tokens
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)


# -- question answering ------------------------------------------------------------------------------------------------


def test_a_long_context_is_read_in_windows_and_answers_come_back():
    tokenizer = data.tokenizer(bert=True)
    task = make("question-answering", tokenizer, length=16, stride=3)
    context = "the film was a story in it is not very 1 2 3 Ann lives in Rome the film was fine"
    row = {"question": "who lives in Rome ?", "context": context, "answers": [("Ann", context.index("Ann"))]}
    features = task.encode([row], "training")
    assert len(features) > 1 and "windows" in task.notes[0]
    found = [f for f in features if f["start_positions"]]
    assert found
    for feature in found:
        ids = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
        assert tokenizer.decode(ids) == "Ann"
    task.kind = "answerable"

    def outputs(feature, key):
        return np.eye(len(feature["input_ids"]))[feature[key]] * (9.0 if feature["start_positions"] else 1.0)

    results = [(outputs(f, "start_positions"), outputs(f, "end_positions")) for f in features]
    assert task.decode([row], features, results)[0]["answer"] == "Ann"
    assert task.score([row], features, results)["exact_match"] == 1.0


def test_no_answer_is_an_answer_where_training_had_such():
    task = make("question-answering", data.tokenizer(bert=True))
    row = {"question": "who ?", "context": "it was fine", "answers": []}
    features = task.encode([row])
    assert (features[0]["start_positions"], features[0]["end_positions"]) == (0, 0)
    first = np.eye(len(features[0]["input_ids"]))[0] * 9
    task.kind = "with-unanswerable"
    assert task.decode([row], features, [(first, first)])[0]["answer"] == ""
    assert task.score([row], features, [(first, first)])["f1"] == 1.0


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Ann", [("Ann", 3)]),
        (["Ann"], [("Ann", 3)]),
        ({"text": ["Ann"], "answer_start": [3]}, [("Ann", 3)]),
        ('{"text": ["Ann"], "answer_start": [0]}', [("Ann", 3)]),
        ({"text": [], "answer_start": []}, []),
        ("", []),
        ("Bob", None),
    ],
)
def test_forms_of_answers(value, found):
    assert _answers(value, "is Ann here") == found


def test_overlap_is_counted_as_squad_does():
    assert f1("the Seine river", "Seine") == pytest.approx(2 / 3)
    assert f1("A Film!", "film") == 1.0 and f1("", "") == 1.0 and f1("x", "") == 0.0


# -- text to text ------------------------------------------------------------------------------------------------------


def test_rouge():
    scores = rouge("the cat sat", "the cat sat on the mat")
    assert scores["rouge1"] == pytest.approx(2 * 3 / 9) and scores["rouge2"] == pytest.approx(2 * 2 / 7)
    assert scores["rougeL"] == pytest.approx(2 * 3 / 9)
    assert rouge("a b c d", "a c b d")["rougeL"] == pytest.approx(0.75)
    assert rouge("", "x") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


# -- end to end --------------------------------------------------------------------------------------------------------


def qa_rows(count=40):
    rows = []
    for i in range(count):
        name, place = data.NAMES[i % 4], data.PLACES[(i // 4) % 4]
        context = f"{name} lives in {place} and {i % 3 + 1} {' '.join(data.OTHER[: i % 7])} ."
        rows.append({"question": f"who lives in {place} ? {i % 4 + 1}", "context": context, "answers": name})
    return rows


def pairs(count=40):
    rows = []
    for i in range(count):
        name, place = data.NAMES[i % 4], data.PLACES[(i // 4) % 4]
        rows.append({"prompt": f"where is {name} {data.OTHER[i % 16]}", "response": f"{name} lives in {place}"})
    return rows


RUNS = {
    "token-classification": (
        data.save_bert,
        data.entities,
        {"epochs": 10, "learning_rate": 0.02},
        lambda m: m["f1"] > 0.8,
    ),
    "question-answering": (data.save_bert, qa_rows, {"epochs": 2}, lambda m: 0 <= m["exact_match"] <= m["f1"] <= 1),
    "causal-lm": (data.save_llama, pairs, {"epochs": 6, "learning_rate": 0.02}, lambda m: m["perplexity"] < 6),
    "seq2seq": (
        data.save_t5,
        lambda: [{"source": r["prompt"], "target": r["response"]} for r in pairs()],
        {"epochs": 1, "learning_rate": 0.01},
        lambda m: {"bleu", "chrf", "rougeL"} <= set(m) and m["loss"] > 0,
    ),
}
ASKED = {
    "token-classification": ("Ann lives in Rome .", "entities"),
    "question-answering": ('{"question": "who lives in Rome ?", "context": "Ann lives in Rome ."}', "answer"),
    "causal-lm": ("where is Ann", "generated"),
    "seq2seq": ("where is Ann", "generated"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_task_end_to_end(name, tmp_path):
    save, rows, training, good = RUNS[name]
    file = data.write_json_lines(tmp_path / "rows.jsonl", rows())
    recipe = {
        "task": name, "model": str(save(tmp_path / "base")), "method": "lora", "data": {"train": str(file), "max_length": 48},
        "training": {"batch_size": 8, **training}, "generation": {"max_new_tokens": 4}, "out": str(tmp_path / "run"),
    }  # fmt: skip
    recipe["data"]["max_target_length"] = 8
    if name == "causal-lm":  # with weights as small as these random ones, the output layer has to learn too
        recipe["method"] = {"name": "lora", "modules_to_save": ["lm_head"]}
    result = peft.finetune(recipe, tell=None)
    assert good(result.metrics), result.metrics
    from typer.testing import CliRunner

    from peft.cli import app

    text, key = ASKED[name]
    said = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), text])
    assert said.exit_code == 0, said.output
    answer = json.loads(said.stdout)
    assert key in answer
    if name == "token-classification":
        assert {"type": "person", "start": 0, "end": 0, "text": "Ann"} in answer["entities"]
    saved = json.loads(CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--json"]).stdout)
    assert saved == pytest.approx(result.metrics, abs=1e-4)
