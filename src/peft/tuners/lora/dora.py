"""DoRA: a weight's magnitude and direction, adapted apart (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ...core.kinds import has_plain_weight
from ...core.layer import HALF, AdapterLayer
from ...kernels.magnitude import Magnitude, magnitude_linear
from ...kernels.reweighted import may_reweight, reweighted_linear
from .variants import Plain

if TYPE_CHECKING:
    from ...core.mixed import Groups
    from .layer import LoraLayer

SLOT = "lora_magnitude_vector"

_Known = WeakKeyDictionary[Any, dict[tuple[str, ...], tuple[Any, torch.Tensor]]]
_known: _Known | None = None


class DoraCaching:
    """Within this context DoRA's norms ‖W + s B A‖ are worked out once for each layer and adapter, and kept until it ends.

    They cost more than all the rest of a step of decoding, and stay the same while no weight changes. Changes are noticed and lead to new
    norms, except for those made in place through ``tensor.data``, which torch does not count. Layers in training mode, compiled code and
    DoRA on top of other adapters work them out each time, as everywhere outside.

        model.eval()
        with DoraCaching():
            model.generate(**inputs)

    Args:
        enabled: ``False``: work them out each time, also inside another such context.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[_Known | None] = []

    def __enter__(self) -> DoraCaching:
        global _known
        self._before.append(_known)
        _known = WeakKeyDictionary() if self.enabled else None
        return self

    def __exit__(self, *_: object) -> None:
        global _known
        _known = self._before.pop()

    def __call__(self, enabled: bool = True) -> DoraCaching:
        """Another context with another switch."""
        return DoraCaching(enabled)


