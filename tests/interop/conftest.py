"""Starts two oracle processes, one with this library and one with the peer, and keeps what they report."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from .cases import Case

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PATIENCE = 120  # seconds that one request may take
# The oracle's own folder is put on the path by hand, because an isolated interpreter takes no hints from its
# surroundings.
START = ["-c", "import sys; sys.path.insert(0, sys.argv[1]); import oracle; oracle.main()", str(HERE)]


class Worker:
    """An oracle process that answers one request after the other.

    Args:
        label: ``ours`` or ``peer``, for messages.
        command: What starts it.
        env: Its environment.
        log: File for what it prints.
    """

    def __init__(self, label: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.label, self.command, self.env, self.log = label, command, env, log
        self.process: subprocess.Popen[str] | None = None

    def send(self, **request: Any) -> None:
        """Ask without waiting for the answer."""
        if self.process is None:
            with open(self.log, "a") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self.env
                )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # receive tells what happened

    def receive(self) -> Any:
        """The answer to the request sent last.

        Raises:
            RuntimeError: The process died, took too long, or the request itself failed.
        """
        assert self.process is not None and self.process.stdout is not None
        watch = threading.Timer(PATIENCE, self.process.kill)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if not line:
            code = self.process.wait()
            self.process = None
            tail = self.log.read_text()[-3000:]
            raise RuntimeError(f"The {self.label} oracle ({self.command[0]}) ended with code {code}:\n{tail}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"The {self.label} oracle failed:\n{reply['error']['trace']}")
        return reply["ok"]

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


@dataclass
class Report:
    """What one oracle saw of one case. ``failure`` is set if it could not even begin."""

    whose: str
    sections: dict[str, dict[str, Any]]
    tensors: dict[str, np.ndarray]
    failure: str | None = None

    def get(self, section: str) -> Any:
        """The section's value, arrays or plain data. Fails the test with the oracle's own trace if it raised."""
        __tracebackhide__ = True
        if self.failure is not None:
            pytest.fail(self.failure, pytrace=False)
        found = self.sections.get(section)
        if found is None:
            first = next((f"{name}:\n{s['error']['trace']}" for name, s in self.sections.items() if "error" in s), "")
            pytest.fail(f"{self.whose} did not come as far as {section!r}. {first}", pytrace=False)
        if "error" in found:
            pytest.fail(f"{self.whose} raised in {section!r}:\n{found['error']['trace']}", pytrace=False)
        if "tensors" in found:
            return {key: self.tensors[f"{section}/{key}"] for key in found["tensors"]}
        return found["value"]


class Lab:
    """Both oracles, and their reports by case: each case is run once, when the first test asks for it.

    Args:
        ours: The process with this library.
        peer: The process with the peer.
        folder: Where models, adapters and reports go.
    """

    def __init__(self, ours: Worker, peer: Worker, folder: Path) -> None:
        self.workers = {"ours": ours, "peer": peer}
        self.folder = folder
        self._answers: dict[str, dict[str, Any]] = {}
        self._reports: dict[tuple[str, str], dict[str, Report]] = {}

    def _at_once(self, requests: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Send one request to each worker, then collect the answers; an exception stands for a failed one."""
        for who, request in requests.items():
            self.workers[who].send(**request)
        answers: dict[str, Any] = {}
        for who in requests:
            try:
                answers[who] = self.workers[who].receive()
            except RuntimeError as error:
                answers[who] = error
        return answers

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answers of both to a question asked once a session; ``folder=True`` gives each a folder of its own."""
        __tracebackhide__ = True
        if op not in self._answers:
            requests = {}
            for who in self.workers:
                own = {"folder": str(self.folder / op / who)} if arguments.get("folder") else {}
                requests[who] = {"op": op, **arguments, **own}
            self._answers[op] = self._at_once(requests)
        for answer in self._answers[op].values():
            if isinstance(answer, Exception):
                pytest.fail(str(answer), pytrace=False)
        return self._answers[op]

    def _run(self, op: str, case: Case, folder_of: dict[str, str]) -> dict[str, Report]:
        key = (op, case.name)
        if key not in self._reports:
            root = self.folder / case.name
            requests = {
                who: {
                    "op": op,
                    "case": case.name,
                    "bases": str(self.folder / "bases"),
                    "folder": str(root / folder_of[who]),
                    "out": str(root / f"{op}-{who}"),
                }
                for who in self.workers
            }
            self._reports[key] = {
                who: read_report(who, Path(requests[who]["out"]), answer)
                for who, answer in self._at_once(requests).items()
            }
        return self._reports[key]

    def created(self, case: Case) -> dict[str, Report]:
        """Reports, by ``ours`` and ``peer``, of making the case's adapters."""
        return self._run("create", case, {"ours": "saved-by-ours", "peer": "saved-by-peer"})

    def loaded(self, case: Case) -> dict[str, Report]:
        """Reports, by who *read*, of loading what the other one saved."""
        self.created(case)
        return self._run("load", case, {"ours": "saved-by-peer", "peer": "saved-by-ours"})

    def converted(self, case: Case) -> dict[str, Report]:
        """Reports of saving an adapter with a start read off the weights, as it is and as a plain one."""
        return self._run("convert", case, {"ours": "saved-by-ours", "peer": "saved-by-peer"})

    def read_converted(self, case: Case) -> dict[str, Report]:
        """Reports, by who *read*, of loading both forms that the other one saved."""
        self.converted(case)
        return self._run("read_converted", case, {"ours": "saved-by-peer", "peer": "saved-by-ours"})

    def saved(self, case: Case, who: str) -> Path:
        """The folder that this one saved."""
        report = self.created(case)[who]
        report.get("saving")
        return self.folder / case.name / f"saved-by-{who}"


