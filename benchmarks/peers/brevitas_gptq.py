"""Brevitas's GPTQ on one Linear: run by quality/peers.py in an environment of its own.

Brevitas chooses its own scales, of least squared weight error for each row; GPTQ's settings are its
defaults but for act_order. Source: brevitas.graph.gptq, and apply_gptq in brevitas_examples.
"""

import sys
import time

import torch
from brevitas.graph.gptq import gptq_mode
from brevitas.nn import QuantLinear
from brevitas.quant import Int8WeightPerChannelFloatMSE


def main(source: str, target: str) -> None:
    layer = torch.load(source)
    torch.set_num_threads(layer["threads"])
    rows, cols = layer["weight"].shape
    begin = time.perf_counter()
    quantized = QuantLinear(
        cols,
        rows,
        bias=True,
        weight_quant=Int8WeightPerChannelFloatMSE,
        weight_bit_width=layer["bits"],
        weight_narrow_range=False,
    )
    quantized.load_state_dict({name: layer[name] for name in ("weight", "bias")}, strict=False)
    model = torch.nn.Sequential(quantized).eval()
    with torch.no_grad():
        model(layer["inputs"][:1])  # its quantizers need a pass before they can be used
        with gptq_mode(model, act_order=True, use_quant_activations=False) as gptq:
            for _ in range(gptq.num_layers):
                for batch in layer["inputs"].split(32):
                    gptq.model(batch)
                gptq.update()
        weight = quantized.quant_weight().value
    torch.save({"weight": weight, "seconds": time.perf_counter() - begin}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
