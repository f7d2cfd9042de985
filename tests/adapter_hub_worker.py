"""Runs in an environment with the library `adapters`: makes tiny models and adapter folders there, and notes their outputs."""

from __future__ import annotations

import json
import os
import sys

import adapters
import torch
import transformers
from safetensors.torch import save_file


def main(request: dict, folder: str) -> None:
    """Writes, for each case, the base model's weights, the adapter's folder, and outputs without and with the adapter.

    Args:
        request: `bases`: by name the class and the configuration of a model, and `inputs`; `cases`: name of a base and the
            adapter's configuration as keyword arguments of `BnConfig`, or the name of a known one.
        folder: Where to.
    """
    for number, (base, options) in enumerate(request["cases"]):
        described = request["bases"][base]
        torch.manual_seed(0)
        config = getattr(transformers, described["config"])(**described["values"])
        model = getattr(transformers, described["model"])(config).eval()
        place = os.path.join(folder, str(number))
        os.makedirs(place)
        save_file({k: v.clone() for k, v in model.state_dict().items()}, os.path.join(place, "base.safetensors"))
        inputs = {k: torch.tensor(v) for k, v in described["inputs"].items()}
        outputs = {}
        with torch.no_grad():
            outputs["plain"] = model(**inputs)[0].contiguous()
            adapters.init(model)
            model.add_adapter("some", config=options if isinstance(options, str) else adapters.BnConfig(**options))
            model.set_active_adapters("some")
            generator = torch.Generator().manual_seed(7)
            for name, parameter in model.named_parameters():
                if "some" in name.split("."):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            outputs["adapted"] = model(**inputs)[0].contiguous()
        save_file(outputs, os.path.join(place, "outputs.safetensors"))
        # Other adapters hold one norm under two names, which that library cannot write as safetensors.
        safe = isinstance(options, str) and number % 2 == 1
        model.save_adapter(os.path.join(place, "adapter"), "some", use_safetensors=safe)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