def read_report(who: str, out: Path, answer: Any) -> Report:
    """The two files of a report."""
    if isinstance(answer, Exception):
        return Report(who, {}, {}, str(answer))
    return Report(who, json.loads((out / "record.json").read_text()), load_file(out / "record.safetensors"))


def peer_python() -> str:
    """The interpreter that has the peer. Fails, or skips if ``PEFT_NO_PEER=1``, when there is none."""
    if os.environ.get("PEFT_NO_PEER") == "1":
        pytest.skip("PEFT_NO_PEER=1: comparisons with the peer were switched off")
    chosen = os.environ.get("PEFT_PEER_PYTHON") or str(REPOSITORY / ".venv-peer" / "bin" / "python")
    if not os.path.exists(chosen):
        pytest.fail(
            f"No interpreter with the peer at {chosen}. Run `make peer` to build it, point PEFT_PEER_PYTHON at one, or "
            "set PEFT_NO_PEER=1 to leave the comparisons out.",
            pytrace=False,
        )
    return chosen


def our_worker(log: Path) -> Worker:
    """The process with this library. ``PEFT_OURS_PYTHON`` puts another in its place, to test these tests."""
    chosen = os.environ.get("PEFT_OURS_PYTHON")
    if chosen:
        return Worker("ours", [chosen, "-I", *START], isolated(), log)
    env, found = dict(os.environ), importlib.util.find_spec("peft")
    if found is not None and found.origin:
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(found.origin).parents[1]), os.environ.get("PYTHONPATH")])
        )
    return Worker("ours", [sys.executable, *START], env, log)


def isolated() -> dict[str, str]:
    """The environment without what would lead another interpreter to this library."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and not k.startswith("PEFT_")}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Both oracles, started when the first test needs them."""
    python, folder = peer_python(), tmp_path_factory.mktemp("interop")
    peer = Worker("peer", [python, "-I", *START], isolated(), folder / "peer.log")
    ours = our_worker(folder / "ours.log")
    yield Lab(ours, peer, folder)
    ours.close()
    peer.close()
