"""Numbers of layers and models, as text, JSON, page and picture."""

from adaround_ext.report.layer import LayerReport  # in pickled results

__all__ = ["LayerReport"]