class Dora(Plain):
    """DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): ``W' = m V / ‖V‖`` with ``V = W + s B A``.

    ‖V‖ holds the norm of each row of V as a matrix (out_features, …): the paper writes weights the other way round and takes
    columns. ``m``, one value for each output feature, starts as the norm of W, so that W' = W. The norm counts as a constant in
    the backward pass (section 4.3, eq. 11): the gradients are those of ``y = c ⊙ V x`` with ``c = m / ‖V‖``, the base layer's
    product is computed once, and nothing of the weight's size is kept.
    """

    needs_weight = True

    def shapes(self, layer: LoraLayer) -> dict[str, tuple[int, ...]]:
        channels = layer.kind.channels(layer.get_base_layer(), torch.empty(layer.out_features, device="meta"))
        return {SLOT: (*(() if layer.kind.features_last else (1,)), *channels.shape)}  # files have it as the output is

    def check(self, layer: LoraLayer, config: Any) -> None:
        base = layer.get_base_layer()
        if not has_plain_weight(base):
            raise ValueError(
                f"DoRA takes the norm of the layer's weight, but that of this {type(base).__name__} is no plain float matrix "
                "(quantised?). Set use_dora=False, or dequantise the model first"
            )
        if layer.why_no_merge is not None:
            raise ValueError(
                "DoRA scales the rows of the weight with LoRA's change in it, and there is no such weight on a grouped convolution, "
                "where A reads all channels. Set use_dora=False there, or leave it out with `exclude_modules`"
            )

    def start(self, layer: LoraLayer, tensors: dict[str, torch.Tensor], change: torch.Tensor | None) -> None:
        magnitude = tensors[SLOT]
        magnitude.copy_(row_norms(layer.matrix(()), change).view(magnitude.shape))

    def delta(self, layer: LoraLayer, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        assert weight is not None
        change = layer.change(name)
        return self.scale(layer, name, row_norms(weight, change))[:, None] * (weight + change) - weight

    def after(
        self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str]
    ) -> torch.Tensor:
        base, kind = layer.get_base_layer(), layer.kind
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            names = () if earlier else (name,)
            norms = _remembered(layer, names, lambda: row_norms(layer.matrix(earlier), layer.change(name)))
        scale = self.scale(layer, name, norms)
        # The bias is no part of W: y holds it, so it is scaled along and what that changes is put back.
        bias = layer.offset(earlier)
        y = layer.add_change(name, x, y)
        if bias is None:
            return y * kind.channels(base, scale)
        return torch.addcmul(kind.channels(base, bias * (1 - scale)), y, kind.channels(base, scale))

    def whole(
        self, layer: LoraLayer, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if _is_remembering(layer) and x.numel() <= weight.shape[1] ** 2 and not torch.is_grad_enabled():
            return None  # few tokens: what is left costs less than building the weight
        a, b, scale = layer.scaled_factors(name)
        magnitude = layer.lora_magnitude_vector[name].weight.flatten()
        dropped, rate = layer.dropout_of(name, x)
        # The kernels divide by the magnitudes, and looking for zeros among them is free on the CPU alone.
        if dropped is not x or x.device.type != "cpu" or not bool(magnitude.detach().all()):
            return None
        if rate == 0 and may_reweight(x, weight, (a, b, magnitude), few=True):
            return reweighted_linear(Magnitude(scale), x, weight, bias, (a, b, magnitude), layer.memo)
        if a.dtype in HALF or not layer.fits(x, weight, a, b, magnitude):
            return None
        return magnitude_linear(x, weight, bias, a, b, magnitude, scale, rate, layer.memo)

    def scale_groups(self, layer: LoraLayer, groups: Groups, names: set[str], y: torch.Tensor) -> torch.Tensor:
        """The output of a mixed batch, scaled in the rows of these adapters.

        Args:
            layer: The layer.
            groups: Which rows belong to which adapter.
            names: The adapters with magnitudes.
            y: The output with all low-rank changes added, (rows, …, out_features).
        """

        def scales() -> torch.Tensor:
            # ‖W + B A‖² = ‖W‖² + 2 W · B A + ‖B A‖², row by row, without a matrix of the weight's size for each adapter.
            weight, factors = layer.matrix(()), layer.stacked(groups)
            assert factors is not None
            inner, outer = factors
            weight = weight.to(inner.dtype)
            cross = ((inner.flatten(0, 1) @ weight.t()).view(*inner.shape[:2], -1) * outer.mT).sum(1)
            square = ((outer @ (inner @ inner.mT)) * outer).sum(2)
            norms = (torch.linalg.vector_norm(weight, dim=1) ** 2 + 2 * cross + square).clamp_min(0).sqrt()
            mine = [number for number, name in enumerate(groups.names) if name in names]
            magnitudes = torch.stack([layer.lora_magnitude_vector[groups.names[n]].weight.flatten() for n in mine])
            return torch.ones_like(norms).index_copy_(
                0, norms.new_tensor(mine, dtype=torch.long), magnitudes / norms[mine]
            )

        kept = groups.once((layer, "scale"), lambda: _remembered(layer, groups.names, scales))
        scale = groups.of_rows(kept, y.dim())
        bias = layer.offset(())
        return y * scale if bias is None else torch.addcmul(bias * (1 - scale), y, scale)

    def scale(self, layer: LoraLayer, name: str, norms: torch.Tensor) -> torch.Tensor:
        """m / ‖V‖, shape (out_features,); where a row of V is zero, as that of a padding token, it stays zero."""
        magnitude = layer.lora_magnitude_vector[name].weight.flatten()
        return magnitude / _nonzero(norms).to(magnitude.dtype)


def _is_remembering(layer: LoraLayer) -> bool:
    return (
        _known is not None
        and not layer.training
        and not torch.compiler.is_compiling()
        and not isinstance(layer.base_layer, AdapterLayer)
    )


def _remembered(layer: LoraLayer, names: tuple[str, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What is made of a layer's weight and these adapters' parameters, made anew where it may differ; without a name always."""
    if _known is None or not names or not _is_remembering(layer):
        return make()
    here = [name for name in names if layer.has_adapter(name)]
    tensors = [layer.get_base_layer().weight, *(factor for name in here for factor in layer.own_factors(name))]
    tensors += [layer.lora_magnitude_vector[name].weight for name in here if layer.use_dora[name]]
    scales = [layer.scaling[name] for name in here]
    tensors += [scale for scale in scales if isinstance(scale, torch.Tensor)]
    state = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    key = [*state, *(scale for scale in scales if not isinstance(scale, torch.Tensor))]
    kept = _known.setdefault(layer, {})
    if names not in kept or kept[names][0] != key:
        kept[names] = key, make()
    return kept[names][1]


def _nonzero(norms: torch.Tensor) -> torch.Tensor:
    return norms.masked_fill(norms == 0, 1.0)


def row_norms(weight: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    """Norm of each row of ``weight + change``, in at least float32, as a constant.

    Args:
        weight: (rows, columns).
        change: The same shape, or ``None`` for zero.

    Returns:
        (rows,)
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        total = weight.to(wide) if change is None else change.to(weight.device, wide) + weight
        return torch.linalg.vector_norm(
            total.contiguous(), dim=1
        )  # in one layout, so that equal weights have equal norms


DORA = Dora()
