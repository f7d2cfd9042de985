"""Adapters whose start is read off the base weights (PiSSA, OLoRA), next to the peer and in both directions."""

from __future__ import annotations

import pytest

from .cases import CONVERSIONS, Case
from .conftest import Lab
from .test_interop import agree, configs, same, tensor_files

every_case = pytest.mark.parametrize("case", CONVERSIONS, ids=str)
TOLERANCE = 3e-5  # sums and differences of large parts


@every_case
def test_a_fresh_adapter_computes_what_the_base_does(lab: Lab, case: Case) -> None:
    reports = lab.converted(case)
    for report in reports.values():
        agree(report.get("outputs when fresh"), reports["peer"].get("outputs of the base"), TOLERANCE)


@every_case
@pytest.mark.parametrize("form", ["start", "as-it-is", "plain"])
def test_files_and_configurations_are_the_same(lab: Lab, case: Case, form: str) -> None:
    for report in lab.converted(case).values():
        report.get("outputs")
    ours, peer = (lab.folder / case.name / f"saved-by-{who}" / form for who in ("ours", "peer"))
    found = tensor_files(ours)
    for header in found.values():
        assert header["__metadata__"].pop("peft_checksum")  # ours alone
    same(found, tensor_files(peer))
    (got,), (wanted,) = configs(ours).values(), configs(peer).values()
    del wanted["peft_version"]
    if form == "start":
        del wanted["inference_mode"]  # a fresh adapter is saved for training by the peer
    same({key: got.get(key) for key in wanted}, wanted)


@every_case
@pytest.mark.parametrize("form", ["as-it-is", "plain"])
@pytest.mark.parametrize(("writer", "reader"), [("peer", "ours"), ("ours", "peer")])
def test_what_the_other_saved_computes_the_same(lab: Lab, case: Case, form: str, writer: str, reader: str) -> None:
    trained = lab.converted(case)[writer].get("outputs")
    agree(lab.read_converted(case)[reader].get(f"outputs {form}"), trained, TOLERANCE)
