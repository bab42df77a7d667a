"""Storage formats: encode rows of weights to blocks of bytes and back."""

from bitsmith.formats.floats import BF16, F16, F32
from bitsmith.formats.foreign import decoder_named
from bitsmith.formats.format import FORMATS, Format, format_named
from bitsmith.formats.iquant import IQ4_NL, IQ4_XS
from bitsmith.formats.kquant import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from bitsmith.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from bitsmith.formats.microscale import MXFP4, NVFP4
from bitsmith.formats.onebit import Q1_0, Q2_0

__all__ = [
    "BF16", "F16", "F32", "FORMATS", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "Q2_K", "Q3_K",
    "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "Format", "decoder_named", "format_named",
]  # fmt: skip
