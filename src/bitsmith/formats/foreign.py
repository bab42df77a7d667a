"""Types that bitsmith reads but does not write, through the `gguf` package's decoders."""

from __future__ import annotations

from functools import cache

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.formats.format import FORMATS, Bytes, Float32, Format


class ForeignFormat(Format):
    """A ggml type of which only decoding is known here; it is not registered."""

    def __init__(self, kind: GGMLQuantizationType) -> None:
        self.name = kind.name  # type: ignore[misc]
        self.ggml_type = int(kind)  # type: ignore[misc]
        self.block_size, self.block_bytes = GGML_QUANT_SIZES[kind]  # type: ignore[misc]

    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes:
        raise UnsupportedError(f"{self.name} can be read but not written; written types: {' '.join(FORMATS)}")

    def _decode(self, blocks: Bytes, out: Float32) -> None:
        try:
            out[:] = dequantize(blocks, GGMLQuantizationType(self.ggml_type))
        except NotImplementedError:
            raise UnsupportedError(f"{self.name} cannot be decoded by the gguf package") from None


@cache
def decoder_named(name: str) -> Format:
    """Return a format that decodes ggml type `name` (any case), whether bitsmith writes it or not.

    Raises BitsmithError for a name that ggml does not have.
    """
    if name.upper() in FORMATS:
        return FORMATS[name.upper()]
    kind = GGMLQuantizationType.__members__.get(name.upper())
    if kind is None:
        raise BitsmithError(
            f"unknown type {name!r}; ggml knows: {' '.join(GGMLQuantizationType.__members__)}"
        )
    return ForeignFormat(kind)
