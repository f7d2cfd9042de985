"""Holds this library next to the peer, case by case, in both directions: files, configs, flags, outputs, gradients."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .cases import CASES, Case
from .conftest import Lab

PEER_TO_OURS, OURS_TO_PEER = ("peer", "ours"), ("ours", "peer")
# Fields of adapter_config.json that are sets to their reader.
SETS = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "feedforward_modules",
)  # fmt: skip


def over(cases: Iterable[Case], section: str = "") -> Any:
    """Run a test for each of these cases, but for those where the section differs on purpose."""
    chosen = [case for case in cases if section not in case.more_here]
    return pytest.mark.parametrize("case", chosen, ids=str)


def both_ways(cases: Iterable[Case], section: str = "") -> Any:
    """The same, in both directions: ``writer`` saved the adapter, ``reader`` loaded it."""

    def mark(function: Any) -> Any:
        function = over(cases, section)(function)
        ways = [pytest.param(*way, id=f"{way[0]}-to-{way[1]}") for way in (PEER_TO_OURS, OURS_TO_PEER)]
        return pytest.mark.parametrize(("writer", "reader"), ways)(function)

    return mark


HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
WRAPPED = [case for case in CASES if not case.inject]
INJECTED = [case for case in CASES if case.inject]
SEVERAL = [case for case in WRAPPED if len(case.adapters) > 1]
WHOLE = [case for case in CASES if "selected_adapters" not in case.save]  # what was made is what was saved
TOGETHER = [case for case in CASES if case.together]
MIXED = [case for case in CASES if case.mixed]
MERGED = [case for case in CASES if case.merge]
# unload() gives the base model back with its own head here; the peer leaves the adapter's trained modules in it.
HEADLESS = [
    case for case in CASES if case.task not in HEADED and not any("modules_to_save" in a.values for a in case.adapters)
]
GENERATING = [case for case in CASES if case.generate]


def among(cases: Iterable[Case], *others: list[Case]) -> list[Case]:
    """The cases that are in all the lists."""
    return [case for case in cases if all(case in other for other in others)]


def agree(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Fail unless the same arrays are there and the same numbers in them: whole numbers exactly, others within the
    tolerance.

    The tolerance is relative to the largest number of each array, and absolute below 1.
    """
    __tracebackhide__ = True
    assert sorted(got) == sorted(wanted)
    for name, reference in wanted.items():
        value = got[name]
        assert value.shape == reference.shape, f"{name}: shape {value.shape}, wanted {reference.shape}"
        if not np.issubdtype(reference.dtype, np.floating):
            assert np.array_equal(value, reference), f"{name}: {value.tolist()}, wanted {reference.tolist()}"
            continue
        assert np.isfinite(reference).all(), f"{name}: the reference itself is not finite"
        limit = tolerance * max(1.0, float(np.abs(reference).max(initial=0.0)))
        worst = float(np.abs(value - reference).max(initial=0.0))
        assert worst <= limit, f"{name}: off by {worst:.3g}, allowed {limit:.3g}"


def differences(got: Any, wanted: Any, place: str = "") -> list[str]:
    """Where two pieces of plain data differ, one line each."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        lines = [f"{place}: missing {key!r}" for key in wanted if key not in got]
        lines += [f"{place}: unwanted {key!r}" for key in got if key not in wanted]
        for key in wanted:
            if key in got:
                lines += differences(got[key], wanted[key], f"{place}[{key!r}]")
        return lines
    if isinstance(got, list) and isinstance(wanted, list):
        if all(isinstance(value, str) for value in got + wanted) and sorted(got) == got and sorted(wanted) == wanted:
            missing = [f"{place}: missing {value!r}" for value in wanted if value not in got]
            return missing + [f"{place}: unwanted {value!r}" for value in got if value not in wanted]
        if len(got) == len(wanted):
            pairs = enumerate(zip(got, wanted, strict=True))
            return [line for i, pair in pairs for line in differences(*pair, f"{place}[{i}]")]
    return [] if got == wanted else [f"{place}: {got!r}, wanted {wanted!r}"]


def same(got: Any, wanted: Any) -> None:
    """Fail with the first differences, unless the data are the same."""
    __tracebackhide__ = True
    found = differences(got, wanted)
    if found:
        more = f"\n… and {len(found) - 12} more" if len(found) > 12 else ""
        pytest.fail("\n".join(found[:12]) + more, pytrace=False)


def same_made(lab: Lab, case: Case, section: str, steps: int = 1) -> None:
    """Fail unless both saw the same in this section when they made the adapters, each step adding its roundings."""
    __tracebackhide__ = True
    reports = lab.created(case)
    wanted, got = reports["peer"].get(section), reports["ours"].get(section)
    if "tensors" in reports["peer"].sections[section]:
        agree(got, wanted, case.tolerance * steps)
    else:
        same(got, wanted)


def same_read(lab: Lab, case: Case, writer: str, reader: str, section: str, of: str | None = None) -> None:
    """Fail unless the reader computes what the writer computed, in the writer's section ``of`` if that is given."""
    __tracebackhide__ = True
    wanted = lab.created(case)[writer].get(of or section)
    agree(lab.loaded(case)[reader].get(section), wanted, case.tolerance)


