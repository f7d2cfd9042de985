"""Adapters written by adapter-hub's library `adapters` load here and give the same outputs.

The comparison needs an environment with that library, named by PEFT_HUB_PYTHON (`make hub` makes one and runs this file); what
can be tested without it is.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peft import BottleneckConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.core.holder import adapted_modules

HUB = os.environ.get("PEFT_HUB_PYTHON", "")
needs_hub = pytest.mark.skipif(
    not os.path.exists(HUB), reason="PEFT_HUB_PYTHON names no interpreter with `adapters`: `make hub` makes one"
)

IDS = [[5, 9, 23, 7, 11, 30], [8, 40, 3, 12, 22, 19]]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 60}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60, "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
BASES = {
    "bert": ("BertConfig", "BertModel", SIZES, {}),
    "bert-head": ("BertConfig", "BertForSequenceClassification", SIZES, {}),
    "roberta": ("RobertaConfig", "RobertaModel", SIZES, {}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", DISTILBERT, {}),
    "bart": ("BartConfig", "BartModel", BART, {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, "num_key_value_heads": 2}, {}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 60},
        {},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}, {}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, {"decoder_input_ids": [row[::-1] for row in IDS]}),
}
REQUEST = {
    name: {"config": config, "model": model, "values": values, "inputs": {"input_ids": IDS, **more}}
    for name, (config, model, values, more) in BASES.items()
}
OTHER = {
    "mh_adapter": True, "output_adapter": True, "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "reduction_factor": {"1": 4, "default": 8}, "non_linearity": "gelu", "ln_before": True, "leave_out": [0], "scaling": 2.0,
}  # fmt: skip
CASES = [(base, kind) for base in BASES for kind in ("seq_bn", "double_seq_bn", "par_bn")]
CASES += [("bert", OTHER), ("llama", OTHER), ("gpt2", {**OTHER, "mh_adapter": False, "scaling": "learned"})]
CONFIG = {
    "config": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True},
    "model_type": "bert", "model_class": "BertModel", "name": "some",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that the other library wrote, by number of the case."""
    folder = tmp_path_factory.mktemp("hub")
    worker = Path(__file__).with_name("adapter_hub_worker.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    request = json.dumps({"bases": REQUEST, "cases": CASES})
    subprocess.run([HUB, str(worker), request, str(folder)], check=True, env=environment)
    return folder


@needs_hub
@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{b}-{k if isinstance(k, str) else 'other'}" for b, k in CASES]
)
def test_outputs_are_equal(hub: Path, number: int, tmp_path: Path) -> None:
    base, _ = CASES[number]
    described = REQUEST[base]
    config = getattr(transformers, described["config"])(**described["values"])
    place = hub / str(number)

    def plain() -> torch.nn.Module:
        model = getattr(transformers, described["model"])(config).eval()
        missing, _ = model.load_state_dict(load_file(place / "base.safetensors"), strict=False)
        assert not [k for k in missing if "position_ids" not in k]
        return model

    inputs = {k: torch.tensor(v) for k, v in described["inputs"].items()}
    outputs = load_file(place / "outputs.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(plain()(**inputs)[0], outputs["plain"], atol=1e-5, rtol=1e-4)
        model = PeftModel.from_pretrained(plain(), place / "adapter", strict=True)
        torch.testing.assert_close(model(**inputs)[0], outputs["adapted"], atol=1e-5, rtol=1e-4)
        assert (outputs["adapted"] - outputs["plain"]).abs().max() > 1e-3
        # Written in this library's own format it stays the same.
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(plain(), tmp_path, strict=True)
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def written(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    """A folder as that library writes it."""
    folder.mkdir()
    values = {**CONFIG, **{k: v for k, v in changes.items() if k != "config"}}
    values["config"] = {**CONFIG["config"], **changes.get("config", {})}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def tensors_of(prefix: str = "") -> dict[str, torch.Tensor]:
    shapes = {
        "adapter_down.0.weight": (2, 32),
        "adapter_down.0.bias": (2,),
        "adapter_up.weight": (32, 2),
        "adapter_up.bias": (32,),
    }
    return {
        f"{prefix}encoder.layer.{layer}.output.adapters.some.{part}": torch.full(shape, 0.25 + layer)
        for layer in (0, 1)
        for part, shape in shapes.items()
    }


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_a_folder_fits_models_with_and_without_a_head(prefix: str, name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", tensors_of(prefix))
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, BottleneckConfig)
    assert (config.placement, config.reduction_factor, config.inference_mode) == ("pfeiffer", 16, True)
    base = getattr(transformers, name)(transformers.BertConfig(**SIZES))
    model = PeftModel.from_pretrained(base, folder, strict=True)
    layers = [layer for _, layer in adapted_modules(model)]
    assert [layer.bottleneck_up["default"].weight[0, 0].item() for layer in layers] == [0.25, 1.25]


def test_a_head_is_loaded_with_its_task(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", tensors_of("bert."), model_class="BertForSequenceClassification")
    torch.save(
        {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}, folder / "pytorch_model_head.bin"
    )
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    model = PeftModel.from_pretrained(base, folder, strict=True)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert all(v.eq(1).all() for k, v in get_peft_model_state_dict(model).items() if "classifier" in k)


def test_a_head_of_another_kind_is_said_to_be_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", tensors_of("bert."), model_class="BertAdapterModel")
    torch.save({"heads.some.1.weight": torch.ones(2, 32)}, folder / "pytorch_model_head.bin")
    with pytest.warns(UserWarning, match="a head of that library's own kind, which is not read"):
        PeftModel.from_pretrained(transformers.BertModel(transformers.BertConfig(**SIZES)), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"inv_adapter": "nice"}}, "inv_adapter='nice' is not read: only None is"),
        ({"config": {"use_gating": True}}, "use_gating=True is not read"),
        ({"config": {"scaling": "channel"}}, "scaling='channel' is not read: numbers and 'learned' are"),
        ({"config": {"mh_adapter": True}}, "mh_adapter=True is not read: with these other fields only"),
        ({"config": {"output_adapter": False}}, "there is no adapter then"),
        ({"config": {"architecture": "union"}}, "architecture='union' is not read: it is no single bottleneck adapter"),
        ({"config": {"leave_out": [0]}, "model_type": "t5"}, "leave_out=.*numbered through"),
        ({"model_type": "bret"}, "models of type 'bret' are not read .did you mean 'bert'"),
    ],
    ids=["invertible", "gating", "scaling", "attention", "none", "union", "numbers", "type"],
)
def test_what_is_not_read_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", tensors_of(), **changes)
    with pytest.raises(NotImplementedError, match=message):
        PeftModel.from_pretrained(transformers.BertModel(transformers.BertConfig(**SIZES)), folder)


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", {})
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(ValueError, match="expected adapter.safetensors or pytorch_adapter.bin"):
        PeftModel.from_pretrained(transformers.BertModel(transformers.BertConfig(**SIZES)), folder)
