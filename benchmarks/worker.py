"""The process that measures: runs in either environment and answers requests, one JSON object a line.

A request is `{"call": NAME, ...arguments}`; the answer is `{"value": ...}` or `{"error": TRACEBACK}`. It works only
while a request is open, so two workers that are asked in turn never disturb each other.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import transformers

import peft
from benchmarks.methods import (
    DEEP,
    DEEP_TARGETS,
    FROZEN,
    FULL,
    INFERENCE,
    LONG,
    METHODS,
    MIXED,
    RANKED,
    REAL,
    SHAPES,
    Shape,
    build_model,
    find,
)
from benchmarks.saved_bytes import saved_by_node

SEED = 0


def _timed(action: Callable[[], object]) -> float:
    """Seconds that one call takes, with earlier garbage out of the way."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _peak() -> int:
    """The most memory this process ever had resident, in bytes."""
    try:  # Linux counts into ru_maxrss what the process that started this one held at that moment
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Subject:
    """A model being measured, with its batch.

    The loss is a fixed random projection of the last hidden states: it costs next to nothing, and unlike a plain sum
    it sends a gradient of ordinary size through the last norm.
    """

    model: Any
    inputs: torch.Tensor
    probe: torch.Tensor
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def build(cls, shape: Shape, method: str, dtype: str = "float32", checkpointing: bool = False) -> Subject:
        """Builds a shape with a method of the table, or frozen, or trained in full."""
        torch.manual_seed(SEED)
        model = build_model(shape).to(getattr(torch, dtype))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if method == FROZEN:
            # The bound: forward, and backward through the activations down to the embeddings.
            model.requires_grad_(False)
            model.enable_input_require_grads()
        elif method != FULL:
            model = peft.get_peft_model(model, find((*METHODS, *RANKED), method).config(peft, shape))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            model.train(),
            inputs=torch.randint(1024, (shape.batch, shape.tokens)),
            probe=torch.randn(shape.batch, shape.tokens, shape.sizes["hidden_size"]),
            # A small rate: the weights hardly move, so the last step costs what the first did.
            optimizer=torch.optim.AdamW(trained, lr=1e-6) if trained else None,
        )

    def loss(self) -> torch.Tensor:
        hidden = self.model(input_ids=self.inputs).last_hidden_state
        # What stands before the rows' own tokens is left out: prompts lengthen the output.
        return (hidden[:, -self.inputs.shape[1] :].float() * self.probe).sum()

    def step(self) -> dict[str, float]:
        """Seconds of one training step, without and with the optimizer."""
        compute = _timed(lambda: self.loss().backward())
        if self.optimizer is None:
            return {"step": compute, "step with optimizer": compute}
        update = _timed(self.optimizer.step)
        self.optimizer.zero_grad()
        return {"step": compute, "step with optimizer": compute + update}

    def forward(self) -> float:
        """Seconds of one forward pass in evaluation mode, without a graph."""
        self.model.eval()
        with torch.no_grad():
            seconds = _timed(lambda: self.model(input_ids=self.inputs))
        self.model.train()
        return seconds

    def merged(self) -> float | None:
        """Seconds of the same with the adapter merged, or `None` where there is nothing to merge."""
        try:
            self.model.merge_adapter()
        except (AttributeError, ValueError, NotImplementedError):
            return None
        seconds = self.forward()
        self.model.unmerge_adapter()
        return seconds

    def saved(self) -> dict[str, int]:
        """Bytes that the loss's graph keeps for backward, weights and the loss's own projection apart, by node."""
        return dict(saved_by_node(self.loss(), [*self.model.parameters(), self.probe]))