def both_read(lab: Lab, case: Case, section: str) -> None:
    """Fail unless this library, reading the peer's files, and the peer, reading ours, saw the same."""
    __tracebackhide__ = True
    reports = lab.loaded(case)
    same(reports["ours"].get(section), reports["peer"].get(section))


def test_case_names_are_unique() -> None:
    """The name is the folder."""
    assert len({case.name for case in CASES}) == len(CASES)


# -- making adapters -------------------------------------------------------------------------------------------------


@over(CASES)
def test_base_models_are_the_same(lab: Lab, case: Case) -> None:
    reports = lab.created(case)
    agree(reports["ours"].get("outputs of the base"), reports["peer"].get("outputs of the base"), 0.0)


@over(CASES)
def test_adapters_of_the_oracle_matter(lab: Lab, case: Case) -> None:
    """Guards the other tests: an adapter that changes nothing would make every comparison pass."""
    report = lab.created(case)["peer"]
    for adapter in case.adapters:
        adapted, plain = report.get(f"outputs of {adapter.name}"), report.get("outputs of the base")
        for name, value in plain.items():
            real = adapted[name][tuple(slice(-size, None) for size in value.shape)]  # virtual tokens have outputs too
            assert np.abs(real - value).max() > 0.05 * max(1.0, np.abs(value).max())


@over(CASES, "wrapping")
def test_model_class(lab: Lab, case: Case) -> None:
    reports = lab.created(case)
    assert reports["ours"].get("wrapping")[0] == reports["peer"].get("wrapping")[0]


@over(CASES, "wrapping")
def test_training_mode_after_wrapping(lab: Lab, case: Case) -> None:
    reports = lab.created(case)
    assert reports["ours"].get("wrapping")[1] == reports["peer"].get("wrapping")[1]


@over(CASES, "wrapping")
def test_trainable_parameters(lab: Lab, case: Case) -> None:
    reports = lab.created(case)
    same(reports["ours"].get("wrapping")[2], reports["peer"].get("wrapping")[2])


@over([case for case in CASES if len(case.adapters) > 1], "adding")
def test_trainable_parameters_after_adding(lab: Lab, case: Case) -> None:
    same_made(lab, case, "adding")


@over(WRAPPED, "counts")
def test_parameter_counts(lab: Lab, case: Case) -> None:
    same_made(lab, case, "counts")


@over(WRAPPED, "printed")
def test_printed_counts(lab: Lab, case: Case) -> None:
    same_made(lab, case, "printed")


@over(CASES, "initial values")
def test_initial_values(lab: Lab, case: Case) -> None:
    """The same parameters start at zero; the random ones have the same spread, within the error of their number."""
    reports = lab.created(case)
    got, wanted = reports["ours"].get("initial values"), reports["peer"].get("initial values")
    assert sorted(got) == sorted(wanted)
    for kind, reference in wanted.items():
        found = got[kind]
        for exact in ("zero", "tensors", "count"):
            assert found[exact] == reference[exact], f"{kind}: {exact}"
        # Both are estimates of one spread; for normal numbers each is off by std / sqrt(2 n).
        error = 6 / reference["count"] ** 0.5
        assert found["std"] == pytest.approx(reference["std"], rel=error), kind
        assert abs(found["mean"] - reference["mean"]) <= 6 * reference["std"] * (2 / reference["count"]) ** 0.5, kind


@over(CASES, "fresh modules")
def test_fresh_modules_hold_the_base_values(lab: Lab, case: Case) -> None:
    same_made(lab, case, "fresh modules")


@over(CASES, "layer status")
def test_layer_status(lab: Lab, case: Case) -> None:
    same_made(lab, case, "layer status")


@over(WRAPPED, "model status")
def test_model_status(lab: Lab, case: Case) -> None:
    same_made(lab, case, "model status")


@over(INJECTED, "model status")
def test_model_status_of_a_raw_model(lab: Lab, case: Case) -> None:
    """Of a raw model the peer does not know the methods and, outside transformers, the class."""
    reports = lab.created(case)
    got, wanted = dict(reports["ours"].get("model status")), dict(reports["peer"].get("model status"))
    for unknown, nothing in {"peft_types": {}, "base_model_type": "other"}.items():
        if wanted[unknown] == nothing:
            wanted[unknown] = got[unknown]
    same(got, wanted)


