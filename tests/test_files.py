"""Files: written whole or not at all, read with suspicion."""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import tiny
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.core.files import write_atomically
from settings import logits, randomise

BASE = tiny.LLAMA
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(BASE.build(), LoraConfig(task_type="CAUSAL_LM")).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def at_once(work, times, threads=8):
    """Do ``work(thread, round)`` in several threads that start each round together."""
    start = threading.Barrier(threads, timeout=10)

    def rounds(thread):
        for number in range(times):
            start.wait()
            work(thread, number)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rounds, range(threads)))


def test_several_writers_make_the_same_new_folders_and_the_users_permissions_stay(tmp_path):
    before = os.umask(0o027)
    try:
        at_once(lambda t, n: write_atomically(tmp_path / str(n) / "deep", {f"file-{t}": b"x"}), times=100)
        assert os.umask(0o027) == 0o027
        files = list(tmp_path.glob("*/deep/*"))
        assert len(files) == 800 and {f.stat().st_mode & 0o777 for f in files} == {0o640}
    finally:
        os.umask(before)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written(saved):
    _, folder = saved
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", WEIGHTS]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["peft_version"] == "1.0.0"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "CAUSAL_LM" in card


def test_a_card_with_text_of_the_users_keeps_it(saved):
    model, folder = saved
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "My own words." in card and "license: mit" in card and "library_name: peft" in card


def test_other_adapters_get_folders_of_their_own_and_can_be_selected(saved, tmp_path):
    model, _ = saved
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / "other" / WEIGHTS).exists() and (tmp_path / "all" / WEIGHTS).exists()
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert (tmp_path / "one" / "other" / WEIGHTS).exists() and not (tmp_path / "one" / WEIGHTS).exists()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    loaded = PeftModel.from_pretrained(BASE.build(), tmp_path / "all", subfolder="other")
    assert loaded.peft_config["default"].r == 2


def test_saving_again_replaces_and_leaves_no_temporary_files(saved):
    model, folder = saved
    randomise(model, seed=9)
    model.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert torch.equal(logits(PeftModel.from_pretrained(BASE.build(), folder), BASE), logits(model, BASE))


def test_no_pickles_are_written(saved, tmp_path):
    model, _ = saved
    with pytest.warns(UserWarning, match="safetensors only"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert (tmp_path / "new" / WEIGHTS).exists()


def test_a_failed_write_leaves_the_old_files_whole(saved, monkeypatch):
    model, folder = saved
    before = {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    randomise(model, seed=9)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {f: (folder / f).read_bytes() for f in os.listdir(folder)} == before


def empty(model, write):
    for n, p in model.named_parameters():
        if "lora_A" in n:
            p.data = p.data.new_empty(0)  # as sharding leaves what another process holds


def nowhere(model, write):
    for module in model.modules():
        if "default" in getattr(module, "lora_A", {}):
            module.lora_A["default"].to_empty(device="meta")


def without_one(model, write):
    write.setattr(
        "safetensors.torch.save_file", lambda tensors, *rest, **more: real(dict([*tensors.items()][1:]), *rest, **more)
    )


def shorter(model, write):
    def save(tensors, *rest, **more):
        real({k: t[:1].clone() for k, t in tensors.items()}, *rest, **more)

    write.setattr("safetensors.torch.save_file", save)


real = safetensors.torch.save_file


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, "has tensors without values: .*lora_A.*sharded"),
        (nowhere, "meta"),
        (without_one, "is not what had to be, so nothing was saved"),
        (shorter, "is not what had to be, so nothing was saved"),
    ],
)
def test_an_empty_or_partial_adapter_never_takes_the_place_of_a_file(spoil, message, saved, tmp_path, monkeypatch):
    model, folder = saved
    before = {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    spoil(model, monkeypatch)
    for target in (folder, tmp_path / "new"):
        with pytest.raises((RuntimeError, OSError), match=message):
            model.save_pretrained(target)
    assert {f: (folder / f).read_bytes() for f in os.listdir(folder)} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(saved, keep):
    _, folder = saved
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    model = BASE.build()
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        PeftModel.from_pretrained(model, folder)
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model, BASE), logits(BASE.build(), BASE))


def test_wrong_shapes_name_the_tensor_and_leave_the_model(saved):
    _, folder = saved
    edit(folder, r=4)
    model = BASE.build()
    with pytest.raises(ValueError, match=r"do not fit the model \(8\).*the file has \(8, 32\), the model \(4, 32\)"):
        PeftModel.from_pretrained(model, folder)
    assert not hasattr(model, "peft_config") and "lora" not in str(model)
    with pytest.warns(UserWarning, match="8 tensors of .* have other shapes"):
        loaded = PeftModel.from_pretrained(BASE.build(), folder, ignore_mismatched_sizes=True)
    assert torch.equal(logits(loaded, BASE), logits(BASE.build(), BASE))


def test_missing_and_unexpected_keys(saved, monkeypatch):
    model, folder = saved
    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors))
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = tensors.pop(first)
    save_file(tensors, folder / WEIGHTS)
    with pytest.warns(UserWarning) as caught:
        loaded = PeftModel.from_pretrained(BASE.build(), folder)
    text = " ".join(str(w.message) for w in caught)
    assert f"lacks 1 tensors of adapter 'default': '{first}'" in text
    assert "holds 1 tensors that the model has no place for: 'base_model.model.model.layers.7" in text
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        PeftModel.from_pretrained(BASE.build(), folder, strict=True)
    monkeypatch.setenv("PEFT_STRICT", "1")
    plain = BASE.build()
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        PeftModel.from_pretrained(plain, folder)
    assert not hasattr(plain, "peft_config")
    names = list(model.peft_config)
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == names and not any("other" in n for n, _ in model.named_parameters())


