"""What untouched transformers does with adapters: its own adapter methods, Auto classes, pipelines and Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

import peft
import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from settings import SETTINGS, Setting, randomise
from settings import logits as tiny_logits

TOLERANCE = 1e-5
WORDS = [
    "a",
    "bad",
    "dull",
    "film",
    "fine",
    "good",
    "great",
    "is",
    "movie",
    "not",
    "story",
    "the",
    "this",
    "very",
    "was",
]
BERT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 32,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
IDS = torch.tensor([[5, 9, 3, 17, 8, 30], [11, 4, 25, 6, 31, 7]])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at blanks; every word has a number."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=32,
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Folders of tiny base models, each with the tokenizer: a pipeline on an adapter takes the base's."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "headless": BertModel(BertConfig(**BERT)),
        "head of 2": BertForSequenceClassification(BertConfig(**BERT, num_labels=2)),
        "head of 5": BertForSequenceClassification(BertConfig(**BERT, num_labels=5)),
        "tagger": BertForTokenClassification(BertConfig(**BERT, num_labels=3)),
        "reader": BertForQuestionAnswering(BertConfig(**BERT)),
        "llama": LlamaForCausalLM(LlamaConfig(**LLAMA)),
        "t5": T5ForConditionalGeneration(T5Config(**T5)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give everything that trains random values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(0.2 * torch.randn(param.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    """The model's answer to the fixed rows."""
    with torch.no_grad():
        result = model.eval()(input_ids=IDS, **kwargs)
    return next(result[name] for name in ("logits", "start_logits", "last_hidden_state") if name in result)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fail unless the tensors agree."""
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def file_keys(folder: Path | str) -> set[str]:
    with safe_open(str(Path(folder, "adapter_model.safetensors")), "pt") as file:
        return set(file.keys())


# -- transformers' own adapter methods -------------------------------------------------------------------------------


def test_add_adapter_equals_get_peft_model(bases: dict[str, str]) -> None:
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    native.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]), adapter_name="one")
    shake(native)
    wrapped = get_peft_model(
        LlamaForCausalLM.from_pretrained(bases["llama"]), LoraConfig(target_modules=["q_proj", "v_proj"]), "one"
    )
    wrapped.base_model.model.load_state_dict(native.state_dict())
    close(logits(native), logits(wrapped))
    assert {f"base_model.model.{name}" for name in trainable(native)} == trainable(wrapped)


def test_add_adapter_changes_nothing_at_first(bases: dict[str, str]) -> None:
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    before = logits(native)
    native.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(native), before)


def test_only_the_added_adapter_trains(bases: dict[str, str]) -> None:
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    native.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="one")
    assert trainable(native)
    assert all(".lora_" in name and ".one." in name for name in trainable(native))


def two_native(bases: dict[str, str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with two native adapters, and what it answers with each and with none."""
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    answers = {"none": logits(native)}
    for seed, (name, target) in enumerate({"one": "q_proj", "two": "v_proj"}.items()):
        native.add_adapter(LoraConfig(target_modules=[target, "o_proj"]), adapter_name=name)
        native.set_adapter(name)
        shake(native, seed)
        answers[name] = logits(native)
    return native, answers


def test_set_adapter(bases: dict[str, str]) -> None:
    native, answers = two_native(bases)
    assert not torch.allclose(answers["one"], answers["two"], atol=0.01)
    native.set_adapter("one")
    assert native.active_adapters() == ["one"]
    assert torch.equal(logits(native), answers["one"])
    native.set_adapter("two")
    assert native.active_adapters() == ["two"]
    assert torch.equal(logits(native), answers["two"])


