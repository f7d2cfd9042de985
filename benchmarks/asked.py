"""The command line of the smaller benchmarks: which methods, on which shapes."""

from __future__ import annotations

import argparse

from benchmarks.methods import METHODS, SHAPES


def asked(program: str, description: str | None, **numbers: tuple[int, str]) -> argparse.Namespace:
    """What the command line asks for: `shapes`, and the names of `methods`, all of either by default; and further numbers.

    Args:
        program: Name of the module.
        description: What its help says first.
        numbers: By name of an option its default and what its help says.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description, formatter_class=form)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="rows of the table of methods; all by default")
    parser.add_argument("--only", default="", metavar="SHAPE", help="the beginning of a shape's name")
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    found = parser.parse_args()
    known = [method.name for method in METHODS]
    for name in found.methods:
        if name not in known:
            parser.error(f"{name!r} is not among the methods: {', '.join(known)}")
    found.methods = found.methods or known
    found.shapes = [shape for shape in SHAPES if shape.name.lower().startswith(found.only.lower())]
    return found