def test_a_file_from_a_newer_version(saved):
    _, folder = saved
    edit(folder, brand_new_option=3, peft_version="9.0.0")
    with pytest.warns(UserWarning, match="does not know the keys 'brand_new_option' .*9.0.0") as caught:
        PeftModel.from_pretrained(BASE.build(), folder)
    assert sum("brand_new_option" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not valid JSON"),
        ("[1, 2]", "should hold a JSON object, found a list"),
        ('{"peft_type": "LORRA"}', "Unknown PEFT type 'LORRA' .*did you mean 'LORA'"),
        ('{"peft_type": "XLORA"}', "XLORA is not built"),
        ('{"peft_type": "LORA", "r": 0}', "`r` should be a positive integer"),
        ('{"peft_type": "LORA", "r": "8"}', "`r` should be an integer, got '8'"),
        ('{"peft_type": "LORA", "use_qalora": true}', "use_qalora=True is not built"),
        ('{"peft_type": "LORA", "task_type": "SEQCLS"}', "Unknown task_type 'SEQCLS'"),
    ],
)
def test_bad_configurations(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_folders_without_an_adapter(saved, tmp_path):
    with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{re.escape(str(tmp_path))}'"):
        PeftModel.from_pretrained(BASE.build(), tmp_path)
    _, folder = saved
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="Can't find weights for the adapter"):
        PeftModel.from_pretrained(BASE.build(), folder)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PEFT_TEST_BOMB"],))


def test_a_pickle_with_code_is_not_run(saved, tmp_path, monkeypatch):
    _, folder = saved
    monkeypatch.setenv("PEFT_TEST_BOMB", str(tmp_path / "exploded"))
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="such files are not run"):
        PeftModel.from_pretrained(BASE.build(), folder)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_of_tensors_is_read(saved):
    model, folder = saved
    torch.save(load_peft_weights(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(BASE.build(), folder), BASE), logits(model, BASE))


def test_keys_can_be_renamed_while_loading(saved):
    model, folder = saved
    tensors = {k.replace("self_attn", "attention"): v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    loaded = PeftModel.from_pretrained(BASE.build(), folder, key_mapping={"attention": "self_attn"}, strict=True)
    assert torch.equal(logits(loaded, BASE), logits(model, BASE))


def test_a_partial_state_dict_is_never_saved(saved, tmp_path):
    model, _ = saved
    state = model.state_dict()
    key = next(k for k in state if "lora_A" in k)
    del state[key]
    with pytest.raises(RuntimeError, match=f"lacks 1 tensors of adapter 'default': '{key}'"):
        model.save_pretrained(tmp_path / "new", state_dict=state)
    assert not (tmp_path / "new").exists()


def test_an_existing_adapter_takes_new_weights_in_place(saved):
    model, folder = saved
    expected = logits(model, BASE)
    parameters = dict(model.named_parameters())
    randomise(model, seed=3)
    model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model, BASE), expected)
    assert all(parameters[n] is p for n, p in model.named_parameters())  # an optimiser's references stay valid


def test_is_trainable(saved):
    _, folder = saved
    model = PeftModel.from_pretrained(BASE.build(), folder, is_trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora" in n
    }
    assert model.peft_config["default"].inference_mode is False


def test_resized_embeddings_are_saved_with_the_adapter(tmp_path):
    BASE.build().save_pretrained(tmp_path / "base")

    def base():
        model = type(BASE.build()).from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(tiny.VOCAB + 4)
        return model.eval()

    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert tensors["base_model.model.model.embed_tokens.weight"].shape[0] == tiny.VOCAB + 4
    assert "base_model.model.lm_head.weight" in tensors
    other = type(BASE.build()).from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(tiny.VOCAB + 4)  # random new rows, replaced by the adapter's file
    assert torch.equal(
        logits(PeftModel.from_pretrained(other, tmp_path / "adapter", strict=True), BASE), logits(model, BASE)
    )
    model.save_pretrained(tmp_path / "small", save_embedding_layers=False)
    assert not any("embed" in k for k in load_file(tmp_path / "small" / WEIGHTS))


def test_auto_model_finds_the_base(tmp_path):
    BASE.build().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        type(BASE.build()).from_pretrained(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM")
    ).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, BASE), logits(model, BASE))
    from peft import AutoPeftModel, AutoPeftModelForSeq2SeqLM

    assert type(AutoPeftModel.from_pretrained(tmp_path / "adapter")) is type(model)
    with pytest.raises(ValueError, match="for SEQ_2_SEQ_LM, but this one is for CAUSAL_LM"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModelForCausalLM()


def test_half_precision_files_load_into_float32_adapters(saved, tmp_path):
    model, folder = saved
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    loaded = PeftModel.from_pretrained(BASE.build(), folder)
    assert all(t.dtype == torch.float32 for t in get_peft_model_state_dict(loaded).values())
    assert (logits(loaded, BASE) - logits(model, BASE)).abs().max() < 0.05


def test_state_dicts_with_any_prefix_are_accepted(saved):
    model, _ = saved
    state = get_peft_model_state_dict(model)
    for prefix in ("base_model.model.", "base_model.", ""):
        renamed = {prefix + k.removeprefix("base_model.model."): v.clone() for k, v in state.items()}
        other = get_peft_model(BASE.build(), LoraConfig(task_type="CAUSAL_LM"))
        result = set_peft_model_state_dict(other, renamed)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(logits(other.eval(), BASE), logits(model, BASE))