def test_set_several_adapters(bases: dict[str, str]) -> None:
    native, _ = two_native(bases)
    native.set_adapter(["one", "two"])
    assert native.active_adapters() == ["one", "two"]
    wrapped = LlamaForCausalLM.from_pretrained(bases["llama"])
    for layer, other in zip(native.model.layers, wrapped.model.layers, strict=True):
        for name, module in other.self_attn.named_children():
            for adapter in ("one", "two"):
                source = getattr(layer.self_attn, name)
                if hasattr(source, "get_delta_weight") and adapter in source.lora_A:
                    module.weight.data += source.get_delta_weight(adapter)
    close(logits(native), logits(wrapped))


def test_disable_and_enable_adapters(bases: dict[str, str]) -> None:
    native, answers = two_native(bases)
    native.disable_adapters()
    assert torch.equal(logits(native), answers["none"])
    native.enable_adapters()
    assert torch.equal(logits(native), answers["two"])


def test_delete_adapter(bases: dict[str, str]) -> None:
    native, answers = two_native(bases)
    native.delete_adapter("one")
    assert not [name for name, _ in native.named_parameters() if ".one." in name]
    assert torch.equal(logits(native), answers["two"])
    with pytest.raises(ValueError):
        native.set_adapter("one")


def test_load_adapter_reads_what_peft_model_saved(bases: dict[str, str], tmp_path: Path) -> None:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(bases["llama"]), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    shake(model).save_pretrained(tmp_path)
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    native.load_adapter(str(tmp_path))
    close(logits(native), logits(model))


def test_load_several_adapters(bases: dict[str, str], tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(bases["llama"]), LoraConfig(task_type="CAUSAL_LM"))
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"]))
    for seed, name in enumerate(("default", "second")):
        model.set_adapter(name)
        shake(model, seed)
    model.save_pretrained(tmp_path)
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    for name, folder in {"default": tmp_path, "second": tmp_path / "second"}.items():
        native.load_adapter(str(folder), adapter_name=name)
        native.set_adapter(name)
        model.set_adapter(name)
        close(logits(native), logits(model))


def test_load_adapter_with_a_trained_head(bases: dict[str, str], tmp_path: Path) -> None:
    model = get_peft_model(
        BertForSequenceClassification.from_pretrained(bases["head of 2"]), LoraConfig(task_type="SEQ_CLS")
    )
    shake(model).save_pretrained(tmp_path)
    native = BertForSequenceClassification.from_pretrained(bases["head of 2"])
    native.load_adapter(str(tmp_path))
    close(logits(native), logits(model))


def test_native_save_is_read_by_peft_model(bases: dict[str, str], tmp_path: Path) -> None:
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    native.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]))
    shake(native).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()
    assert all(".lora_" in key for key in file_keys(tmp_path))
    read = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases["llama"]), tmp_path)
    close(logits(read), logits(native))


def test_native_save_of_a_head_is_read_by_peft_model(bases: dict[str, str], tmp_path: Path) -> None:
    native = BertForSequenceClassification.from_pretrained(bases["head of 2"])
    native.add_adapter(LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    shake(native).save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bases["head of 2"]), tmp_path)
    close(logits(read), logits(native))


def test_native_save_and_native_load(bases: dict[str, str], tmp_path: Path) -> None:
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    native.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]))
    shake(native).save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(str(tmp_path))), logits(native))


def test_get_adapter_state_dict(bases: dict[str, str]) -> None:
    native, _ = two_native(bases)
    state = native.get_adapter_state_dict("two")
    assert state
    assert all("two" not in key and ".lora_" in key for key in state)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if tiny.LLAMA in s.bases], ids=lambda s: s.name)
def test_every_method_goes_through_the_native_integration(setting: Setting, tmp_path: Path) -> None:
    model = setting.model(tiny.LLAMA)
    randomise(model)
    wanted = tiny_logits(model, tiny.LLAMA)
    model.save_pretrained(tmp_path)
    native = tiny.LLAMA.build()
    native.load_adapter(str(tmp_path))
    close(tiny_logits(native, tiny.LLAMA), wanted)
    native.disable_adapters()
    close(tiny_logits(native, tiny.LLAMA), tiny_logits(tiny.LLAMA.build(), tiny.LLAMA))
    native.enable_adapters()
    native.save_pretrained(tmp_path / "again")
    read = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path / "again", strict=True)
    close(tiny_logits(read, tiny.LLAMA), wanted)
    native.delete_adapter("default")
    close(tiny_logits(native, tiny.LLAMA), tiny_logits(tiny.LLAMA.build(), tiny.LLAMA))


