"""Former place of names that are in ``adaround_ext`` now."""

import warnings

from adaround_ext.ops.library import build_info, use_instruction_set  # noqa: F401

warnings.warn("adaround_ext.native is adaround_ext now", DeprecationWarning, stacklevel=2)
