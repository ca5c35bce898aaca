"""torchao export: a quantized model's weights as torchao tensors."""

from adaround_ext.export.torchao.export import export_torchao, runners, to_torchao

__all__ = ["export_torchao", "runners", "to_torchao"]
