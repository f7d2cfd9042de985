"""Multitask prompt tuning: a row has the virtual tokens of its task; starts from a source; wrong tasks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from peft import LoraConfig, MultitaskPromptTuningConfig, PeftModel, PromptTuningConfig, get_peft_model
from settings import randomise

BASES = pytest.mark.parametrize("base", [tiny.BERT, tiny.GPT2, tiny.LLAMA, tiny.T5], ids=lambda b: b.name)
TASKS = torch.tensor([2, 0, 1, 2])


def config(base: tiny.Tiny, **options) -> MultitaskPromptTuningConfig:
    return MultitaskPromptTuningConfig(
        **{"task_type": base.task_type, "num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2, **options}
    )


def trained(base: tiny.Tiny, **options) -> PeftModel:
    model = get_peft_model(base.build(), config(base, **options)).eval()
    randomise(model, scale=1.0)
    return model


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def row(inputs, index):
    return {k: v[index : index + 1] for k, v in inputs.items()}


@BASES
def test_each_row_has_the_virtual_tokens_of_its_task(base, tmp_path):
    model, inputs = trained(base), base.inputs()
    found = run(model, inputs, task_ids=TASKS)
    assert torch.equal(run(model, inputs, task_ids=TASKS.tolist()), found)
    table = model.prompt_encoder["default"]
    for index, task in enumerate(TASKS.tolist()):
        # Plain prompt tuning with the product that the paper defines.
        plain = get_peft_model(base.build(), PromptTuningConfig(task_type=base.task_type, num_virtual_tokens=4)).eval()
        change = table.prefix_task_cols[task] @ table.prefix_task_rows[task]
        with torch.no_grad():
            plain.prompt_encoder["default"].embedding.weight.copy_(table.embedding.weight * change)
        head = {n: p for n, p in model.state_dict().items() if "modules_to_save" in n}
        plain.load_state_dict(head, strict=False)
        torch.testing.assert_close(run(plain, row(inputs, index)), found[index : index + 1], atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    rows = 8 if base is tiny.T5 else 4
    assert shapes["prefix_task_cols"] == (3, rows, 2) and shapes["prefix_task_rows"] == (
        3,
        2,
        table.embedding.weight.shape[1],
    )
    for is_trainable in (False, True):
        read = PeftModel.from_pretrained(base.build(), tmp_path, is_trainable=is_trainable).eval()
        assert torch.equal(run(read, inputs, task_ids=TASKS), found)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs, task_ids=TASKS), run(model, inputs))


@pytest.mark.parametrize("base", [tiny.LLAMA, tiny.T5], ids=lambda b: b.name)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_generation_gives_each_row_what_it_gets_alone(base, options):
    model, inputs = trained(base), base.inputs()
    inputs.pop("decoder_input_ids", None)
    options |= {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def generated(inputs, tasks):
        found = model.generate(**inputs, task_ids=tasks, **options)
        return found.sequences, found.logits[0].view(len(tasks), -1, tiny.VOCAB)

    sequences, first = generated(inputs, TASKS)
    for index in range(4):
        alone, own_first = generated(row(inputs, index), TASKS[index : index + 1])
        assert torch.equal(sequences[index], alone[0])
        torch.testing.assert_close(first[index], own_first[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first, generated(inputs, (TASKS + 1) % 3)[1], atol=1e-3)


def test_only_the_tasks_of_a_batch_get_gradients():
    model = trained(tiny.LLAMA).train()
    model(**tiny.LLAMA.inputs(), labels=tiny.LLAMA.inputs()["input_ids"], task_ids=[2, 2, 0, 2]).loss.backward()
    table = model.prompt_encoder["default"]
    for tensor in (table.prefix_task_cols, table.prefix_task_rows):
        assert [bool(t.any()) for t in tensor.grad] == [True, False, True]
    assert table.embedding.weight.grad.any()


def test_compiled_with_tasks_that_are_not_known_beforehand():
    model, inputs = trained(tiny.LLAMA), tiny.LLAMA.inputs()
    inputs["use_cache"] = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tasks in (TASKS, (TASKS + 1) % 3):
        torch.testing.assert_close(
            run(compiled, inputs, task_ids=tasks), run(model, inputs, task_ids=tasks), atol=1e-5, rtol=1e-4
        )


def test_tasks_and_adapters_by_row_with_another_method_beside_them():
    base, inputs = tiny.LLAMA, tiny.LLAMA.inputs()
    model = trained(base)
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("plain", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    names = ["default", "lora", "plain", "default"]
    mixed = run(model, inputs, adapter_names=names, task_ids=TASKS)
    for index, name in enumerate(names):
        alone = run(model, row(inputs, index), adapter_names=[name], task_ids=TASKS[index : index + 1])
        torch.testing.assert_close(mixed[index : index + 1], alone, atol=1e-5, rtol=1e-4)
    made = model.generate(**inputs, adapter_names=names, task_ids=TASKS, max_new_tokens=4, do_sample=False)
    for index, name in enumerate(names):
        alone = model.generate(
            **row(inputs, index),
            adapter_names=[name],
            task_ids=TASKS[index : index + 1],
            max_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(made[index], alone[0])


def test_a_row_of_two_adapters_with_tasks_has_those_that_both_have():
    base, inputs = tiny.LLAMA, tiny.LLAMA.inputs()
    model = trained(base)
    model.add_adapter("few", config(base, num_tasks=2))
    rows = {"adapter_names": [("default", "few")] * 4}
    both = run(model, inputs, **rows, task_ids=torch.tensor([0, 1, 1, 0]))
    one = run(model, row(inputs, 1), adapter_names=[("default", "few")], task_ids=torch.tensor([1]))
    torch.testing.assert_close(both[1:2], one, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"holds \[2\], but the adapter has 2 tasks: 0 to 1"):
        run(model, inputs, **rows, task_ids=torch.tensor([0, 1, 2, 0]))


def test_one_task_needs_no_numbers_and_transformers_loads_it(tmp_path):
    model, inputs = trained(tiny.LLAMA, num_tasks=1), tiny.LLAMA.inputs()
    found = run(model, inputs, task_ids=[0] * 4)
    assert torch.equal(run(model, inputs), found)
    model.save_pretrained(tmp_path / "adapter")
    tiny.LLAMA.build().save_pretrained(tmp_path / "base")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(run(native.eval(), inputs), found[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["adapter_model.safetensors", ""], ids=["file", "folder"])
def test_starts_from_a_source(suffix, tmp_path):
    trained(tiny.LLAMA).save_pretrained(tmp_path)
    source = load_file(tmp_path / "adapter_model.safetensors")
    path = str(tmp_path / suffix)

    def start(kind, **options):
        options = {"prompt_tuning_init_state_dict_path": path, "num_tasks": 2, **options}
        return get_peft_model(
            tiny.LLAMA.build(), config(tiny.LLAMA, prompt_tuning_init=kind, **options)
        ).prompt_encoder["default"]

    for kind, wanted in (
        ("AVERAGE_SOURCE_TASKS", lambda t: t.mean(0)),
        ("EXACT_SOURCE_TASK", lambda t: t[1]),
        ("ONLY_SOURCE_SHARED", None),
    ):
        table = start(kind, prompt_tuning_init_task=1)
        assert torch.equal(table.embedding.weight, source["prompt_embeddings"])
        for name in ("prefix_task_cols", "prefix_task_rows"):
            for task in getattr(table, name):
                if wanted is None:
                    assert 0 < task.std() < 0.1  # its own start
                else:
                    torch.testing.assert_close(task, wanted(source[name]))
    for options, message in (
        ({"prompt_tuning_init_task": 3}, "has 3 tasks: 0 to 2"),
        ({"num_ranks": 5}, r"prefix_task_cols has shape \(1|prefix_task_cols has shape .*`num_ranks`"),
        ({"num_virtual_tokens": 3}, "prompt_embeddings has shape .*`num_virtual_tokens`"),
    ):
        with pytest.raises(ValueError, match=message):
            start("EXACT_SOURCE_TASK", **options)
    get_peft_model(tiny.LLAMA.build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ValueError, match="lacks prefix_task_cols"):
        start("EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path=str(tmp_path / "other"))


def test_wrong_tasks_are_errors():
    model, inputs = trained(tiny.LLAMA), tiny.LLAMA.inputs()
    before = run(model, inputs, task_ids=TASKS)
    for call in (model, lambda **kw: model.generate(**kw, max_new_tokens=2)):
        for tasks, message in (
            (None, "`task_ids` has to be given"),
            ([0, 1, 2], "has 3 numbers, but the batch has 4 rows"),
            (torch.tensor(0), r"shape \(batch,\)"),
            ([0.5] * 4, "whole numbers"),
            ([0, 1, 3, -1], r"holds \[-1, 3\], but the adapter has 3 tasks: 0 to 2"),
        ):
            with pytest.raises(ValueError, match=message):
                call(**inputs, task_ids=tasks)
    assert torch.equal(run(model, inputs, task_ids=TASKS), before)
    plain = get_peft_model(tiny.LLAMA.build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="this adapter's method has none"):
        plain(**inputs, task_ids=TASKS)
    model.add_adapter("plain", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.set_adapter("plain")
    with pytest.raises(ValueError, match="this adapter's method has none"):
        model(**inputs, task_ids=TASKS)
    model.set_adapter(["plain", "default"])
    with pytest.raises(ValueError, match="several adapters with virtual tokens are active"):
        model(**inputs, task_ids=TASKS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "`num_tasks`"),
        ({"num_ranks": 0}, "`num_ranks`"),
        ({"prompt_tuning_init": "AVERAGE_SOURCE"}, "did you mean 'AVERAGE_SOURCE_TASKS'"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "`prompt_tuning_init_state_dict_path` has to be given"),
        ({"prompt_tuning_init": "TEXT"}, "`prompt_tuning_init_text` has to be given"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        config(tiny.LLAMA, **options)