@over(CASES, "layer attributes")
def test_layer_attributes(lab: Lab, case: Case) -> None:
    reports = lab.created(case)
    got, wanted = reports["ours"].get("layer attributes"), reports["peer"].get("layer attributes")
    own = {layer: set(got[layer]) - set(attributes) for layer, attributes in wanted.items() if layer in got}
    same({k: {n: v for n, v in values.items() if n not in own.get(k, ())} for k, values in got.items()}, wanted)


@over(CASES, "state")
def test_state_dict(lab: Lab, case: Case) -> None:
    same_made(lab, case, "state")


@over(CASES, "adapter states")
def test_adapter_state_dicts(lab: Lab, case: Case) -> None:
    same_made(lab, case, "adapter states")


@over(CASES, "flags after activating")
def test_trainable_parameters_after_activating(lab: Lab, case: Case) -> None:
    same_made(lab, case, "flags after activating")


@over(CASES)
def test_outputs_with_the_same_weights(lab: Lab, case: Case) -> None:
    for adapter in case.adapters:
        same_made(lab, case, f"outputs of {adapter.name}")


@over([case for case in CASES if case.steps])
def test_training_takes_the_same_steps(lab: Lab, case: Case) -> None:
    same_made(lab, case, "trained", case.steps)


@over(among(TOGETHER, WRAPPED), "status together")
def test_status_with_several_active(lab: Lab, case: Case) -> None:
    same_made(lab, case, "status together")


@over(among(WRAPPED, MERGED), "model merged and unloaded")
def test_model_left_by_merge_and_unload(lab: Lab, case: Case) -> None:
    same_made(lab, case, "model merged and unloaded")


@over(among(WRAPPED, HEADLESS), "model unloaded")
def test_model_left_by_unload(lab: Lab, case: Case) -> None:
    same_made(lab, case, "model unloaded")


@over(SEVERAL, "deleting an inactive adapter")
def test_deleting_an_inactive_adapter(lab: Lab, case: Case) -> None:
    same_made(lab, case, "deleting an inactive adapter")


@over(SEVERAL, "deleting the active adapter")
def test_deleting_the_active_adapter(lab: Lab, case: Case) -> None:
    same_made(lab, case, "deleting the active adapter")


@over(SEVERAL, "outputs after deleting")
def test_outputs_after_deleting(lab: Lab, case: Case) -> None:
    same_made(lab, case, "outputs after deleting")


# -- files -----------------------------------------------------------------------------------------------------------


def tensor_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The header of every adapter's file under the folder."""
    found = {}
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for entry in header.values():
            entry.pop("data_offsets", None)
        found[str(path.relative_to(folder))] = header
    assert found
    return found


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every adapter_config.json under the folder; what is a set to its reader is sorted."""
    found = {}
    for path in sorted(folder.rglob("adapter_config.json")):
        values = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {
            key: sorted(set(value)) if key in SETS and isinstance(value, list) else value
            for key, value in values.items()
        }
    assert found
    return found


@over(CASES, "saving")
def test_files(lab: Lab, case: Case) -> None:
    same_made(lab, case, "saving")


@over(CASES, "file keys")
def test_file_keys(lab: Lab, case: Case) -> None:
    got, wanted = tensor_files(lab.saved(case, "ours")), tensor_files(lab.saved(case, "peer"))
    same({name: sorted(entries) for name, entries in got.items()}, {k: sorted(v) for k, v in wanted.items()})


@over(CASES, "file keys")
def test_file_shapes_and_dtypes(lab: Lab, case: Case) -> None:
    got, wanted = tensor_files(lab.saved(case, "ours")), tensor_files(lab.saved(case, "peer"))
    if not case.inject:  # otherwise it is the oracle that writes the file
        for header in got.values():
            assert header["__metadata__"].pop("peft_checksum")  # ours alone, in a place that the peer passes over
    same(got, wanted)


@over(CASES)
def test_config_keys(lab: Lab, case: Case) -> None:
    """The peer's keys are all there; keys of our own only where they say something."""
    got, wanted = configs(lab.saved(case, "ours")), configs(lab.saved(case, "peer"))
    assert sorted(got) == sorted(wanted)
    for name, values in wanted.items():
        assert set(values) - set(got[name]) == set(), f"{name}: the peer's keys are missing"
        assert [key for key in set(got[name]) - set(values) if got[name][key] is None] == [], (
            f"{name}: empty keys of our own"
        )


