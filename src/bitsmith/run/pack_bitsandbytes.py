"""NF4 and FP4 with double quantization as bitsandbytes stores them: what transformers loads as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.nf4 import (
    BLOCK_SIZES,
    DYNAMIC_MAP,
    FP4,
    NESTED_BLOCK,
    NF4,
    Codes,
    FourBit,
    Nested,
    nest,
)
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.choice import Choice
from bitsmith.passes.nf4_feedback import choose_four_bit, feedback, feedback_importance
from bitsmith.passes.trial import sample
from bitsmith.run.guide import Total
from bitsmith.run.packer import Assigned, Matrix, Outcome, Part, names_in_both
from bitsmith.store.bitsandbytes import METHOD, STATE, rounded
from bitsmith.store.site_statistics import SiteStatistics

_BOOKS = {book.name: book for book in (NF4, FP4)}
_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
_OFFSET_BYTES = 32  # room for the offset's digits in the JSON, filled up with spaces
_CODES, _SCALES, _STEPS = "weight", "weight.absmax", "weight.nested_absmax"
_BOOK, _MAP = "weight.quant_map", "weight.nested_quant_map"


class BitsandbytesPacker:
    """bitsandbytes' 4-bit weights, scales double-quantized; values have the dtype of the source."""

    schemes = tuple(_BOOKS)
    tables = costly = False

    def takes(self, scheme: str) -> bool:
        """Tell whether a scheme is one of `schemes`."""
        return scheme in self.schemes

    def group(self, scheme: str, asked: int | None, shape: tuple[int, ...]) -> int | None:
        """Return `asked` (default 64): blocks lie over the flattened matrix, so that any size fits.

        Raises BitsmithError for a size that bitsandbytes does not know.
        """
        size = _BOOKS[scheme].block_size if asked is None else asked
        if size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise BitsmithError(f"{scheme} has blocks of {known} weights, not of {size}")
        return size

    def parts(self, row: Assigned) -> Sequence[Part]:
        """Return codes, scales, their scales, both maps and the state."""
        form, weights = _form(row), prod(row.shape)
        blocks = form.blocks(weights)
        return [
            Part(_CODES, "U8", (-(-weights // 2), 1)),
            Part(_SCALES, "U8", (blocks,)),
            Part(_STEPS, "F32", (-(-blocks // NESTED_BLOCK),)),
            Part(_BOOK, "F32", (len(form.book),)),
            Part(_MAP, "F32", (len(DYNAMIC_MAP),)),
            Part(_state_name(row), "U8", (_state(row, np.float32(0)).size,)),
        ]

    def encode(self, row: Assigned, matrix: Matrix) -> _Encoding:
        """Return the matrix's parts to be."""
        return _Encoding(row, matrix)

    def config(self, rows: Sequence[Assigned], kept: Sequence[str]) -> Mapping[str, Any]:
        """Return the `quantization_config` as transformers writes it, kept linears as skipped modules.

        Those of a multimodal checkpoint are named as its text model has them too, and a head that is not
        packed is skipped even where nothing is stored for it. Raises BitsmithError for two schemes.
        """
        schemes = sorted({row.scheme for row in rows})
        if len(schemes) > 1:
            raise BitsmithError(f"a folder holds one of {' and '.join(schemes)}, not both")
        head = [] if any(row.module == "lm_head" for row in rows) else ["lm_head"]
        dtypes = [_dtype(row) for row in rows]
        return {
            "quant_method": METHOD,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": schemes[0].lower(),
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": max(dtypes, key=dtypes.count),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(dict.fromkeys([*names_in_both(kept), *head])),
            "llm_int8_threshold": 6.0,
        }


class _Encoding:
    """One matrix: its scales are found before anything is written, and wait for the file to come to them."""

    def __init__(self, row: Assigned, matrix: Matrix) -> None:
        self._row, self._matrix, self._form = row, matrix, _form(row)
        self._outcome = Outcome("nearest", 0.0)
        self._wanted = {part.suffix for part in BitsandbytesPacker().parts(row)}

    def chunks(self, suffix: str) -> Iterator[Bytes]:
        """Yield a part's bytes; scales are let go with the last."""
        yield from self._part(suffix)
        self._wanted.discard(suffix)
        if not self._wanted:
            del self._nested

    def _part(self, suffix: str) -> Iterator[Bytes]:
        if suffix == _CODES:
            yield from self._codes()
        elif suffix == _SCALES:
            yield self._nested.codes
        elif suffix == _STEPS:
            yield _bytes(self._nested.absmax)
        elif suffix == _BOOK:
            yield _bytes(self._form.levels)
        elif suffix == _MAP:
            yield _bytes(DYNAMIC_MAP)
        else:
            yield _state(self._row, self._nested.offset)

    def outcome(self) -> Outcome:
        """Return how codes were found, and their errors."""
        return self._outcome

    @cached_property
    def _choice(self) -> Choice:
        """How the matrix is rounded; without statistics by the search, unless `nearest` is asked for."""
        matrix, inputs = self._matrix, self._inputs
        if matrix.rounder == "nearest":
            return Choice("nearest")
        if inputs is None or matrix.guide is None:
            return Choice("weighted")
        metric = matrix.guide.metric
        return choose_four_bit(
            self._form,
            sample(matrix.ref),
            inputs,
            matrix.rounder,
            metric_for=lambda *key: metric(inputs, *key),
        )

    @cached_property
    def _inputs(self) -> SiteStatistics | None:
        guide = self._matrix.guide
        return None if guide is None else guide.inputs(self._row.name)

    @property
    def _metric(self) -> InputMetric | None:
        """The metric of error feedback, None without it."""
        choice, guide, inputs = self._choice, self._matrix.guide, self._inputs
        if choice.damping is None or guide is None or inputs is None:
            return None
        return guide.metric(inputs, choice.damping, choice.shrink)

    @property
    def _importance(self) -> Float32 | None:
        metric, inputs = self._metric, self._inputs
        if metric is not None:
            return feedback_importance(self._form, metric)
        return None if inputs is None else inputs.importance

    @cached_property
    def _nested(self) -> Nested:
        """The scales as stored: those of the whole matrix have to be known for any of them."""
        form = self._form
        if self._choice.rounder == "nearest":
            return self._nest([form.absmax(flat) for _, flat in self._flats()])
        importance = self._importance
        nested = self._nest([form.fit(flat, importance, first) for first, flat in self._flats()])
        for first, flat in self._flats():
            form.choose(flat, nested, first // form.block_size, importance, first)
        return nested

    def _nest(self, scales: Sequence[Float32]) -> Nested:
        nested = nest(np.concatenate(scales))
        if not np.isfinite(nested.absmax).all():
            raise BitsmithError(
                "is too large for float32 scales", path=self._matrix.path, tensor=self._row.name
            )
        return nested

    def _flats(self) -> Iterator[tuple[int, Float32]]:
        """Yield the place of the first weight and the weights of slices that cut no block."""
        for at, rows in self._slices():
            yield at * rows.shape[1], rows.reshape(-1)

    def _codes(self) -> Iterator[Bytes]:
        form, metric, total = self._form, self._metric, Total(self._inputs)
        for at, rows in self._slices():
            block = at * rows.shape[1] // form.block_size
            scales = self._nested.scales(block, block + form.blocks(rows.size))
            codes = self._coded(rows, scales, metric)
            decoded = rounded(form.dequantize(codes, scales), _dtype(self._row))  # as loaders read it
            total.add(rows, decoded.reshape(rows.shape))
            yield form.pack(codes)
        self._outcome = Outcome(self._choice.rounder, *total.errors())

    def _coded(self, rows: Float32, scales: Float32, metric: InputMetric | None) -> Codes:
        flat = rows.reshape(-1)
        if metric is not None:
            return feedback(self._form, rows, scales, metric)
        exact = self._choice.rounder == "nearest"  # bitsandbytes rounds under scales that it has yet to round
        return self._form.nearest(flat, self._form.absmax(flat) if exact else scales)

    def _slices(self) -> Iterator[tuple[int, Float32]]:
        """Yield the first row and the rows of slices that cut no block."""
        size, columns = self._form.block_size, self._row.shape[1]
        together = size // gcd(size, columns) if columns else 1
        waiting, at = np.empty((0, columns), np.float32), 0
        for rows in self._matrix.slices():
            waiting = np.concatenate([waiting, rows]) if len(waiting) else rows
            whole = len(waiting) // together * together
            if whole:
                yield at, waiting[:whole]
            at, waiting = at + whole, waiting[whole:]
        if len(waiting):
            yield at, waiting


def _form(row: Assigned) -> FourBit:
    return replace(_BOOKS[row.scheme], block_size=row.group)


def _dtype(row: Assigned) -> str:
    return _DTYPES.get(row.dtype, "float32")


def _state_name(row: Assigned) -> str:
    return f"weight.{STATE}{row.scheme.lower()}"


def _state(row: Assigned, offset: np.float32) -> Bytes:
    """Return the JSON that bitsandbytes keeps beside a weight, as long whatever the offset."""
    state = {
        "quant_type": row.scheme.lower(),
        "blocksize": row.group,
        "dtype": _dtype(row),
        "shape": list(row.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": float(offset),
    }
    spaces = " " * (_OFFSET_BYTES - len(json.dumps(state["nested_offset"])))
    return np.frombuffer((json.dumps(state) + spaces).encode(), np.uint8)


def _bytes(values: Float32) -> Bytes:
    return np.ascontiguousarray(values, "<f4").view(np.uint8)
