"""AIMET's AdaRound on one Linear: run by quality/peers.py in an environment of its own.

AIMET chooses its own scales ("tf_enhanced", by signal over quantization noise, for each row); all
but the number of steps are its defaults (which would be 15,000). It leaves soft weights and their
encodings, which its users round to nearest; so does this.
Source: aimet_torch.adaround.adaround_weight.
"""

import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.common.defs import QuantScheme


def main(source: str, target: str) -> None:
    layer = torch.load(source)
    torch.set_num_threads(layer["threads"])
    package = find_spec("aimet_torch")
    assert package is not None and package.origin is not None
    config = Path(package.origin).parent / "common/quantsim_config/default_config_per_channel.json"
    begin = time.perf_counter()
    linear = torch.nn.Linear(*reversed(layer["weight"].shape))
    linear.load_state_dict({name: layer[name] for name in ("weight", "bias")})
    batches = list(layer["inputs"].split(32))
    parameters = AdaroundParameters(
        batches,
        num_batches=len(batches),
        default_num_iterations=layer["steps"],
        forward_fn=lambda model, inputs: model(inputs),
    )
    with tempfile.TemporaryDirectory() as folder:
        rounded = Adaround.apply_adaround(
            torch.nn.Sequential(linear).eval(),
            batches[0],
            parameters,
            path=folder,
            filename_prefix="layer",
            default_param_bw=layer["bits"],
            default_quant_scheme=QuantScheme.post_training_tf_enhanced,
            default_config_file=str(config),
        )
        encodings = json.loads((Path(folder) / "layer.encodings").read_text())
    rows = encodings["param_encodings"]["0.weight"]
    scale, low, high = (
        torch.tensor([row[name] for row in rows], dtype=torch.float64).unsqueeze(1)
        for name in ("scale", "min", "max")
    )
    codes = (rounded[0].weight.detach().double() / scale).round()
    weight = (scale * codes.clamp((low / scale).round(), (high / scale).round())).float()
    torch.save({"weight": weight, "seconds": time.perf_counter() - begin}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