@over(CASES, "config values")
def test_config_values(lab: Lab, case: Case) -> None:
    got, wanted = configs(lab.saved(case, "ours")), configs(lab.saved(case, "peer"))
    for name, values in wanted.items():
        shared = {key: value for key, value in values.items() if key != "peft_version"}
        if any(adapter.values.get("target_modules") == "all-linear" for adapter in case.adapters):
            # Ours writes the shortest names that mean the same layers; that they do is what the file keys show.
            long, short = shared.pop("target_modules"), got[name]["target_modules"]
            assert all(any(n == t or n.endswith(f".{t}") for t in short) for n in long)
        if "num_virtual_tokens" in values and shared["auto_mapping"] is None:
            # Ours says in which architecture virtual tokens were trained, whatever the task.
            del shared["auto_mapping"]
            assert got[name]["auto_mapping"]["parent_library"].startswith("transformers.models.")
        same({key: got[name].get(key) for key in shared}, shared)


# -- reading the other's files ---------------------------------------------------------------------------------------


@over(CASES)
def test_class_and_mode_after_loading(lab: Lab, case: Case) -> None:
    reports = lab.loaded(case)
    assert reports["ours"].get("loading")[:2] == reports["peer"].get("loading")[:2]


@over(WRAPPED)
def test_nothing_trains_after_loading(lab: Lab, case: Case) -> None:
    """Without ``is_trainable`` everything is frozen, also the biases, which the peer leaves trainable."""
    assert lab.loaded(case)["ours"].get("loading")[2] == []


@over(INJECTED)
def test_trainable_parameters_after_injecting_and_filling(lab: Lab, case: Case) -> None:
    reports = lab.loaded(case)
    same(reports["ours"].get("loading")[2], reports["peer"].get("loading")[2])


@over(CASES)
def test_loading_finds_every_key(lab: Lab, case: Case) -> None:
    for reader in ("ours", "peer"):
        results = lab.loaded(case)[reader].get("loading")[3]
        assert all(keys == [] for result in results for keys in result), reader


@over(WRAPPED, "loading to train")
def test_loading_to_train(lab: Lab, case: Case) -> None:
    both_read(lab, case, "loading to train")


@over(CASES, "loaded layer status")
def test_loaded_layer_status(lab: Lab, case: Case) -> None:
    both_read(lab, case, "loaded layer status")


@over(CASES, "loaded state")
def test_loaded_state_dict(lab: Lab, case: Case) -> None:
    both_read(lab, case, "loaded state")


@over(CASES, "flags after activating")
def test_loaded_trainable_parameters_after_activating(lab: Lab, case: Case) -> None:
    both_read(lab, case, "flags after activating")


@both_ways(WRAPPED)
def test_loaded_outputs_when_frozen(lab: Lab, case: Case, writer: str, reader: str) -> None:
    chosen = case.save.get("selected_adapters", [case.adapters[0].name])
    same_read(lab, case, writer, reader, "outputs when frozen", of=f"outputs of {chosen[0]}")


@both_ways(CASES)
def test_loaded_outputs(lab: Lab, case: Case, writer: str, reader: str) -> None:
    for name in case.save.get("selected_adapters", [adapter.name for adapter in case.adapters]):
        same_read(lab, case, writer, reader, f"outputs of {name}")


@both_ways(CASES, "outputs without adapters")
def test_loaded_outputs_without_adapters(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "outputs without adapters")


@both_ways(WHOLE)
def test_loaded_outputs_after_the_disabling_context(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "outputs after the context")


@both_ways(among(WHOLE, TOGETHER), "outputs together")
def test_loaded_outputs_with_several_active(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "outputs together")


@both_ways(among(WHOLE, MIXED), "outputs of a mixed batch")
def test_loaded_outputs_of_a_mixed_batch(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "outputs of a mixed batch")


@both_ways(among(WHOLE, GENERATING), "generated")
def test_loaded_generation(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "generated")


@both_ways(among(WHOLE, GENERATING, MIXED), "generated by a mixed batch")
def test_loaded_generation_of_a_mixed_batch(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "generated by a mixed batch")


@both_ways(among(WHOLE, GENERATING, MIXED), "beams of a mixed batch")
def test_loaded_beams_of_a_mixed_batch(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "beams of a mixed batch")


@both_ways([c for c in WHOLE if "loaded gradients" not in c.more_here], "gradients")
def test_loaded_gradients(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "gradients")


@both_ways(among(WHOLE, MERGED), "merged")
def test_loaded_and_merged(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "merged")


@both_ways(among(WHOLE, MERGED, TOGETHER), "merged together")
def test_loaded_and_several_merged(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "merged together")


@both_ways(among(WHOLE, WRAPPED, MERGED), "merged and unloaded")
def test_loaded_merged_and_unloaded(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "merged and unloaded")


@both_ways(among(WHOLE, WRAPPED, HEADLESS), "unloaded")
def test_loaded_and_unloaded(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "unloaded")


@both_ways(among(WHOLE, INJECTED), "outputs by keys")
def test_injection_by_the_keys_of_the_file(lab: Lab, case: Case, writer: str, reader: str) -> None:
    same_read(lab, case, writer, reader, "outputs by keys", of=f"outputs of {case.adapters[0].name}")
