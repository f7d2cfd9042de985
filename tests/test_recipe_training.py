"""How recipes train: batches of a step, precision, and what is refused before or while it goes wrong."""

from __future__ import annotations

import pytest
import torch

import peft
import recipe_data as data
from peft.recipes.errors import RecipeError
from test_recipe_tasks import pairs


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"bert": str(data.save_bert(folder / "bert")), "llama": str(data.save_llama(folder / "llama"))}


ROWS = {
    "sequence-classification": ("bert", data.reviews(40)),
    "token-classification": ("bert", data.entities()),
    "causal-lm": ("llama", pairs()),
}


@pytest.fixture
def train(bases, tmp_path):
    def run(task="sequence-classification", *overrides, **more):
        base, rows = ROWS[task]
        recipe = {
            "task": task, "model": {"name": bases[more.pop("base", base)]}, "method": "lora",
            "data": {"train": rows, "max_length": 32, "validation_size": 0, "test_size": 4}, "out": str(tmp_path / "run"),
            "training": {"max_steps": 2, "learning_rate": 0.01, "trainer": {"logging_steps": 1}},
        }  # fmt: skip
        return peft.finetune(recipe | more, *overrides, tell=None, overwrite=True)

    return run


def steps(result, key="loss"):
    return [entry[key] for entry in result.history if key in entry]


@pytest.mark.parametrize("task", ROWS)
def test_a_step_of_several_batches_is_that_of_one_batch_as_large(train, task):
    steady = ["training.length_grouping=false"] + (
        ["model.config.hidden_dropout_prob=0.0"] if ROWS[task][0] == "bert" else []
    )
    one = train(task, "training.batch_size=8", *steady)
    several = train(task, "training.batch_size=2", "training.gradient_accumulation=4", *steady)
    # Batches of tokens differ in how many of them count, where a step's mean is one of means.
    assert steps(several) == pytest.approx(steps(one), rel=1e-4)
    assert steps(several, "grad_norm") == pytest.approx(steps(one, "grad_norm"), rel=1e-3)


def test_bfloat16_on_a_cpu_and_checkpointing(train):
    plain, again = train(), train("sequence-classification", "training.gradient_checkpointing=true")
    half = train("sequence-classification", "training.mixed_precision=bf16")
    whole = train("sequence-classification", "model.dtype=bfloat16")
    assert steps(again) == pytest.approx(steps(plain), rel=1e-5)
    for other in (half, whole):
        assert steps(other) == pytest.approx(steps(plain), rel=0.05) and steps(other) != steps(plain)
    model, _ = whole.load()
    kinds = {n.rpartition(".")[2]: p.dtype for n, p in model.named_parameters() if "query.base_layer.weight" in n}
    assert kinds == {"weight": torch.bfloat16}


@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="this machine has the precision that is refused without a GPU"
)
def test_float16_without_a_gpu_is_refused(train):
    with pytest.raises(RecipeError, match="mixed_precision is fp16, which needs a GPU"):
        train("sequence-classification", "training.mixed_precision=fp16")


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("sequence-classification", {"training.learning_rate": "1e30"}, r"The loss is nan at step \d+: .* Lower training.learning_rate"),
        ("sequence-classification", {"model.dtype": "float16", "method": "full"}, "would train weights in float16, where updates get lost"),
        ("sequence-classification", {"training.early_stopping": "2"}, "early_stopping needs rows to evaluate on"),
        ("sequence-classification", {"examples": "['']"}, "An example cannot be answered: its text is empty"),
        ("causal-lm", {"base": "bert"}, "is a bert whose tokens see those that follow"),
    ],
)  # fmt: skip
def test_what_cannot_learn_is_refused(train, task, more, message):
    base = {"base": more.pop("base")} if "base" in more else {}
    with pytest.raises(RecipeError, match=message):
        train(task, *(f"{key}={value}" for key, value in more.items()), "training.max_steps=8", **base)


def test_another_method_in_the_same_folder_leaves_nothing_of_the_first(train, tmp_path):
    train()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    result = train("sequence-classification", "method=full")
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    model, _ = result.load()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_examples_of_the_recipe_are_answered_at_the_end(train):
    result = train("sequence-classification", 'examples=["the film was fine"]')
    (answer,) = result.report["examples"]
    assert answer["text"] == "the film was fine" and answer["label"] in ("neg", "pos")
    page = result.write_report().read_text()
    assert "the film was fine" in page and f"{answer['label']} ({answer['score']:.0%})" in page
