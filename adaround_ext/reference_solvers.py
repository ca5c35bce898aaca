"""Former place of names that are in ``adaround_ext.reference`` now."""

import warnings

from adaround_ext.reference import gptq, tabu_search_  # noqa: F401

warnings.warn(
    "adaround_ext.reference_solvers is adaround_ext.reference now", DeprecationWarning, stacklevel=2
)
