"""Out into the world: plain models and ONNX."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..model import PeftModel
from .errors import RecipeError, need
from .models import quiet
from .runs import load_run
from .tasks import Task

AGREEMENT = 1e-3
"""How far the outputs of a merged or exported model may be from the adapter's, relative to the largest of them."""


def merge_run(folder: Path, target: Path) -> Iterator[str]:
    """Write a plain model: the base with the adapter added to its weights. Its outputs are compared with the adapter's first.

    Args:
        folder: Of a run or an adapter.
        target: For the model and its tokenizer.

    Yields:
        Lines for the user.

    Raises:
        RecipeError: The method cannot be merged, or the merged model computes something else.
    """
    must_be_empty(target)
    model, task = load_run(folder)
    if not isinstance(model, PeftModel):
        raise RecipeError(f"{folder} holds no adapter, but a plain model already.")
    before = outputs(model, task)
    try:
        plain: Any = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise RecipeError(f"The adapter in {folder} cannot be merged: {error}") from None
    difference = disagreement(before, outputs(plain, task))
    if difference > AGREEMENT:
        raise RecipeError(
            f"The merged model's outputs differ from the adapter's by {difference:.1e} of the largest; nothing was written."
        )
    with quiet():
        plain.save_pretrained(target)
    task.tokenizer.save_pretrained(target)
    size = sum(p.stat().st_size for p in target.glob("*.safetensors"))
    yield f"{target} holds a plain {type(plain).__name__}, {size / 1e6:,.1f} MB."
    yield f"Its outputs agree with the adapter's within {difference:.1e} of the largest."
    yield f"Use it without this library: transformers.{task.auto_class}.from_pretrained({str(target)!r})"


def sample(task: Task) -> dict[str, torch.Tensor]:
    """A small batch of text for comparing outputs."""
    texts = ["What a film!", "A slow start, but the last hour is wonderful, and one would like to see it again."]
    batch = task.tokenizer(texts, padding=True, return_tensors="pt")
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    if task.task_type == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = batch["input_ids"][:, :3].clone()
    return batch


@torch.no_grad()
def outputs(model: Any, task: Task) -> torch.Tensor:
    """A model's outputs on :func:`sample`, where the input has no padding."""
    batch = {k: v.to(next(model.parameters()).device) for k, v in sample(task).items()}
    found = model.eval()(**batch)
    logits = found.logits if hasattr(found, "logits") else torch.stack([found.start_logits, found.end_logits], -1)
    if logits.dim() == 3 and "decoder_input_ids" not in batch:
        logits = logits[batch["attention_mask"].bool()]
    return logits.float().cpu()


def disagreement(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest output."""
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-6)).item()


def must_be_empty(target: Path) -> None:
    """Refuse a folder that holds something."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} exists and is not empty. Choose another folder.")


# -- ONNX --------------------------------------------------------------------------------------------------------------


