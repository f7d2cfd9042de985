"""Teach a small language model with TRL: supervised fine-tuning, then preferences, each with an adapter of its own.

python examples/trl_sft_dpo.py    a tiny random model, tokenizer and data made here: no network is needed
Replace the model, the tokenizer and the data by real ones; nothing else changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft import LoraConfig, PeftModel

ANIMALS, DISHES = ("cat", "dog", "fox", "owl"), ("fish", "bone", "hare", "mouse")
PAIRS = list(zip(ANIMALS, DISHES, strict=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of the data."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "eats", "a", "stone", *ANIMALS, *DISHES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def losses(trainer: SFTTrainer | DPOTrainer) -> tuple[float, float]:
    """The first and the last training loss."""
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return logged[0], logged[-1]


def fine_tune(out: Path, steps: int) -> PeftModel:
    """Supervised fine-tuning: the trainer puts the adapter on, trains and saves it."""
    tokenizer = make_tokenizer()
    trainer = SFTTrainer(
        model=make_model(len(tokenizer)),
        args=SFTConfig(
            str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, max_length=16,
        ),
        train_dataset=Dataset.from_list([{"text": f"the {animal} eats a {dish}"} for animal, dish in PAIRS] * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    print("SFT: loss {:.3f} -> {:.3f}".format(*losses(trainer)))
    return trainer.model


def prefer(sft: Path, out: Path, steps: int) -> PeftModel:
    """Direct preference optimisation: a new adapter on the fine-tuned model, whose plain form is the reference."""
    tokenizer = make_tokenizer()
    fine_tuned = PeftModel.from_pretrained(make_model(len(tokenizer)), sft).merge_and_unload()
    rows = [{"prompt": f"the {animal} eats a", "chosen": f" {dish}", "rejected": " stone"} for animal, dish in PAIRS]
    trainer = DPOTrainer(
        model=fine_tuned,
        args=DPOConfig(
            str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, max_length=16,
        ),
        train_dataset=Dataset.from_list(rows * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    print("DPO: loss {:.3f} -> {:.3f}".format(*losses(trainer)), f"margin {margins[-1]:.2f}")
    return trainer.model


def main(arguments: list[str] | None = None) -> tuple[PeftModel, PeftModel]:
    """Run both stages.

    Returns:
        The models after each.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/trl"), help="folder for both adapters")
    parser.add_argument("--steps", type=int, default=20, help="training steps of each stage")
    args = parser.parse_args(arguments)
    fine_tuned = fine_tune(args.out / "sft", args.steps)
    preferred = prefer(args.out / "sft", args.out / "dpo", args.steps)
    print(f"The adapters lie in {args.out}/sft and {args.out}/dpo.")
    return fine_tuned, preferred


if __name__ == "__main__":
    main()
