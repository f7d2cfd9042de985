"""The two sides of the comparison: how their processes are started and asked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Side:
    """One environment.

    Attributes:
        name: `"ours"` or `"peer"`.
        python: Its interpreter.
        threads: Threads of every process started on it.
        environment: The environment variables of those processes.
    """

    name: str
    python: str
    threads: int
    environment: dict[str, str] = field(repr=False)

    @classmethod
    def make(cls, name: str, python: str, threads: int) -> Side:
        """Describes a side.

        Args:
            name: `"ours"` or `"peer"`; only ours keeps `PYTHONPATH`, which may lead to a source tree.
            python: Its interpreter.
            threads: Threads of every process started on it.
        """
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or name == "ours"}
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONHASHSEED": "0",
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        return cls(name, python, threads, environment)

    def run(self, code: str) -> str:
        """Runs a line of Python in a fresh process and returns what it printed."""
        command = [self.python, "-c", code]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def versions(self) -> dict[str, str]:
        """The versions of Python and of the three libraries, without importing them."""
        names = ("peft", "torch", "transformers")
        code = (
            "import importlib.metadata as m, platform; print('python', platform.python_version());"
            f"found = {{d.metadata['Name'].lower(): d.version for d in m.distributions()}};"
            f"print(*(f'{{n}} {{found.get(n, \"from source\")}}' for n in {names}), sep='\\n')"
        )
        return dict(line.split(" ", 1) for line in self.run(code).splitlines())


class WorkerProcess:
    """A running worker.

    Attributes:
        side: The side it runs on.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [side.python, "-m", "benchmarks.worker"]
        self._process = subprocess.Popen(command, env=side.environment, cwd=ROOT, **pipes)

    def ask(self, call: str, **arguments: Any) -> Any:
        """Sends a request and waits for its answer.

        Args:
            call: A method of `benchmarks.worker.Worker`.
            arguments: Its arguments.

        Returns:
            The value it answered.

        Raises:
            RuntimeError: The call failed, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"call": call} | arguments), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.side.name} ended during {call!r}: code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.side.name} failed in {call!r} {arguments}:\n{answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process: it leaves when it is asked nothing more."""
        self._process.communicate()


@contextlib.contextmanager
def workers(*sides: Side) -> Iterator[list[WorkerProcess]]:
    """Starts a worker on each side, together; they end with the `with` block.

    Args:
        sides: The sides.

    Yields:
        The workers, in the order of the sides.
    """
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(contextlib.closing(WorkerProcess(side))) for side in sides]
        for worker in started:
            worker.ask("hello", threads=worker.side.threads)
        yield started
