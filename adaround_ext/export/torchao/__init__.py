"""torchao export: a quantized model's weights as torchao tensors."""

from adaround_ext.export.torchao.export import export_torchao, to_torchao
from adaround_ext.export.torchao.runner import runners

__all__ = ["export_torchao", "runners", "to_torchao"]
