"""The experimenter: builds, saves, loads and measures adapters by the public API, so that either library can run it.

It runs as a process of its own that reads one JSON request a line and answers each with one JSON line::

    {"op": "create", "case": "bert-classifier", "bases": "…", "folder": "…", "out": "…"}

``create`` makes a case's adapters and saves them, ``load`` reads a saved folder back; both write what they saw to
``out`` as ``record.json`` and ``record.safetensors``. ``surface`` describes public names, ``mistakes`` reports what
wrong calls raise, ``combine`` and ``merge_utils`` what combining gives.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import BASES, CASES, CONVERSIONS
from oracle_combining import combined, on_tensors
from oracle_mistakes import mistakes
from oracle_models import build_base, make_config, make_inputs, numbers
from oracle_names import describe_error, plain, surface
from safetensors.torch import save_file
from torch import nn

import peft
import peft.functional
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

NEW_TOKENS = 5  # generated a prompt


# -- what is written down --------------------------------------------------------------------------------------------


class Record:
    """What a run saw, section by section. A section that raises is kept as an error, and the others go on."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def note(self, section: str, look: Callable[[], Any]) -> bool:
        """Keep what ``look`` returns: a dict of tensors, or anything that JSON can hold. True if it did not raise."""
        try:
            value = look()
        except Exception as error:
            self.sections[section] = {"error": describe_error(error)}
            return False
        if isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
            for key, tensor in value.items():
                kept = tensor.detach().to("cpu")
                self.tensors[f"{section}/{key}"] = (
                    (kept.float() if kept.is_floating_point() else kept).contiguous().clone()
                )
            value = sorted(value)
            self.sections[section] = {"tensors": value}
        else:
            self.sections[section] = {"value": plain(value)}
        return True

    def write(self, out: str) -> None:
        """Write both files into the folder."""
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, os.path.join(out, "record.safetensors"))
        Path(out, "record.json").write_text(json.dumps(self.sections))


