"""Tiny models with tokenizers, and tiny data that can be learnt, for the tests of recipes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

GOOD, BAD = ("fine", "great", "lovely", "warm"), ("dull", "poor", "weak", "cold")
NAMES, PLACES = ("Ann", "Bob", "Eve", "Max"), ("Rome", "Oslo", "Lima", "Bonn")
OTHER = (
    "the",
    "film",
    "was",
    "and",
    "a",
    "story",
    "in",
    "lives",
    "who",
    "where",
    "?",
    ".",
    "say",
    "it",
    "is",
    "not",
    "very",
    "1",
    "2",
)
WORDS = (*GOOD, *BAD, *NAMES, *PLACES, *OTHER)
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def tokenizer(chat: bool = False, bert: bool = False) -> PreTrainedTokenizerFast:
    """One token a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {w: i for i, w in enumerate((*special, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bert:
        pairs = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        inner.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    if bert:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    if chat:
        made.chat_template = CHAT
    return made


def save_bert(folder: Path) -> Path:
    """An encoder."""
    tokens = tokenizer(bert=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.1, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def save_llama(folder: Path, chat: bool = True) -> Path:
    """A causal decoder."""
    tokens = tokenizer(chat)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """An encoder-decoder."""
    tokens = tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def reviews(count: int = 64) -> list[dict[str, Any]]:
    """Texts whose class some of their words tell."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        label = i % 2
        words = [*rng.sample(GOOD if label else BAD, 3), *rng.sample(OTHER, rng.randint(3, 8))]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": "pos" if label else "neg"})
    return rows


def entities(count: int = 48) -> list[dict[str, Any]]:
    """Sentences with people and places."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        tokens = [rng.choice(NAMES), "lives", "in", rng.choice(PLACES), *rng.sample(OTHER, 3)]
        rows.append({"tokens": tokens, "tags": ["B-person", "O", "O", "B-place", "O", "O", "O"]})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as CSV; no cell holds a comma."""
    lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_shared_recipe(folder: Path, bert: Path) -> Path:
    """A recipe of two tasks that train one adapter together, with its data."""
    read = write_csv(folder / "reviews.csv", reviews(80))
    named = write_json_lines(folder / "entities.jsonl", entities())
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {bert}\nmethod: {{name: p-tuning-v2, num_virtual_tokens: 5, reparameterization: mlp}}\nshared: true\n"
        "training: {epochs: 8, learning_rate: 0.02, save_every: 2}\ntasks:\n"
        f"  mood: {{task: sequence-classification, data: {{train: {read}, max_length: 32}}}}\n"
        f"  names: {{task: token-classification, data: {{train: {named}, max_length: 48}}}}\n"
    )
    return path