# -- from_pretrained(adapter_folder) and pipelines -------------------------------------------------------------------


def classifier(bases: dict[str, str], base: str, labels: int, folder: Path) -> Any:
    """A trained and saved classifier with named labels."""
    names = {i: f"star {i}" for i in range(labels)}
    model = AutoModelForSequenceClassification.from_pretrained(
        bases[base], num_labels=labels, id2label=names, label2id={name: i for i, name in names.items()}
    )
    model = shake(get_peft_model(model, LoraConfig(task_type="SEQ_CLS")))
    model.save_pretrained(folder)
    return model


HEADS = pytest.mark.parametrize(
    ("base", "labels"), [("head of 2", 2), ("head of 5", 5), ("headless", 2), ("headless", 5)]
)


@HEADS
def test_auto_model_reads_a_classifier(bases: dict[str, str], tmp_path: Path, base: str, labels: int) -> None:
    """The head that was trained comes back with all its labels, also where the base model has none."""
    model = classifier(bases, base, labels, tmp_path)
    read = AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
    assert isinstance(read, BertForSequenceClassification)
    assert logits(read).shape == (2, labels)
    close(logits(read), logits(model))
    assert read.config.num_labels == labels


@HEADS
def test_auto_peft_model_reads_a_classifier(bases: dict[str, str], tmp_path: Path, base: str, labels: int) -> None:
    model = classifier(bases, base, labels, tmp_path)
    read = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path))
    assert isinstance(read, peft.PeftModelForSequenceClassification)
    close(logits(read), logits(model))


@HEADS
def test_peft_model_reads_a_classifier_into_a_base_told_the_labels(
    bases: dict[str, str], tmp_path: Path, base: str, labels: int
) -> None:
    model = classifier(bases, base, labels, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(bases[base], num_labels=labels)
    close(logits(PeftModel.from_pretrained(plain, tmp_path)), logits(model))


def test_loaded_classifier_trains_on(bases: dict[str, str], tmp_path: Path) -> None:
    """A head that was made anew takes part in the loss with its own number of labels."""
    classifier(bases, "headless", 5, tmp_path)
    read = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path), is_trainable=True)
    result = read(input_ids=IDS, labels=torch.tensor([4, 3]))
    result.loss.backward()
    assert result.logits.shape == (2, 5)
    assert all(param.grad is not None for param in read.parameters() if param.requires_grad)


def test_auto_model_reads_a_causal_model(bases: dict[str, str], tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(bases["llama"]), LoraConfig(task_type="CAUSAL_LM"))
    shake(model).save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    close(logits(read), logits(model))
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    assert torch.equal(read.generate(input_ids=IDS, **options), model.generate(input_ids=IDS, **options))


VARIANTS = {
    "dora": {"use_dora": True},
    "dora-embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "lora-bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "tokens": {"trainable_token_indices": list(range(3, 31))},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_auto_model_reads_every_tensor_of_a_variant(
    bases: dict[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Magnitudes and biases of B have keys of their own kind; none may be lost on the way, in either of transformers' ways."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(bases["llama"]), config)
    shake(model).save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(str(tmp_path))), logits(model))
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    native.load_adapter(str(tmp_path))
    close(logits(native), logits(model))
    native.save_pretrained(tmp_path / "native")
    assert file_keys(tmp_path / "native") == file_keys(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(str(tmp_path / "native"))), logits(model))


