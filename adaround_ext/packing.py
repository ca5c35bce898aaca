"""Former place of names that are in ``adaround_ext.ops`` now."""

import warnings

from adaround_ext.ops import pack_bits, packed_linear, unpack_bits  # noqa: F401

warnings.warn("adaround_ext.packing is adaround_ext.ops now", DeprecationWarning, stacklevel=2)
