"""The classic prefix-tuning script: a hand-written loop on IMDB, saved into one folder, loaded by transformers' own classes.

python examples/prefix_tuning_imdb.py                     MiniLM on IMDB, both from installed packages: no network is needed
python examples/prefix_tuning_imdb.py --model bert-base-uncased --dataset imdb     both from the Hub
python examples/prefix_tuning_imdb.py --start peer        the random start of the field's common library, which learns nothing here
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from finetune_imdb import DATA_PACKAGE, LABELS, MODEL_PACKAGE, PACKAGED, load_reviews, package_folder
from sklearn.metrics import accuracy_score, classification_report
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertForSequenceClassification, BertTokenizer, get_linear_schedule_with_warmup

from peft import PrefixTuningConfig, get_peft_model


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", default=PACKAGED, help=f"a BERT: a Hub id, a folder, or '{PACKAGED}' for the package {MODEL_PACKAGE}"
    )
    add("--dataset", default=PACKAGED, help=f"a Hub id, a folder, or '{PACKAGED}' for the package {DATA_PACKAGE}")
    add("--train-rows", type=int, default=2000, help="reviews to train on")
    add("--test-rows", type=int, default=1000, help="other reviews to measure on")
    add("--max-tokens", type=int, default=128, help="tokens kept of each review")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=1e-4)
    add("--virtual-tokens", type=int, default=20)
    add("--no-projection", action="store_true", help="train the prefix itself, without the network that makes it")
    add("--start", default="tokens", choices=["tokens", "peer"], help="what the prefix starts from")
    add("--out", type=Path, default=Path("runs/imdb-prefix"), help="folder for the result")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> float:
    """Train, measure, save, load and predict.

    Returns:
        The accuracy on the test rows.
    """
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # IMDB comes sorted by label: its first 2,000 rows are all negative. load_reviews shuffles, and says so.
    train_reviews, test_reviews = load_reviews(args.dataset, args.train_rows, args.test_rows, args.seed)
    source = str(package_folder(MODEL_PACKAGE) / "model") if args.model == PACKAGED else args.model
    tokenizer = BertTokenizer.from_pretrained(source)

    def collate(rows):
        texts, labels = zip(*rows, strict=True)
        encoded = tokenizer(
            list(texts), truncation=True, max_length=args.max_tokens, padding="max_length", return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor(labels)}

    train_loader = DataLoader(train_reviews, args.batch_size, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_reviews, args.batch_size, collate_fn=collate)

    # Attention without dropout takes torch's fused kernel on a CPU, with dropout the plain one; nothing else depends on it.
    model = BertForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS), attention_probs_dropout_prob=0.0
    )
    config = PrefixTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=args.virtual_tokens,
        prefix_projection=not args.no_projection,
        prefix_init=args.start,
    )
    model = get_peft_model(model, config).to(device)
    model.print_trainable_parameters()

    optimizer = AdamW(model.parameters(), lr=args.lr)
    steps = args.epochs * len(train_loader)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        for batch in tqdm(train_loader, desc=f"epoch {epoch}/{args.epochs}", leave=False, disable=None):
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        predicted, true = predict(model, test_loader, device)
        accuracy = accuracy_score(true, predicted)
        print(
            f"epoch {epoch}/{args.epochs}: training loss {total / len(train_loader):.3f}, test accuracy {accuracy:.3f}",
            flush=True,
        )
    print(classification_report(true, predicted, labels=[0, 1], target_names=LABELS, digits=3, zero_division=0))

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    model = BertForSequenceClassification.from_pretrained(args.out).to(device).eval()
    tokenizer = BertTokenizer.from_pretrained(args.out)
    encoded = tokenizer("A slow start, but the last hour is wonderful.", return_tensors="pt").to(device)
    with torch.no_grad():
        print(f"Loaded from {args.out}, it predicts: {LABELS[model(**encoded).logits.argmax().item()]}.")
    again, _ = predict(model, test_loader, device)
    print(f"On the test reviews it agrees with the trained model in {accuracy_score(predicted, again):.1%}.")
    return accuracy


@torch.no_grad()
def predict(model, loader, device) -> tuple[list[int], list[int]]:
    """Predicted and true labels."""
    model.eval()
    predicted, true = [], []
    for batch in loader:
        true += batch.pop("labels").tolist()
        predicted += model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.argmax(-1).tolist()
    return predicted, true


if __name__ == "__main__":
    main()