def test_native_dora_trains_its_magnitudes(bases: dict[str, str]) -> None:
    native = LlamaForCausalLM.from_pretrained(bases["llama"])
    before = logits(native)
    native.add_adapter(LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert torch.equal(logits(native), before)
    assert {name.rsplit(".", 3)[1] for name in trainable(native)} == {"lora_A", "lora_B", "lora_magnitude_vector"}


@pytest.mark.parametrize(("base", "labels"), [("head of 2", 2), ("headless", 5)])
def test_text_classification_pipeline(
    bases: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, base: str, labels: int
) -> None:
    model = classifier(bases, base, labels, tmp_path)
    sentences = ["this movie was very good", "the story is dull"]
    answers = pipeline("text-classification", model=str(tmp_path), device="cpu")(sentences, top_k=None)
    for sentence, answer in zip(sentences, answers, strict=True):
        with torch.no_grad():
            wanted = model(**tokenizer(sentence, return_tensors="pt")).logits.softmax(-1)[0]
        assert len(answer) == labels
        for entry in answer:
            assert entry["score"] == pytest.approx(
                wanted[int(entry["label"].split("_")[-1].split()[-1])].item(), abs=1e-5
            )


def test_pipeline_names_the_labels_of_a_new_head(bases: dict[str, str], tmp_path: Path) -> None:
    classifier(bases, "headless", 5, tmp_path)
    answer = pipeline("text-classification", model=str(tmp_path), device="cpu")("a fine film", top_k=None)
    assert {entry["label"] for entry in answer} == {f"star {i}" for i in range(5)}


def test_text_generation_pipeline(bases: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(bases["llama"]), LoraConfig(task_type="CAUSAL_LM"))
    shake(model).save_pretrained(tmp_path)
    options = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3}
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (answer,) = generate("the film is", return_tensors=True, **options)
    wanted = model.generate(**tokenizer("the film is", return_tensors="pt"), **options)[0].tolist()
    assert answer["generated_token_ids"] == wanted


