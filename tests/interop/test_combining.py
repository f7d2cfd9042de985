"""Combining adapters: the same weights in, the same ΔW out as in the peer, for every type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .conftest import Lab

PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("svd", "linear", "cat", *PRUNED, *(f"{name}_svd" for name in PRUNED))


def row(name: str, how: str, weights: tuple[float, ...] = (1.0, 0.7), **more: Any) -> dict[str, Any]:
    """One combination. The peer draws random numbers for the new adapter's start first, so dropping cannot be compared here."""
    density = {"density": 1.0 if how.startswith("dare") else 0.5} if how.startswith(PRUNED) else {}
    options = {"combination_type": how, **density}
    sides = {key: more.pop(key) for key in ("first", "second", "adapters") if key in more}
    return {"name": name, "weights": list(weights), "options": {**options, **more}, **sides}


ROWS = (
    *(row(how, how) for how in TYPES),
    *(row(f"{how}, one taken away", how, (1.0, -0.7)) for how in TYPES),
    *(row(f"{how}, alphas", how, (0.5, 2.0), second={"lora_alpha": 2}) for how in TYPES),
    # Of one adapter alone the peer prunes nothing, whatever the density.
    *(row(f"{how}, one alone", how, (0.5,), adapters=["two"]) for how in ("svd", "linear", "cat", "dare_ties_svd")),
    *(row(f"{how}, ranks", how, first={"r": 2}) for how in ("svd", "cat", "ties_svd")),
    *(
        row(f"{how}, other layers", how, second={"target_modules": ["linear", "head"]})
        for how in ("svd", "cat", "linear", "ties")
    ),
    row("expressions", "cat", first={"target_modules": "embedding|linear"}, second={"target_modules": "conv1d"}),
    row("svd of rank 2", "svd", svd_rank=2),
    row("ties by frequency", "ties", majority_sign_method="frequency"),
    row("a density of 1", "ties", density=1.0),
    row("a density of 0.9", "magnitude_prune", density=0.9),
)
# The new configuration keeps the first one's use_rslora in the peer, although its factors hold all scales already.
RSLORA = tuple(row(f"{how}, rslora", how, first={"use_rslora": True}) for how in ("svd", "cat", "linear"))


@pytest.fixture(scope="module")
def both(lab: Lab) -> dict[str, Any]:
    return lab.ask("combine", rows=[*ROWS, *RSLORA])


@pytest.mark.parametrize("name", [entry["name"] for entry in ROWS])
def test_combined_adapters_are_the_peer_s(both: dict[str, Any], name: str) -> None:
    wanted, got = both["peer"][name], both["ours"][name]
    assert "error" not in wanted, f"the peer refuses this: {wanted['error']['message']}"
    assert "error" not in got, got["error"]["trace"]
    assert got["deltas"].keys() == wanted["deltas"].keys()
    for layer, delta in wanted["deltas"].items():
        np.testing.assert_allclose(got["deltas"][layer], delta, atol=2e-5, rtol=1e-4, err_msg=layer)
    assert {k: got[k] for k in ("trains", "active")} == {k: wanted[k] for k in ("trains", "active")}


@pytest.mark.parametrize("name", [entry["name"] for entry in RSLORA])
def test_scales_are_not_applied_twice(both: dict[str, Any], name: str) -> None:
    """The peer's result is too large by the root of the rank; ours is the weighted sum, as for other adapters."""
    wanted, got = both["peer"][name], both["ours"][name]
    for layer, delta in wanted["deltas"].items():
        too_large = np.sqrt(wanted["ranks"][layer])
        np.testing.assert_allclose(
            np.array(got["deltas"][layer]) * too_large, delta, atol=1e-4, rtol=1e-4, err_msg=layer
        )


def test_functions_on_tensors_are_the_peer_s(lab: Lab) -> None:
    answers = lab.ask("merge_utils")
    assert answers["ours"].keys() == answers["peer"].keys()
    for name, wanted in answers["peer"].items():
        np.testing.assert_allclose(answers["ours"][name], wanted, atol=1e-6, rtol=1e-5, err_msg=name)