def shapes(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Shape and dtype of each entry."""
    return {key: [list(value.shape), str(value.dtype)] for key, value in state.items()}


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that train."""
    return sorted(name for name, param in parameters(model) if param.requires_grad)


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters by name; the peer has a module of its own between an embedding and its trained rows, and virtual tokens stand
    inside the base model here and beside it in the peer."""
    named = model.named_parameters()
    return [(n.replace(".token_adapter.", ".").removeprefix("base_model.peft_prompts."), param) for n, param in named]


def belongs(name: str, case: Any) -> bool:
    """Whether a parameter is one of an adapter's own."""
    return any(f".{adapter.name}." in f"{name}." for adapter in case.adapters)


# -- one model, wrapped or raw ---------------------------------------------------------------------------------------


class Patient:
    """A model with adapters, and the same verbs whether it is a ``PeftModel`` or a raw model with injected layers."""

    def __init__(self, model: nn.Module, case: Any) -> None:
        self.model, self.case = model, case
        self.inputs, self.labels = make_inputs(case)

    def layers(self) -> list[tuple[str, Any]]:
        """The adapted layers."""
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)]

    def activate(self, *names: str) -> None:
        """Make these adapters the active ones."""
        if self.case.inject:
            peft.functional.set_adapter(self.model, list(names))
        elif len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(list(names))

    @contextlib.contextmanager
    def disabled(self) -> Any:
        """Without adapters."""
        if not self.case.inject:
            with self.model.disable_adapter():
                yield
            return
        wrappers = [m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
        for module in wrappers:
            module.enable_adapters(False)
        yield
        for module in wrappers:
            module.enable_adapters(True)

    def run(self, model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The outputs for the fixed inputs."""
        model = self.model if model is None else model
        inputs = {**self.inputs, **kwargs}
        if BASES[self.case.base].inputs == "seq2seq":
            inputs["decoder_input_ids"] = self.labels["labels"]
        with torch.no_grad():
            return outputs(model(**inputs))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Loss and gradients of everything that trains, in training mode unless the adapter has dropout."""
        dropout = any(v for adapter in self.case.adapters for k, v in adapter.values.items() if k.endswith("dropout"))
        self.model.train(not dropout)
        self.model.zero_grad(set_to_none=True)
        result = self.model(**self.inputs, **self.labels)
        if self.labels:
            loss = result.loss
        else:
            value = next(iter(outputs(result).values()))
            loss = (value.float() * numbers("weights of the loss", value.shape)).mean()
        loss.backward()
        grads = {n: p.grad for n, p in parameters(self.model) if p.requires_grad and p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        return {"loss": loss.detach(), **grads}

    def generated(self, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Greedy continuations."""
        ids = self.model.generate(
            **self.inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **kwargs
        )
        return {"ids": ids}

    def merged(self, *names: str) -> dict[str, torch.Tensor]:
        """Outputs of a copy while it is merged, and after unmerging where no rounding is lost."""
        twin = Patient(copy.deepcopy(self.model), self.case)
        twin.activate(*names)
        if self.case.inject:
            for _, layer in twin.layers():
                layer.merge()
        else:
            twin.model.base_model.merge_adapter()
        found = {f"merged.{k}": v for k, v in twin.run().items()}
        if self.case.inject:
            for _, layer in twin.layers():
                layer.unmerge()
        else:
            twin.model.base_model.unmerge_adapter()
        if self.case.dtype == "float32":
            found |= {f"unmerged.{k}": v for k, v in twin.run().items()}
        return found


def outputs(result: Any) -> dict[str, torch.Tensor]:
    """The tensors worth comparing in a model's answer."""
    if isinstance(result, torch.Tensor):
        return {"output": result}
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return {name: result[name] for name in names if name in result}


def layer_attributes(patient: Patient) -> dict[str, Any]:
    """What other libraries read off adapted layers."""
    found: dict[str, Any] = {}
    for name, layer in patient.layers():
        values: dict[str, Any] = {}
        for attribute in ("r", "lora_alpha", "scaling", "in_features", "out_features"):
            if hasattr(layer, attribute):
                value = getattr(layer, attribute)
                values[attribute] = dict(value) if isinstance(value, dict) else value
        for attribute in ("active_adapters", "merged_adapters", "merged", "disable_adapters"):
            values[attribute] = getattr(layer, attribute)
        filled = (slot for slot in layer.adapter_layer_names if len(getattr(layer, slot, ())))
        values["slots"] = {slot: sorted(getattr(layer, slot)) for slot in filled}
        values["base_layer"] = type(layer.get_base_layer()).__name__
        values["class"] = type(layer).__name__
        values["weight"] = list(layer.weight.shape)
        found[name] = values
    for name, module in patient.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found[name] = {"class": type(module).__name__, "active_adapters": module.active_adapters}
    return found


def initial_values(patient: Patient) -> dict[str, Any]:
    """Of each kind of adapter parameter: how many are zero throughout, and the spread of the others taken together."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, param in parameters(patient.model):
        if belongs(name, patient.case) and "modules_to_save" not in name:
            kind = next(part for part in name.split(".") if any(part.startswith(p) for p in slots(patient)))
            kinds.setdefault(kind, []).append(param.detach().float().flatten())
    report = {}
    for kind, tensors in kinds.items():
        values = torch.cat(tensors)
        report[kind] = {
            "zero": sum(not t.any() for t in tensors),
            "tensors": len(tensors),
            "count": values.numel(),
            "std": values.std().item(),
            "mean": values.mean().item(),
            "largest": values.abs().max().item(),
        }
    return report


def slots(patient: Patient) -> set[str]:
    """The names that the method gives its parameters."""
    return {name for _, layer in patient.layers() for name in layer.adapter_layer_names}


def extra_module_values(patient: Patient) -> dict[str, Any]:
    """Fresh copies of whole modules hold the base model's values."""
    copies = {n: p for n, p in patient.model.named_parameters() if "modules_to_save" in n}
    return copies or {}


def randomise(patient: Patient) -> None:
    """Give adapters, trained heads and trained biases weights that matter, the same in every process."""
    seen = set()  # the peer has tied factors as two parameters of one memory
    with torch.no_grad():
        for name, param in parameters(patient.model):
            if param.data_ptr() in seen:
                continue
            seen.add(param.data_ptr())
            owner = next((a for a in patient.case.adapters if f".{a.name}." in f"{name}."), patient.case.adapters[0])
            if belongs(name, patient.case) or param.requires_grad:
                param.copy_(owner.centre + owner.noise * numbers(f"{owner.name}/{name}", param.shape))


def adapter_states(patient: Patient) -> dict[str, Any]:
    """Keys, shapes and dtypes of ``get_peft_model_state_dict`` for each adapter."""
    return {
        a.name: shapes(peft.get_peft_model_state_dict(patient.model, adapter_name=a.name, save_embedding_layers=False))
        for a in patient.case.adapters
    }


def observe(record: Record, patient: Patient, raw_keys: set[str]) -> None:
    """Everything that can be seen of a model with trained adapters. The model is used up."""
    case, names = patient.case, [adapter.name for adapter in patient.case.adapters]
    first = names[0]

    for name in names:
        record.note(f"outputs of {name}", functools.partial(activate_and_run, patient, name))
    record.note(
        "flags after activating",
        lambda: {name: (patient.activate(name), trainable(patient.model))[1] for name in names},
    )
    patient.activate(first)

    def without() -> dict[str, torch.Tensor]:
        with patient.disabled():
            return patient.run()

    record.note("outputs without adapters", without)
    record.note("outputs after the context", patient.run)
    if case.together:
        record.note("outputs together", lambda: activate_and_run(patient, *names))
        if not case.inject:
            record.note(
                "status together", lambda: [peft.get_model_status(patient.model), patient.model.active_adapters]
            )
        patient.activate(first)
    if case.mixed:
        rows = [names[-1], "__base__", first]
        record.note("outputs of a mixed batch", lambda: patient.run(adapter_names=rows))
        if case.generate:
            record.note("generated by a mixed batch", lambda: patient.generated(adapter_names=rows))
            record.note("beams of a mixed batch", lambda: patient.generated(adapter_names=rows, num_beams=2))
    if case.generate:
        record.note("generated", patient.generated)
    record.note("gradients", patient.gradients)
    if case.merge:
        record.note("merged", lambda: patient.merged(first))
        if case.together:
            record.note("merged together", lambda: patient.merged(*names))
    if case.inject:
        return

    def unloaded(merge: bool) -> tuple[dict[str, torch.Tensor], list[Any]]:
        twin = copy.deepcopy(patient.model)
        bare = twin.base_model.merge_and_unload() if merge else twin.base_model.unload()
        return patient.run(bare), [type(bare).__name__, sorted(set(bare.state_dict()) ^ raw_keys), trainable(bare)]

    def note_unloaded(section: str, merge: bool) -> None:
        kept: dict[str, Any] = {}

        def look() -> dict[str, torch.Tensor]:
            values, kept["about"] = unloaded(merge)
            return values

        if record.note(section, look):
            record.note(f"model {section}", lambda: kept["about"])

    if case.merge:
        note_unloaded("merged and unloaded", True)
    note_unloaded("unloaded", False)
    if len(names) > 1:

        def without_the_last() -> list[Any]:
            twin = copy.deepcopy(patient.model)
            twin.delete_adapter(names[-1])
            return [sorted(twin.state_dict()), sorted(twin.peft_config), peft.get_model_status(twin), trainable(twin)]

        def without_the_first() -> list[Any]:
            patient.model.delete_adapter(first)
            return [sorted(patient.model.state_dict()), sorted(patient.model.peft_config)]

        patient.activate(first)
        record.note("deleting an inactive adapter", without_the_last)
        record.note("deleting the active adapter", without_the_first)
        record.note("outputs after deleting", lambda: activate_and_run(patient, names[-1]))


def activate_and_run(patient: Patient, *names: str) -> dict[str, torch.Tensor]:
    """Outputs with these adapters active."""
    patient.activate(*names)
    return patient.run()


# -- the two directions ----------------------------------------------------------------------------------------------


def adapter_folder(case: Any, folder: str, adapter: Any) -> Path:
    """Where ``save_pretrained`` puts an adapter."""
    root = Path(folder) / (case.subfolder or "")
    return root if adapter.name == "default" else root / adapter.name


def saved(case: Any) -> list[Any]:
    """The adapters that the case saves."""
    chosen = case.save.get("selected_adapters")
    return [a for a in case.adapters if chosen is None or a.name in chosen]


def create(case: Any, bases: str, folder: str, out: str) -> None:
    """Make the case's adapters, look at them, save them, and look at what they compute."""
    record, base = Record(), build_base(case, bases)
    raw_keys = set(base.state_dict())
    patient = Patient(base, case)
    record.note("outputs of the base", patient.run)

    def wrap() -> list[Any]:
        first = case.adapters[0]
        if case.inject:
            keep = {k: v for k, v in case.wrap.items() if k == "low_cpu_mem_usage"}
            patient.model = peft.inject_adapter_in_model(
                make_config(case, first), base, adapter_name=first.name, **keep
            )
        elif case.wrap.get("low_cpu_mem_usage"):  # a model to be filled from a file; here the start values matter
            keep = {k: v for k, v in case.wrap.items() if k != "low_cpu_mem_usage"}
            patient.model = peft.get_peft_model(base, make_config(case, first), adapter_name=first.name, **keep)
        else:
            patient.model = peft.get_peft_model(base, make_config(case, first), adapter_name=first.name, **case.wrap)
        return [type(patient.model).__name__, patient.model.training, trainable(patient.model)]

    if not record.note("wrapping", wrap):
        record.write(out)
        return
    model: Any = patient.model

    def parameter_count() -> str:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            model.print_trainable_parameters()
        return text.getvalue()

    if not case.inject:
        record.note("printed", parameter_count)
        record.note("counts", lambda: list(model.get_nb_trainable_parameters()))

    def add() -> list[Any]:
        for adapter in case.adapters[1:]:
            if case.inject:
                peft.inject_adapter_in_model(make_config(case, adapter), model, adapter_name=adapter.name)
            else:
                model.add_adapter(adapter.name, make_config(case, adapter))
        return [trainable(model), type(model).__name__]

    record.note("adding", add)
    record.note("initial values", lambda: initial_values(patient))
    record.note("fresh modules", lambda: extra_module_values(patient))
    record.note("layer status", lambda: peft.get_layer_status(model))
    record.note("model status", lambda: peft.get_model_status(model))
    record.note("layer attributes", lambda: layer_attributes(patient))
    record.note("state", lambda: shapes(model.state_dict()))
    record.note("adapter states", lambda: adapter_states(patient))
    randomise(patient)
    model.eval()
    record.note("saving", lambda: save(case, model, folder))
    observe(record, patient, raw_keys)
    record.write(out)


def save(case: Any, model: Any, folder: str) -> list[str]:
    """Save as a user does; for injected adapters as other libraries do. The files that lie there now."""
    root = Path(folder) / (case.subfolder or "")
    if case.inject:
        for adapter in saved(case):
            place = adapter_folder(case, folder, adapter)
            place.mkdir(parents=True, exist_ok=True)
            state = peft.get_peft_model_state_dict(model, adapter_name=adapter.name)
            save_file({k: v.contiguous() for k, v in state.items()}, place / "adapter_model.safetensors")
            make_config(case, adapter).save_pretrained(place)
    else:
        model.save_pretrained(str(root), **case.save)
    files = [
        p for p in Path(folder).rglob("*") if p.is_file() and p.name != "adapter_training.safetensors"
    ]  # only here
    return sorted(str(p.relative_to(folder)) for p in files)


def load(case: Any, bases: str, folder: str, out: str) -> None:
    """Read adapters that either library saved into a fresh base model, and look at them."""
    record = Record()
    chosen = saved(case)
    narrowed = dataclasses.replace(case, adapters=tuple(chosen), together=case.together and len(chosen) > 1)
    patient = Patient(build_base(case, bases, spoil=True), narrowed)
    raw_keys = set(patient.model.state_dict())

    def read(is_trainable: bool) -> list[Any]:
        first, place = chosen[0], str(adapter_folder(case, folder, chosen[0]))
        more = dict(case.wrap)
        if case.subfolder:
            place, more["subfolder"] = folder, case.subfolder
        patient.model = peft.PeftModel.from_pretrained(
            patient.model, place, adapter_name=first.name, is_trainable=is_trainable, **more
        )
        results = []
        for adapter in chosen[1:]:
            result = patient.model.load_adapter(
                str(adapter_folder(case, folder, adapter)), adapter_name=adapter.name, is_trainable=is_trainable, **more
            )
            missing = [key for key in result.missing_keys if f".{adapter.name}." in f"{key}."]
            results.append([missing, sorted(result.unexpected_keys)])
        return [type(patient.model).__name__, patient.model.training, trainable(patient.model), results]

    def inject() -> list[Any]:
        results = []
        for adapter in chosen:
            state = peft.load_peft_weights(str(adapter_folder(case, folder, adapter)), device="cpu")
            config = peft.PeftConfig.from_pretrained(str(adapter_folder(case, folder, adapter)))
            config.inference_mode = False
            peft.inject_adapter_in_model(config, patient.model, adapter_name=adapter.name)
            result = peft.set_peft_model_state_dict(patient.model, state, adapter_name=adapter.name)
            missing = [key for key in result.missing_keys if f".{adapter.name}." in f"{key}."]
            results.append([missing, sorted(result.unexpected_keys)])
        return [type(patient.model).__name__, patient.model.training, trainable(patient.model), results]

    if case.inject:
        succeeded = record.note("loading", inject)
    else:
        succeeded = record.note("loading", lambda: read(False))
        record.note("files read", lambda: [plain(c.task_type) for c in patient.model.peft_config.values()])
        if succeeded:
            record.note("outputs when frozen", patient.run)
            patient.model = build_base(case, bases, spoil=True)
            succeeded = record.note("loading to train", lambda: read(True))
            if not succeeded and "loading to train" in case.more_here:  # the peer does not do it
                patient.model = build_base(case, bases, spoil=True)
                succeeded = bool(read(False))
    if succeeded:
        record.note("loaded layer status", lambda: peft.get_layer_status(patient.model))
        record.note("loaded state", lambda: shapes(patient.model.state_dict()))
        patient.model.eval()
        observe(record, patient, raw_keys)
        if case.inject:
            record.note("outputs by keys", lambda: inject_by_keys(case, bases, folder))
    record.write(out)


def inject_by_keys(case: Any, bases: str, folder: str) -> dict[str, torch.Tensor]:
    """The targets taken from the file's keys in place of the config's."""
    patient, adapter = Patient(build_base(case, bases), case), case.adapters[0]
    state = peft.load_peft_weights(str(adapter_folder(case, folder, adapter)), device="cpu")
    config = make_config(case, adapter)
    peft.inject_adapter_in_model(config, patient.model, adapter_name=adapter.name, state_dict=state)
    peft.set_peft_model_state_dict(patient.model, state, adapter_name=adapter.name)
    return patient.run(patient.model.eval())


# -- starts that are read off the weights ----------------------------------------------------------------------------


def convert(case: Any, bases: str, folder: str, out: str) -> None:
    """Make an adapter with such a start, keep the start, train it a little, and save it as it is and as a plain one."""
    record, adapter, root = Record(), case.adapters[0], Path(folder)
    patient = Patient(build_base(case, bases), case)
    record.note("outputs of the base", patient.run)
    patient.model = model = peft.get_peft_model(patient.model, make_config(case, adapter)).eval()
    record.note("outputs when fresh", patient.run)
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(str(root / "start"))
    config.init_lora_weights = adapter.values["init_lora_weights"]
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.add_(0.1 * numbers(name, param.shape))
    record.note("outputs", patient.run)
    model.save_pretrained(str(root / "as-it-is"))
    model.save_pretrained(str(root / "plain"), path_initial_model_for_weight_conversion=str(root / "start"))
    record.write(out)


def read_converted(case: Any, bases: str, folder: str, out: str) -> None:
    """Read both forms of what :func:`convert` saved."""
    record = Record()
    for form in ("as-it-is", "plain"):
        patient = Patient(build_base(case, bases), case)
        patient.model = peft.PeftModel.from_pretrained(patient.model, str(Path(folder) / form)).eval()
        record.note(f"outputs {form}", patient.run)
    record.write(out)


def read_folder(model: str, base: str, adapter: str, inputs: dict[str, list[list[int]]]) -> dict[str, Any]:
    """First output, and greedy continuation where there is one, of a saved base model of a class with the adapter of a folder."""
    plain = getattr(transformers, model).from_pretrained(base)
    read = peft.PeftModel.from_pretrained(plain, adapter).eval()
    tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
    with torch.no_grad():
        found: dict[str, Any] = {"output": read(**tensors)[0].tolist(), "type": read.active_peft_config.peft_type.value}
        if model.endswith(("LMHeadModel", "ForCausalLM")):
            greedy = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            found["generated"] = read.generate(**tensors, **greedy)[:, -NEW_TOKENS:].tolist()
    return found


# -- the process -----------------------------------------------------------------------------------------------------


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks."""
    operation = request.pop("op")
    if operation == "hello":
        versions = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {**versions, "file": peft.__file__, "python": sys.executable}
    if operation == "surface":
        return surface(request["names"])
    if operation == "combine":
        return combined(**request)
    if operation == "merge_utils":
        return on_tensors()
    if operation == "mistakes":
        return mistakes(**request)
    if operation == "read":
        return read_folder(**request)
    name = request.pop("case")
    case = next(case for case in CASES + CONVERSIONS if case.name == name)
    {"create": create, "load": load, "convert": convert, "read_converted": read_converted}[operation](case, **request)
    return {}


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)  # the models are tiny and two of these processes run side by side
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"ok": answer(json.loads(line))}
        except Exception as error:
            reply = {"error": describe_error(error)}
        channel.write(json.dumps(reply) + "\n")
