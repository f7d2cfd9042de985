"""Looking, comparing, reporting and shipping from the command line, on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import recipe_data as data
from peft.cli import app
from peft.recipes.methods import methods
from peft.recipes.order import Order
from peft.recipes.runs import load_run
from test_cli import run, runner


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return data.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def recipe(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    reviews = data.write_csv(folder / "reviews.csv", data.reviews(100))
    path = folder / "recipe.yaml"
    path.write_text(
        f"task: sequence-classification\nmodel: {bert}\nmethod: {{name: lora, r: 4, lora_alpha: 8}}\n"
        f"data: {{train: {reviews}, max_length: 32}}\ntraining: {{epochs: 2, learning_rate: 0.01}}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "lora"
    run("train", recipe, "--out", out, "--quiet")
    return out


def is_self_contained(page: str) -> bool:
    return not re.search(r'(?:src|href)="(?!data:)|@import|url\((?!data:)', page)


def test_methods_lists_what_is_registered_with_counts(bert):
    found = {r["method"]: r for r in json.loads(run("methods", "--model", bert, "--json").stdout)}
    assert set(found) == set(methods())
    head = 2 * 32 + 2
    assert found["lora"]["parameters"] == head + 2 * 2 * 8 * (32 + 32) and found["lora"]["paper"] == "2106.09685"
    assert found["head"]["parameters"] == head and found["full"]["share"] == 1.0
    assert found["lora"]["merges"] is True
    assert "2106.09685" in run("methods").output


def test_plan_tells_modules_memory_and_time_and_changes_nothing(recipe):
    found = json.loads(run("plan", recipe, "--json").stdout)
    assert found["kinds"] == {"query": 2, "value": 2} and found["trained_parameters"] == 2 * 32 + 2 + 4 * 4 * 64
    assert found["gradients"] == 4 * found["trained_parameters"] and found["optimizer"] == 2 * found["gradients"]
    assert found["weights"] == 4 * found["parameters"] and found["activations"] > 10_000
    assert found["process"] > found["weights"] + found["activations"]
    assert found["steps"] == 20 and found["step_seconds"] > 0
    assert "memory: activations" in run("plan", recipe).output


def test_inspect_shows_the_change_of_each_layer(trained):
    found = json.loads(run("inspect", trained, "--json").stdout)
    assert (found["method"], found["task"], found["options"]["r"]) == ("LORA", "SEQ_CLS", 4)
    model, _ = load_run(trained)
    name = found["layers"][0]["name"]
    layer = model.get_base_model().get_submodule(name)
    delta = layer.get_delta_weight("default").norm().item()
    assert found["layers"][0]["norm"] == pytest.approx(delta, rel=1e-4)
    assert found["layers"][0]["share"] == pytest.approx(delta / layer.get_base_layer().weight.norm().item(), rel=1e-4)
    assert len(found["layers"]) == 4 and not found["not_finite"]
    assert "█" in run("inspect", trained).output
    assert "norm" in run("inspect", trained, "--no-base").output


def test_the_report_of_a_run_needs_nothing_else(trained):
    run("report", trained)
    page = (trained / "report.html").read_text()
    assert is_self_contained(page) and page.count("data:image/png") >= 3
    for said in (
        "accuracy",
        "Confusion matrix",
        "Examples it gets wrong",
        "trained parameters",
        "viewport",
        "@media print",
    ):
        assert said in page, said
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def in_this_process(arguments, log):
    """Stands for a process of its own, which takes seconds to start."""
    result = runner.invoke(app, arguments, env={"NO_COLOR": "1", "COLUMNS": "200"})
    log.write_text(result.output)
    return result.exit_code


def test_comparing_starts_processes(recipe, tmp_path):
    run("compare", recipe, "--methods", "head", "--out", tmp_path / "one", "training.max_steps=2")
    (only,) = json.loads((tmp_path / "one" / "comparison.json").read_text())["runs"]
    assert only["report"]["steps"] == 2 and "parameters train" in (tmp_path / "one" / "head-0" / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_stopped_leaves_nobody_behind_and_goes_on(recipe, tmp_path, number):
    """In the background of a shell Ctrl-C is ignored, by children too; SIGTERM went to the parent alone."""
    out = tmp_path / "stopped"
    args = ["compare", str(recipe), "--methods", "head", "--out", str(out), "epochs=200"]
    # However the tests were started: what ignores Ctrl-C hands that down.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "peft", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as process:
        deadline = time.monotonic() + 120
        while not any((out / "head-0").glob("checkpoints/*/trainer_state.json")):  # it trains
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "The same command goes on from here." in said
    log = (out / "head-0" / "log.txt").read_text()
    stopped = re.search(r"Stopped at step (\d+) of", log)
    assert stopped, log
    assert (out / "head-0" / "checkpoints" / f"checkpoint-{stopped[1]}").exists()


def test_comparing_survives_a_failure_resumes_and_reports(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.recipes.compare._start", in_this_process)
    out = tmp_path / "compared"
    args = ["compare", recipe, "--methods", "lora,head,full", "--seeds", 2, "--out", out, "training.max_steps=4"]
    # A run that cannot work: its folder of checkpoints is a file.
    (out / "head-1").mkdir(parents=True)
    (out / "head-1" / "checkpoints").write_text("in the way")
    said = run(*args).output
    comparison = json.loads((out / "comparison.json").read_text())
    runs = {(r["method"], r["seed"]): r for r in comparison["runs"]}
    assert len(runs) == 6 and runs["head", 1]["error"] and runs["head", 1]["report"] is None
    assert all(r["report"] for key, r in runs.items() if key != ("head", 1))
    assert runs["lora", 0]["report"]["learning_rate"] == 0.01 != runs["full", 0]["report"]["learning_rate"]
    assert runs["lora", 0]["report"]["options"] == {"r": 4, "lora_alpha": 8}
    page = (out / "report.html").read_text()
    assert is_self_contained(page) and "Failures" in page and page.count("data:image/png") >= 6 and "±" in page
    assert "failed" in said
    (out / "head-1" / "checkpoints").unlink()
    before = (out / "lora-0" / "metrics.json").stat().st_mtime_ns
    run(*args)
    assert (out / "lora-0" / "metrics.json").stat().st_mtime_ns == before
    assert not any(r["error"] for r in json.loads((out / "comparison.json").read_text())["runs"])
    assert "holds a comparison by another recipe" in run(*args, "epochs=7", code=1).stderr


def test_a_search_chooses_a_rate_on_the_validation_rows(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.recipes.compare._start", in_this_process)
    out = tmp_path / "searched"
    run("compare", recipe, "--methods", "head", "--search", "--out", out, "training.max_steps=8")
    tried = {p.name: json.loads((p / "metrics.json").read_text()) for p in (out / "search").iterdir()}
    assert len(tried) == 3
    (chosen,) = json.loads((out / "comparison.json").read_text())["runs"]
    best = max(t["validation"]["accuracy"] for t in tried.values())
    used = next(t for t in tried.values() if t["learning_rate"] == chosen["report"]["learning_rate"])
    assert used["validation"]["accuracy"] == best


def test_merge_writes_a_plain_model(trained, tmp_path):
    said = run("merge", trained, tmp_path / "plain").output
    assert "AutoModelForSequenceClassification" in said
    model, task = load_run(trained)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.id2label == {0: "neg", 1: "pos"}
    inputs = task.tokenizer("the film was fine", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    assert "is not empty" in run("merge", trained, tmp_path / "plain", code=1).stderr


def test_convert_writes_lora_with_the_same_outputs(trained, tmp_path):
    said = run("convert", trained, tmp_path / "converted", "--rank", 4).output
    assert "misses 0.00% of the change" in said
    one, task = load_run(trained)
    other, _ = load_run(tmp_path / "converted")
    inputs = task.tokenizer("the film was fine", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(one(**inputs).logits, other(**inputs).logits, atol=1e-4, rtol=1e-3)
    lossy = run("convert", trained, tmp_path / "small", "--rank", 1).output
    assert float(re.search(r"misses ([\d.]+)%", lossy)[1]) > 0.1
    same = run("convert", trained, tmp_path / "same", "--to", "peft").output
    assert "holds LORA, in this library's files" in same and "differ by 0.0e+00" in same


def test_a_whole_model_becomes_lora_and_virtual_tokens_do_not(recipe, tmp_path):
    for method in ("full", "prefix-tuning"):
        args = [
            "train",
            recipe,
            f"method={method}",
            "training.max_steps=2",
            "--out",
            tmp_path / method,
            "-q",
            "--no-report",
        ]
        run(*args)
    said = run("convert", tmp_path / "full", tmp_path / "lora", "--rank", 64).output
    assert "LoRA of rank 48" in said or "LoRA of rank 32" in said
    assert "0.00% in the worst layer" in said and "is in biases, norms and embeddings, which LoRA does not hold" in said
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert "no change of a weight" in run("convert", tmp_path / "prefix-tuning", tmp_path / "x", code=1).stderr


def test_prefix_tuning_and_p_tuning_v2_become_each_other(recipe, tmp_path):
    options = ["training.max_steps=2", "--out", tmp_path / "run", "-q", "--no-report"]
    run("train", recipe, "method=p-tuning-v2", "method.reparameterization=mlp", *options)
    said = run("convert", tmp_path / "run", tmp_path / "prefix", "--to", "prefix-tuning").output
    assert "holds PREFIX_TUNING, in this library's files" in said and "differ by 0.0e+00" in said
    said = run("convert", tmp_path / "prefix", tmp_path / "again", "--to", "p-tuning-v2").output
    assert "holds P_TUNING_V2, in this library's files" in said and "differ by 0.0e+00" in said
    options = ["training.max_steps=2", "--out", tmp_path / "one", "-q", "--no-report"]
    run("train", recipe, "method=p-tuning-v2", "method.layers=[1]", *options)
    said = run("convert", tmp_path / "one", tmp_path / "x", "--to", "prefix-tuning", code=1).stderr
    assert "layers [0] have no virtual tokens" in " ".join(said.split())
    said = run("convert", tmp_path / "run", tmp_path / "x", "--to", "prefix", code=1).stderr
    assert "lora, peft, prefix-tuning, p-tuning-v2" in " ".join(said.split())


def test_a_file_of_lycoris_becomes_an_adapter_of_this_library(bert, tmp_path):
    from safetensors.torch import save_file

    slots = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
    name = "lycoris_encoder_layer_0_attention_self_query"
    torch.manual_seed(0)
    save_file({f"{name}.{slot}": torch.randn(shape) for slot, shape in slots.items()}, tmp_path / "a.safetensors")
    said = run("convert", tmp_path / "a.safetensors", tmp_path / "loha", "--to", "peft", "--base", bert).output
    assert (
        "holds LOHA" in said
        and json.loads((tmp_path / "loha" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    )
    said = run("convert", tmp_path / "a.safetensors", tmp_path / "lora", "--base", bert).output
    assert "misses 0.00% of the change" in said
    assert "name it with --base" in run("convert", tmp_path / "a.safetensors", tmp_path / "x", code=1).stderr


def test_export_agrees_with_torch(trained, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    said = run("export", trained, tmp_path / "onnx", "--int8").output
    assert (tmp_path / "onnx" / "model.onnx").exists() and (tmp_path / "onnx" / "model-int8.onnx").exists()
    assert said.count("outputs within") == 2
    import onnxruntime

    model, task = load_run(trained)
    texts = ["the film was fine", "dull and a very poor story in it", "Ann"]  # another number and length than at export
    inputs = task.tokenizer(texts, padding=True, return_tensors="pt")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    names = {i.name for i in session.get_inputs()}
    found = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs).logits, atol=1e-4, rtol=1e-3)


def test_several_tasks_share_one_base(bert, tmp_path):
    reviews = data.write_csv(tmp_path / "reviews.csv", data.reviews(80))
    entities = data.write_json_lines(tmp_path / "entities.jsonl", data.entities())
    path = tmp_path / "tasks.yaml"
    path.write_text(
        f"model: {bert}\nout: {tmp_path / 'run'}\ntraining: {{epochs: 6, learning_rate: 0.02}}\ntasks:\n"
        f"  mood: {{task: sequence-classification, data: {reviews}}}\n"
        f"  topic: {{task: sequence-classification, data: {reviews}, method: prefix-tuning, training: {{epochs: 1}}}}\n"
        f"  names: {{task: token-classification, data: {{train: {entities}, max_length: 48}}}}\n"
    )
    said = run("train", path).output
    assert "3 adapters take" in said and "Switching from one to the next takes" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert is_self_contained(page) and "3 tasks on one base" in page and "names: Where it is right" in page
    adapters = ",".join(f"{name}={tmp_path / 'run' / name}" for name in ("mood", "topic", "names"))
    texts = ["Ann lives in Rome the film was lovely", "a dull story", "Bob lives in Oslo"]
    together = [json.loads(line) for line in run("predict", "--adapters", adapters, *texts).stdout.splitlines()]

    def alone(name):
        return [json.loads(line) for line in run("predict", tmp_path / "run" / name, *texts).stdout.splitlines()]

    assert [t["names"]["entities"] for t in together] == [a["entities"] for a in alone("names")]
    for name in ("mood", "topic"):
        assert [t[name]["score"] for t in together] == pytest.approx([a["score"] for a in alone(name)], abs=1e-4)
    assert [json.loads(line) for line in run("predict", tmp_path / "run", *texts).stdout.splitlines()] == together
    assert together[0]["names"]["entities"]
    mood = tmp_path / "run" / "mood"
    for wrong, message in (
        ("mood", "name=folder"),
        (f"a={mood},a={mood}", "names 'a' twice"),
        ("a=nowhere", "no folder 'nowhere'"),
    ):
        assert message in run("predict", "--adapters", wrong, "x", code=1).stderr
    assert "holds several tasks: name one of" in run("evaluate", tmp_path / "run", code=1).stderr


@pytest.fixture(scope="module")
def shared_tasks(bert, tmp_path_factory):
    """A recipe of two tasks that train one adapter together."""
    return data.write_shared_recipe(tmp_path_factory.mktemp("shared"), bert)


@pytest.mark.parametrize("method", ["p-tuning-v2", "lora", "prompt-tuning", "bottleneck"])
def test_tasks_train_one_adapter_together(shared_tasks, tmp_path, method):
    out = tmp_path / "run"
    said = run("train", shared_tasks, "--out", out, *([] if method == "p-tuning-v2" else [f"method={method}"])).output
    assert "— mood: sequence-classification —" in said and "mood.accuracy" in said and "2 adapters take" in said
    weights = {n: load_file(out / n / "adapter_model.safetensors") for n in ("mood", "names")}
    heads = {n: {k for k in w if "classifier" in k} for n, w in weights.items()}
    assert heads["mood"] and heads["names"]
    common = weights["mood"].keys() - heads["mood"]
    assert common and common == weights["names"].keys() - heads["names"]
    assert all(torch.equal(weights["mood"][k], weights["names"][k]) for k in common)
    reports = json.loads((out / "metrics.json").read_text())["tasks"]
    if method == "lora":  # prompts hardly learn on a model of random weights
        assert reports["mood"]["test"]["accuracy"] >= 0.8
    assert any("eval_accuracy" in e for e in reports["mood"]["history"]) and any(
        "eval_f1" in e for e in reports["names"]["history"]
    )
    # Measured through the folders, as it was while it trained: the best score is the mean of what the two say of the same rows.
    best = reports["mood"]["best"]
    found = [reports["mood"]["validation"]["accuracy"], reports["names"]["validation"]["f1"]]
    assert best["metric"] == "score" and best["value"] == pytest.approx(sum(found) / 2, abs=1e-6)
    texts = ["Ann lives in Rome the film was lovely", "a dull story"]
    for line, alone in zip(
        run("predict", out, *texts).stdout.splitlines(),
        run("predict", out / "mood", *texts).stdout.splitlines(),
        strict=True,
    ):
        assert json.loads(line)["mood"]["score"] == pytest.approx(json.loads(alone)["score"], abs=1e-4)
    assert (
        "holds the finished run already"
        in run(
            "train", shared_tasks, "--out", out, "--resume", *([] if method == "p-tuning-v2" else [f"method={method}"])
        ).output
    )


def test_tasks_that_train_together_go_on_where_they_were_stopped(shared_tasks, tmp_path, monkeypatch):
    from peft.recipes import training

    begin = training.Progress.on_step_begin

    def interrupt(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    run("train", shared_tasks, "--out", tmp_path / "whole", "epochs=2")
    monkeypatch.setattr(training.Progress, "on_step_begin", interrupt)
    assert "Stopped at step 6" in run("train", shared_tasks, "--out", tmp_path / "stopped", "epochs=2", code=130).stderr
    monkeypatch.undo()
    assert "Going on from" in run("train", shared_tasks, "--out", tmp_path / "stopped", "epochs=2", "--resume").output
    for name in ("mood", "names"):
        one, other = (load_file(tmp_path / n / name / "adapter_model.safetensors") for n in ("whole", "stopped"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method=full"], "`shared` is for adapters"),
        (["training.gradient_checkpointing=true"], "gradient_checkpointing is not there"),
        (["tasks.mood.method.name=lora"], "tasks.mood.method belongs beside `tasks`"),
        (["tasks.mood.training.epochs=3"], "tasks.mood.training belongs beside `tasks`"),
    ],
)
def test_what_tasks_cannot_share_is_refused(shared_tasks, tmp_path, changes, message):
    assert message in run("train", shared_tasks, "--out", tmp_path / "run", *changes, code=1).stderr


def test_batches_of_several_kinds_are_of_one_kind_each():
    kinds = ["a"] * 10 + ["b"] * 7
    order = Order([len(str(i)) for i in range(17)], 4, 0, True, kinds)
    rows = list(order)
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert len(rows) == len(order) == 20 and all(len({kinds[i] for i in b}) == 1 for b in batches)
    assert set(rows) == set(range(17))
    order.set_epoch(1)
    assert list(order) != rows