def export_onnx(folder: Path, target: Path, int8: bool = False) -> Iterator[str]:
    """Write a merged model as ONNX, check its outputs against torch's, and measure both.

    Args:
        folder: Of a run or an adapter.
        target: Folder for ``model.onnx`` and the tokenizer.
        int8: Write ``model-int8.onnx`` too, its matrix products quantised dynamically.

    Yields:
        Lines for the user.

    Raises:
        RecipeError: A package is missing, the task generates text, or the outputs differ.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "ONNX", "export")
    must_be_empty(target)
    model, task = load_run(folder)
    if task.generates:
        raise RecipeError(
            "Export is for encoders with a head; a model that generates text is shipped with `peft merge`."
        )
    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise RecipeError(f"The adapter in {folder} cannot be merged, which export needs: {error}") from None
    model = model.cpu().eval().requires_grad_(False)
    target.mkdir(parents=True, exist_ok=True)
    path = target / "model.onnx"
    batch = sample(task)
    _write_onnx(model, batch, path)
    task.tokenizer.save_pretrained(target)
    model.config.save_pretrained(target)
    held_back = _held_back(folder, task)
    truth = [_choices(_flat_outputs(model(**rows)), rows) for rows in held_back]
    expected, took = _timed(lambda: _flat_outputs(model(**batch)))
    yield f"torch: {sum(p.numel() * 4 for p in model.parameters()) / 1e6:,.1f} MB, {took:.1f} ms for two texts."
    files = {"float32": path}
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        files["int8"] = target / "model-int8.onnx"
        with _no_logs():  # it recommends a step that is for pictures
            # A scale for each column: one for a whole matrix costs a small encoder twice as much. Seven bits: eight overflow on CPUs
            # without instructions for them.
            quantize_dynamic(
                str(path), str(files["int8"]), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
            )
    for name, file in files.items():
        found, took = _run_onnx(file, batch)
        difference = disagreement(expected, found)
        if name == "float32" and difference > AGREEMENT:
            raise RecipeError(
                f"The ONNX model's outputs differ from torch's by {difference:.1e} of the largest; do not use {file}."
            )
        size = sum(p.stat().st_size for p in target.glob(f"{file.name}*")) / 1e6
        yield f"{file} ({name}): {size:,.1f} MB, {took:.1f} ms; outputs within {difference:.1e} of torch's largest."
        if truth and truth[0].numel():
            ours = torch.cat([_choices(_run_onnx(file, rows, repeats=0)[0], rows) for rows in held_back])
            equal = (ours == torch.cat(truth)).float().mean().item()
            what = "tokens" if task.task_type == "TOKEN_CLS" else "rows"
            yield f"  On {len(ours):,} {what} held back, {equal:.1%} of its answers are torch's."


def _held_back(folder: Path, task: Task, most: int = 128) -> list[dict[str, torch.Tensor]]:
    """Batches of rows that a run held back; none where there is no run, its data are gone, or answers are not classes."""
    from .predict import rows_of_run

    if task.task_type not in ("SEQ_CLS", "TOKEN_CLS") or task.kind in ("regression", "multi-label"):
        return []
    try:
        rows, _ = rows_of_run(folder, task)
    except (RecipeError, OSError):
        return []
    features = task.encode(rows[:most])
    names = sample(task).keys()
    return [
        {k: v for k, v in task.collate(features[i : i + 16]).items() if k in names} for i in range(0, len(features), 16)
    ]


def _choices(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The class of each row, or of each token."""
    found = logits.argmax(-1)
    return found[batch["attention_mask"].bool()] if found.dim() == 2 else found


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    """Within this context only errors are logged: exporters tell of packages that nobody needs here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _flat_outputs(found: Any) -> torch.Tensor:
    return found.logits if hasattr(found, "logits") else torch.stack([found.start_logits, found.end_logits], -1)


def _write_onnx(model: Any, batch: dict[str, torch.Tensor], path: Path) -> None:
    """torch's exporter, with the number of texts and their length left open."""
    import io
    import warnings

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return _flat_outputs(self.model(**dict(zip(batch, inputs, strict=True))))

    rows, width = torch.export.Dim("rows", min=1, max=4096), torch.export.Dim("width", min=2, max=4096)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), _no_logs():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Positional().eval(), tuple(batch.values()), str(path), input_names=list(batch), output_names=["logits"], dynamo=True,
            dynamic_shapes=(tuple({0: rows, 1: width} for _ in batch),),
            external_data=False, verbose=False,
        )  # fmt: skip


def _run_onnx(path: Path, batch: dict[str, torch.Tensor], repeats: int = 10) -> tuple[torch.Tensor, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    inputs = {k: v.numpy() for k, v in batch.items() if k in names}
    return _timed(lambda: torch.from_numpy(session.run(None, inputs)[0]), repeats)


@torch.no_grad()
def _timed(call: Any, repeats: int = 10) -> tuple[torch.Tensor, float]:
    """What a call gives, and its median time in milliseconds."""
    found, times = call(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return found.float(), statistics.median(times) if times else 0.0