AUTO = {
    "AutoPeftModelForCausalLM": ("llama", "CAUSAL_LM", LlamaForCausalLM),
    "AutoPeftModelForSeq2SeqLM": ("t5", "SEQ_2_SEQ_LM", T5ForConditionalGeneration),
    "AutoPeftModelForSequenceClassification": ("head of 2", "SEQ_CLS", BertForSequenceClassification),
    "AutoPeftModelForTokenClassification": ("tagger", "TOKEN_CLS", BertForTokenClassification),
    "AutoPeftModelForQuestionAnswering": ("reader", "QUESTION_ANS", BertForQuestionAnswering),
    "AutoPeftModelForFeatureExtraction": ("headless", "FEATURE_EXTRACTION", BertModel),
    "AutoPeftModel": ("llama", None, LlamaForCausalLM),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_peft_model(bases: dict[str, str], tmp_path: Path, name: str) -> None:
    base, task, cls = AUTO[name]
    targets = {"llama": ["q_proj"], "t5": ["q"]}.get(base, ["query"])
    model = get_peft_model(cls.from_pretrained(bases[base]), LoraConfig(task_type=task, target_modules=targets))
    shake(model).save_pretrained(tmp_path)
    read = getattr(peft, name).from_pretrained(str(tmp_path))
    assert type(read) is type(model)
    assert isinstance(read.get_base_model(), cls)
    extra = {"decoder_input_ids": IDS} if base == "t5" else {}
    close(logits(read, **extra), logits(model, **extra))
    assert not trainable(read)


@pytest.mark.parametrize("name", [name for name, (_, task, _) in AUTO.items() if task])
def test_generic_auto_peft_model_follows_the_task(bases: dict[str, str], tmp_path: Path, name: str) -> None:
    """A class for one task refuses adapters of another."""
    base, task, cls = AUTO[name]
    targets = {"llama": ["q_proj"], "t5": ["q"]}.get(base, ["query"])
    get_peft_model(
        cls.from_pretrained(bases[base]), LoraConfig(task_type=task, target_modules=targets)
    ).save_pretrained(tmp_path)
    other = "AutoPeftModelForCausalLM" if name != "AutoPeftModelForCausalLM" else "AutoPeftModelForSeq2SeqLM"
    with pytest.raises(ValueError):
        getattr(peft, other).from_pretrained(str(tmp_path))


# -- Trainer ---------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Sequences whose label is whether the first number is even: there is something to learn."""

    def __init__(self, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 32, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2}


class StopAt(TrainerCallback):
    """Ends training after this many steps, as a time limit does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def make_trainer(bases: dict[str, str], folder: Path, native: bool = False, **options: Any) -> Trainer:
    """A trainer of a LoRA classifier for eight steps, with dropout, a checkpoint after four."""
    torch.manual_seed(7)
    config = LoraConfig(
        task_type="SEQ_CLS", lora_dropout=0.1, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model: Any = BertForSequenceClassification.from_pretrained(bases["head of 2"])
    if native:
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    callbacks = options.pop("callbacks", None)
    values = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 11,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **values)
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(8), callbacks=callbacks)


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_trainer_trains_and_the_checkpoint_holds_the_adapter_only(bases: dict[str, str], tmp_path: Path) -> None:
    trainer = make_trainer(bases, tmp_path, max_steps=16, save_steps=16)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    moving = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    curve = losses(trainer)
    assert sum(curve[step] for step in range(13, 17)) < sum(curve[step] for step in range(1, 5))
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not [name for name, value in moving.items() if torch.equal(now[name], value)]

    checkpoint = tmp_path / "checkpoint-16"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json", "adapter_model.bin"}
    keys = file_keys(checkpoint)
    assert all(".lora_" in key or "classifier" in key for key in keys)
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
    read = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bases["head of 2"]), checkpoint)
    close(logits(read), logits(trainer.model))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_trainer_resumes_on_the_same_curve(bases: dict[str, str], tmp_path: Path, checkpointing: bool) -> None:
    """Stopped after four steps and resumed, the losses are those of the run that went through."""
    options = {"gradient_checkpointing": checkpointing}
    whole = make_trainer(bases, tmp_path / "whole", **options)
    whole.train()
    make_trainer(bases, tmp_path / "parts", callbacks=[StopAt(4)], **options).train()
    resumed = make_trainer(bases, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    wanted, got = losses(whole), losses(resumed)
    assert sorted(wanted) == sorted(got) == list(range(1, 9))
    assert got == pytest.approx(wanted, abs=1e-6)
    close(logits(resumed.model), logits(whole.model))


def test_resuming_differs_from_starting_again(bases: dict[str, str], tmp_path: Path) -> None:
    """Guards the test above: without the checkpoint the same four steps give other losses."""
    whole = make_trainer(bases, tmp_path / "a")
    whole.train()
    again = make_trainer(bases, tmp_path / "b")
    again.train()
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)
    assert [losses(whole)[step] for step in (1, 2, 3, 4)] != pytest.approx(
        [losses(whole)[step] for step in (5, 6, 7, 8)]
    )


def test_trainer_loads_the_best_checkpoint(bases: dict[str, str], tmp_path: Path) -> None:
    """The worst loss is called the best, so that the best checkpoint is not the last."""
    trainer = make_trainer(
        bases,
        tmp_path,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    curve = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_metric == max(curve.values()) > curve[12]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert trainer.state.best_model_checkpoint is not None
    best = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(bases["head of 2"]), trainer.state.best_model_checkpoint
    )
    close(logits(best), logits(trainer.model))


def test_trainer_trains_a_native_adapter(bases: dict[str, str], tmp_path: Path) -> None:
    trainer = make_trainer(bases, tmp_path, native=True)
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    read = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(bases["head of 2"]), tmp_path / "checkpoint-8"
    )
    close(logits(read), logits(trainer.model))
