"""The command line, as a user types it, on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import peft
import recipe_data as data
from peft import AutoPeftModelForSequenceClassification
from peft.cli import app
from peft.recipes.methods import methods
from peft.recipes.rates import RATES

runner = CliRunner()
SMALL = ["data.max_length=32", "training.batch_size=8", "training.learning_rate=0.01"]


def run(*args, code=0, **kwargs):
    """The output of a command, which should end as expected."""
    result = runner.invoke(app, [str(a) for a in args], env={"COLUMNS": "200"}, **kwargs)
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return data.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return data.write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", data.reviews(120))


@pytest.fixture(scope="module")
def trained(bert, reviews, tmp_path_factory):
    """A run that has learnt."""
    out = tmp_path_factory.mktemp("run") / "lora"
    said = run(
        "train", "--task", "sequence-classification", "--model", bert, "--data", reviews, "--method", "lora", "--out", out, *SMALL,
        "epochs=6",
    ).output  # fmt: skip
    return out, said


# -- train -------------------------------------------------------------------------------------------------------------


def test_training_says_what_it_does_and_learns(trained):
    out, said = trained
    assert (out / "report.html").exists() and f"Report: {out / 'report.html'}" in said
    assert "Rows: 96 train, 12 validation, 12 test." in said and "Labels: neg, pos." in said
    assert re.search(r"Method lora on \w+: [\d,]+ of [\d,]+ parameters train", said)
    assert re.search(r"epoch 6\.00, step 72/72: training loss \d\.\d{3}; validation .*accuracy", said)
    report = json.loads((out / "metrics.json").read_text())
    assert report["test"]["accuracy"] >= 0.8
    assert (
        report["steps"] == 72
        and report["step_ms"] > 0
        and report["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    )
    assert len(report["details"]["confusion"]) == 2
    assert not (out / "checkpoints").exists()


def test_the_result_loads_with_the_library_alone(trained):
    out, _ = trained
    model = AutoPeftModelForSequenceClassification.from_pretrained(out)
    assert model.peft_config["default"].id2label == {"0": "neg", "1": "pos"}


def test_evaluating_again_gives_the_same_numbers(trained):
    out, _ = trained
    metrics = json.loads(run("evaluate", out, "--json").stdout)
    assert metrics == pytest.approx(json.loads((out / "metrics.json").read_text())["test"], abs=1e-6)


def test_predicting_from_the_command_line_a_file_and_standard_input(trained, tmp_path):
    out, _ = trained
    rows = data.reviews(6)
    texts = [r["text"] for r in rows]
    answers = [json.loads(line) for line in run("predict", out, *texts).stdout.splitlines()]
    assert [a["text"] for a in answers] == texts
    assert all(set(a["scores"]) == {"neg", "pos"} and a["score"] == max(a["scores"].values()) for a in answers)
    file = data.write_csv(tmp_path / "new.csv", [{"text": t} for t in texts])
    from_file = [
        json.loads(line) for line in run("predict", out, "--file", file, "--batch-size", 2).stdout.splitlines()
    ]
    from_stdin = [json.loads(line) for line in run("predict", out, input="\n".join(texts)).stdout.splitlines()]
    for others in (from_file, from_stdin):
        assert [a["label"] for a in others] == [a["label"] for a in answers]
        assert [a["score"] for a in others] == pytest.approx([a["score"] for a in answers], abs=1e-4)


def test_from_python(bert, reviews, tmp_path):
    lines = []
    recipe = {
        "task": "sequence-classification", "model": str(bert), "method": "head", "data": str(reviews),
        "training": {"epochs": 1, "batch_size": 16}, "out": str(tmp_path / "run"),
    }  # fmt: skip
    result = peft.finetune(recipe, "seed=3", tell=lines.append)
    assert result.metrics["accuracy"] == result.report["test"]["accuracy"] and lines
    assert result.report["trained_parameters"] == 2 * 32 + 2
    model, task = result.load()
    assert not any("lora" in n for n, _ in model.named_parameters()) and task.labels == ["neg", "pos"]
    assert peft.finetune(recipe, "seed=3", resume=True, tell=None).metrics == result.metrics


@pytest.mark.parametrize("method", sorted(methods().keys() & RATES.keys()))
def test_every_method_trains_saves_and_loads(bert, reviews, tmp_path, method):
    steps = ["training.max_steps=2", "data.train_rows=24", "data.test_rows=12", "validation_size=0"]
    args = ["train", "--task", "sequence-classification", "--model", bert, "--data", reviews, "--method", method]
    said = run(*args, "--out", tmp_path / "run", "--quiet", *SMALL, *steps).output
    assert "accuracy" in said
    metrics = json.loads(run("evaluate", tmp_path / "run", "--json").stdout)
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == pytest.approx(saved["test"], abs=1e-5)
    assert saved["trained_parameters"] > 0


KINDS = {
    "pairs": (
        [{"text": r["text"], "text_pair": "it is", "label": r["label"]} for r in data.reviews(40)],
        "accuracy",
        "label",
    ),
    "multi-label": (
        [{"text": r["text"], "label": [r["label"], "any"]} for r in data.reviews(40)],
        "f1_micro",
        "labels",
    ),
    "regression": (
        [{"text": r["text"], "label": 0.25 + (r["label"] == "pos")} for r in data.reviews(40)],
        "pearson",
        "value",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_classification(bert, tmp_path, kind):
    rows, metric, key = KINDS[kind]
    file = data.write_json_lines(tmp_path / "rows.jsonl", rows)
    args = ["train", "--task", "sequence-classification", "--model", bert, "--data", file, "--out", tmp_path / "run"]
    run(*args, *SMALL, "epochs=2")
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["metric"] == metric and metric in report["test"]
    asked = json.dumps({k: v for k, v in rows[0].items() if k != "label"})
    assert key in json.loads(run("predict", tmp_path / "run", asked).stdout)


# -- stopping and going on ---------------------------------------------------------------------------------------------


def weights(folder: Path):
    return load_file(folder / "adapter_model.safetensors")


STEADY = ["epochs=4", "training.save_every=3", "data.max_length=32", "training.batch_size=8"]


def test_a_killed_run_goes_on_to_the_same_result(bert, reviews, tmp_path):
    common = ["train", "--task", "sequence-classification", "--model", str(bert), "--data", str(reviews), *STEADY]
    run(*common, "--out", tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "peft", *common, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(peft.__file__).parents[1])},
    )  # fmt: skip
    checkpoints = tmp_path / "killed" / "checkpoints"
    for _ in range(3000):
        if (checkpoints / "checkpoint-15" / "trainer_state.json").exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    # A checkpoint that was cut off is passed over.
    cut = checkpoints / "checkpoint-999"
    cut.mkdir()
    (cut / "trainer_state.json").write_text('{"global')

    refused = run(*common, "--out", tmp_path / "killed", code=1)
    assert "a run that was not finished: --resume goes on with it" in refused.stderr
    assert (
        "training.epochs changed" in run(*common, "epochs=5", "--out", tmp_path / "killed", "--resume", code=1).stderr
    )
    said = run(*common, "--out", tmp_path / "killed", "--resume").output
    assert "Going on from" in said
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[k], other[k]) for k in one)
    reports = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "killed")]
    assert reports[0]["test"] == reports[1]["test"] and reports[0]["best"] == reports[1]["best"]


def test_ctrl_c_leaves_a_checkpoint(bert, reviews, tmp_path, monkeypatch):
    from peft.recipes import training

    begin = training.Progress.on_step_begin

    def interrupt(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.Progress, "on_step_begin", interrupt)
    out = tmp_path / "run"
    common = ["train", "--task", "sequence-classification", "--model", bert, "--data", reviews, *STEADY, "--out", out]
    assert "Stopped at step 5 of 48. `--resume` goes on from there." in run(*common, code=130).stderr
    monkeypatch.undo()
    assert "checkpoint-5" in run(*common, "--resume").output


def test_the_best_evaluation_is_kept_and_early_stopping_stops(bert, reviews, tmp_path):
    args = ["train", "--task", "sequence-classification", "--model", bert, "--data", reviews, "--out", tmp_path / "run"]
    run(*args, "data.max_length=32", "epochs=30", "training.early_stopping=2", "training.learning_rate=0.02")
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    seen = [e["eval_accuracy"] for e in report["history"] if "eval_accuracy" in e]
    assert len(seen) < 30 and report["best"]["value"] == max(seen) == seen[-3]
    equals = [e["eval_loss"] for e in report["history"] if e.get("eval_accuracy") == max(seen)]
    assert report["validation"]["accuracy"] == max(seen) and report["best"]["loss"] == min(equals)


def test_with_lora_plus_b_learns_faster(bert, reviews, tmp_path):
    common = [
        "train",
        "--task",
        "sequence-classification",
        "--model",
        bert,
        "--data",
        reviews,
        "training.max_steps=1",
        "warmup=0",
    ]
    for name, ratio in (("plain", []), ("plus", ["training.lora_plus_ratio=16"])):
        run(*common, *ratio, "training.learning_rate=1e-4", "--out", tmp_path / name)
    key = next(k for k in weights(tmp_path / "plus") if "lora_B" in k)
    # B starts at zero, and the first step of Adam is as long as the learning rate.
    assert weights(tmp_path / "plain")[key].abs().max() == pytest.approx(1e-4, rel=1e-2)
    assert weights(tmp_path / "plus")[key].abs().max() == pytest.approx(16e-4, rel=1e-2)
    refused = run(*common, "training.lora_plus_ratio=16", "--method", "head", "--out", tmp_path / "head", code=1)
    assert "lora_plus_ratio is for methods with B matrices" in refused.stderr


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "Name a recipe file"),
        (["train", "a.yaml", "b.yaml"], "One recipe is expected, got 2"),
        (["train", "no.yaml"], "There is no recipe 'no.yaml'"),
        (["train", "--task", "seq2seq", "--model", "{bert}", "--data", "{reviews}", "data.columns.target=label"],
         "is a bert, which has no head for seq2seq"),
        (["train", "--task", "sequence-classification", "--model", "./no", "--data", "{reviews}"], "There is no model folder './no'"),
        (["train", "--task", "sequence-classification", "--model", "{bert}", "--data", "{reviews}", "--method", "lorra"],
         "There is no method 'lorra' (did you mean 'lora'"),
        (["train", "--task", "sequence-classification", "--model", "{bert}", "--data", "{reviews}", "method.target_modules=[nope]"],
         "The method 'lora' does not suit this model: "),
        (["train", "--task", "sequence-classification", "--model", "{bert}", "--data", "{reviews}", "training.trainer={nope: 1}"],
         "TrainingArguments has no such argument"),
        (["predict", "nowhere", "x"], "There is no folder 'nowhere'"),
        (["predict", "{folder}", "x"], "holds neither a run of `peft train` nor an adapter"),
        (["init", "clasification"], "There is no task 'clasification'"),
        (["init", "seq2seq", "no/r.yaml"], "There is no folder 'no'"),
        (["train", "--task", "sequence-classification", "--model", "{bert}", "--data", "{reviews}", "out=/proc/nowhere"],
         "`out` is '/proc/nowhere', which cannot be made"),
        (["evaluate", "nowhere"], "There is no folder 'nowhere'"),
        (["report", "nowhere"], "There is no folder 'nowhere'"),
        (["inspect", "{folder}"], "holds neither a run of `peft train` nor an adapter"),
        (["generate", "nowhere", "x", "--temperature", "0"], "--temperature should be above 0"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_no_traceback(args, message, bert, reviews, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    filled = [a.format(bert=bert, reviews=reviews, folder="empty") if "{" in a and "nope" not in a else a for a in args]
    result = run(*filled, code=1)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? `peft --help` tells more."),
        (["train", "--nope"], "No such option: --nope"),
        (["report"], "Missing argument 'folder'. `peft report --help` tells more."),
        (["evaluate", "x", "--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_a_wrong_command_is_one_line_too(args, message):
    result = run(*args, code=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Input 1 of 1 cannot be answered: its text is empty"),
        ('{"txt": "fine"}', "it has no text"),
        ('{"text": 5}', "its text is no text"),
    ],
)
def test_an_input_that_cannot_be_answered_is_named(trained, text, message):
    assert message in run("predict", trained[0], text, code=1).stderr


def test_labels_that_the_model_does_not_know_are_refused(trained, tmp_path):
    file = data.write_csv(
        tmp_path / "new.csv", [{"text": "the film", "label": "meh"}, {"text": "a story", "label": "pos"}]
    )
    assert "labels that are not among 'neg', 'pos': 'meh'" in run("evaluate", trained[0], "--data", file, code=1).stderr


def test_a_method_that_leaves_the_head_frozen_is_refused(bert, reviews, tmp_path):
    args = ["train", "--task", "sequence-classification", "--model", bert, "--data", reviews, "--out", tmp_path / "run"]
    said = run(*args, "--method", "trainable-tokens", "method.token_indices=[9]", code=1).stderr
    assert "leaves the new head for sequence-classification as it is" in said


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["train", "no.yaml", "--debug"])
    assert result.exit_code == 1 and type(result.exception).__name__ == "RecipeError"


def test_a_full_disk_is_named(bert, reviews, tmp_path, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr("peft.model.PeftModel.save_pretrained", full)
    args = ["train", "--task", "sequence-classification", "--model", bert, "--data", reviews, "--out", tmp_path / "r"]
    args.append("training.max_steps=1")
    assert "No space is left on the device for adapter_model.safetensors" in run(*args, code=1).stderr


def test_every_command_has_help_with_an_example():
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert {"train", "evaluate", "predict", "generate", "init"} <= set(names)
    for name in names:
        assert "Example" in run(name, "--help").stdout, name


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, peft.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_init_writes_once(tmp_path):
    path = tmp_path / "r.yaml"
    assert f"peft train {path}" in run("init", "causal-lm", path).output
    assert "exists" in run("init", "causal-lm", path, code=1).stderr
    assert run("init", "seq2seq", "-").stdout.startswith("# A recipe for seq2seq")