class Worker:
    """The requests: each method that does not start with an underscore is one."""

    def __init__(self) -> None:
        self._subjects: dict[str, Subject] = {}

    def hello(self, threads: int) -> None:
        """Fixes the threads, and takes what the imports made out of the garbage collector's sight."""
        torch.set_num_threads(threads)
        gc.collect()
        gc.freeze()

    def build(self, shape: str, method: str, **options: Any) -> None:
        """Makes a subject known as `method` and warms it up."""
        subject = self._subjects[method] = Subject.build(find((*SHAPES, *LONG, *REAL), shape), method, **options)
        subject.step()
        subject.forward()

    def clear(self) -> None:
        self._subjects.clear()

    def step(self, method: str) -> dict[str, float]:
        return self._subjects[method].step()

    def forward(self, method: str) -> float:
        return self._subjects[method].forward()

    def merged(self, method: str) -> float | None:
        return self._subjects[method].merged()

    def saved(self, method: str) -> dict[str, int]:
        return self._subjects[method].saved()

    def peak(self, shape: str, method: str, **options: Any) -> dict[str, int]:
        """Peak memory after two training steps: of the process, and what was added to the imports'.

        Meant as the only request of a fresh process.
        """
        # Names imported on first use belong to the imports.
        for name in ("BertModel", "LlamaModel"):
            getattr(transformers, name)
        for name in ("LoraConfig", "get_peft_model"):
            getattr(peft, name)
        imports = _peak()
        subject = Subject.build(find((*SHAPES, *LONG, *REAL), shape), method, **options)
        for _ in range(2):  # the second has the optimizer's state beside the activations
            subject.step()
        return {"process": _peak(), "added": _peak() - imports}

    # Mixed batches

    def open_mixed(self, shape: str, method: str, adapters: int) -> bool:
        """Builds a model with so many adapters of one method, and tells whether a batch may mix them.

        A side that takes the adapters' names and then computes something else for them, or the same for all, counts as not able to.
        """
        torch.manual_seed(SEED)
        layout = find(MIXED, shape)
        row = find((*METHODS, *INFERENCE), method)

        def config() -> Any:
            made = row.config(peft, layout)
            if layout.new_tokens:
                made.task_type = "CAUSAL_LM"
            return made

        self._inside = getattr(peft.helpers, row.inside) if row.inside else contextlib.nullcontext
        model = peft.get_peft_model(build_model(layout), config(), adapter_name="adapter_0").eval()
        for number in range(1, adapters):
            model.add_adapter(f"adapter_{number}", config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adapter_" in name:
                    parameter.normal_(std=0.2)
        self._mixed = model
        self._rows, self._new_tokens = torch.randint(1024, (layout.batch, layout.tokens)), layout.new_tokens
        self._names = [f"adapter_{row % adapters}" for row in range(layout.batch)]
        try:
            together = self._batch(adapter_names=self._names)
        except (ValueError, TypeError, NotImplementedError):
            return False
        alone = []
        for row in (0, adapters - 1):
            model.set_adapter(self._names[row])
            alone.append(self._batch())
            # Prompts give the outputs of their virtual tokens too, in front; in a mixed batch ours do not.
            own = slice(None) if layout.new_tokens else slice(-layout.tokens, None)
            # Another adapter's outputs differ by whole numbers; roundings grow to thousandths here.
            if not torch.allclose(together[row, own], alone[-1][row, own], atol=2e-2):
                return False
        return not torch.allclose(*alone, atol=2e-2)

    @torch.no_grad()
    def _batch(self, **arguments: Any) -> torch.Tensor:
        """Hidden states of a call, (rows, tokens, features), or the last logits of a generation, (rows, vocabulary)."""
        if not self._new_tokens:
            return self._mixed(input_ids=self._rows, **arguments).last_hidden_state
        lengths = dict.fromkeys(("min_new_tokens", "max_new_tokens"), self._new_tokens)
        told = {"attention_mask": torch.ones_like(self._rows), "pad_token_id": 0, "do_sample": False}
        kept = {"return_dict_in_generate": True, "output_logits": True}
        return self._mixed.generate(input_ids=self._rows, **told, **lengths, **kept, **arguments).logits[-1]

    def mixed(self) -> dict[str, float]:
        """Seconds of a batch that takes a single adapter, and of one whose rows take all adapters in turn: a call, or a generation."""
        with self._inside() as context:
            for names in ({}, {"adapter_names": self._names}) if context is not None else ():
                self._batch(**names)  # what the context keeps is made here
            return {"single": _timed(self._batch), "mixed": _timed(lambda: self._batch(adapter_names=self._names))}

    # Operations, on the deep model

    def open_deep(self) -> None:
        """Builds the base that the operations start from, and warms up what the first of them would pay."""
        torch.manual_seed(SEED)
        self._base = build_model(DEEP)
        self._folder = tempfile.TemporaryDirectory(prefix="peft-bench-")
        self.inject()
        self.save()

    def inject(self) -> float:
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=DEEP_TARGETS)
        base = copy.deepcopy(self._base)
        self._made: list[Any] = []
        return _timed(lambda: self._made.append(peft.get_peft_model(base, config)))

    def save(self) -> float:
        return _timed(lambda: self._made[0].save_pretrained(self._folder.name))

    def load(self, number: int) -> float:
        """Loads the saved folder once more; number 1 starts from a fresh base."""
        if number > 1:
            return _timed(lambda: self._loaded[0].load_adapter(self._folder.name, adapter_name=f"adapter_{number}"))
        base = copy.deepcopy(self._base)
        self._loaded: list[Any] = []
        make = peft.PeftModel.from_pretrained
        return _timed(lambda: self._loaded.append(make(base, self._folder.name, adapter_name="adapter_1")))

    def set_adapter(self, number: int) -> float:
        return _timed(lambda: self._loaded[0].set_adapter(f"adapter_{number}"))

    def merge(self) -> float:
        return _timed(self._loaded[0].merge_adapter)

    def unmerge(self) -> float:
        return _timed(self._loaded[0].unmerge_adapter)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers requests until their stream ends.

    Args:
        requests: A stream of JSON lines.
        answers: Where the answers go, a JSON line each.
    """
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("call"))(**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # What libraries print must not mix with the answers: standard output becomes standard error.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
