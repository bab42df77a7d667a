"""Integer grids as compressed-tensors packs them: what vLLM and transformers load as W4A16 and W8A16."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.integer import GridFormat, grid_named
from bitsmith.passes.choice import Choice
from bitsmith.run.guide import Total
from bitsmith.run.packer import NESTED, Assigned, Matrix, Outcome, Part, names_in_both
from bitsmith.store.compressed_tensors import (
    METHOD,
    PACK_FORMAT,
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    pack_words,
    pack_zeros,
    words,
)

GROUPS = (128, 64, 32)
"""Columns that may share a scale; 0 is a whole row."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linears that vLLM loads as one, by its name for them: all are packed alike, or none."""

_GRIDS = {"W4A16": "int4", "W4A16_ASYM": "int4a", "W8A16": "int8"}


class CompressedTensorsPacker:
    """`pack-quantized` of compressed-tensors, in grids whose scales have the dtype of the source."""

    schemes = tuple(_GRIDS)
    tables = costly = False

    def takes(self, scheme: str) -> bool:
        """Tell whether a scheme is one of `schemes`."""
        return scheme in self.schemes

    def group(self, scheme: str, asked: int | None, shape: tuple[int, ...]) -> int | None:
        """Return `asked` (default 128), or the next smaller of `GROUPS` that divides the columns.

        Raises BitsmithError for another group.
        """
        if asked is None:
            asked = GROUPS[0]
        if asked not in (0, *GROUPS):
            known = ", ".join(map(str, sorted(GROUPS)))
            raise BitsmithError(f"{scheme} has groups of {known} columns, or 0 for whole rows, not {asked}")
        if asked == 0:
            return 0
        return next((group for group in GROUPS if group <= asked and shape[-1] % group == 0), None)

    def parts(self, row: Assigned) -> Sequence[Part]:
        """Return codes, scales, shape and, in asymmetric schemes, zero points."""
        (out, columns), grid = row.shape, _grid(row)
        groups = grid.groups(columns)
        parts = [
            Part(PACKED, "I32", (out, words(columns, grid.bits))),
            Part(SCALE, grid.scale_type, (out, groups)),
            Part(SHAPE, "I64", (2,)),
        ]
        return parts if grid.symmetric else [*parts, Part(ZERO, "I32", (words(out, grid.bits), groups))]

    def encode(self, row: Assigned, matrix: Matrix) -> _Encoding:
        """Return the matrix's parts to be."""
        return _Encoding(row, matrix)

    def config(self, rows: Sequence[Assigned], kept: Sequence[str]) -> Mapping[str, Any]:
        """Return the `quantization_config`: a group per scheme, and every kept linear by name.

        One scheme targets `Linear`; several name their modules, which is what vLLM looks for in fused ones,
        by patterns where loaders have more than one name for them.
        transformers 5.23 loads packed zero points only where it decodes while loading (`dequantize`), and
        then by one scheme. Raises BitsmithError for an asymmetric scheme beside another, and for linears that
        vLLM fuses and that are not packed alike.
        """
        _refuse_torn(rows, kept)
        groups: dict[tuple[str, int], list[str]] = {}
        for row in sorted(rows, key=lambda row: (self.schemes.index(row.scheme), -row.group)):
            groups.setdefault((row.scheme, row.group), []).append(row.module)
        asymmetric = [key for key in groups if not _named_grid(*key).symmetric]
        if asymmetric and len(groups) > 1:
            said = " and ".join(_said(*key) for key in groups)
            raise BitsmithError(
                f"{said} cannot be in one folder: transformers loads zero points of one scheme alone"
            )
        return {
            "quant_method": METHOD,
            "format": PACK_FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": list(map(_target, modules)) if len(groups) > 1 else ["Linear"],
                    "weights": _weights(_named_grid(scheme, group)),
                    "input_activations": None,
                    "output_activations": None,
                }
                for number, ((scheme, group), modules) in enumerate(groups.items())
            },
            "ignore": names_in_both(kept),
            "kv_cache_scheme": None,
            **({"dequantize": True} if asymmetric else {}),
        }


class _Encoding:
    """One matrix: codes go out slice by slice, scales and zero points wait for the file to come to them."""

    def __init__(self, row: Assigned, matrix: Matrix) -> None:
        self._row, self._matrix, self._grid = row, matrix, _grid(row)
        self._waiting = {SHAPE: np.array(row.shape, "<i8").view(np.uint8)}
        self._outcome = Outcome("nearest", 0.0)

    def chunks(self, suffix: str) -> Iterator[Bytes]:
        """Yield a part's bytes; codes are asked for before scales and zero points."""
        if suffix == PACKED:
            yield from self._codes()
        else:
            yield self._waiting.pop(suffix)

    def outcome(self) -> Outcome:
        """Return how codes were found, and their errors."""
        return self._outcome

    def _codes(self) -> Iterator[Bytes]:
        name, grid, guide = self._row.name, self._grid, self._matrix.guide
        choice = Choice("nearest") if guide is None else guide.choice(self._matrix.ref, grid)
        total = Total(None if guide is None else guide.inputs(name))
        scales, zeros = [], []
        for rows in self._matrix.slices():
            coded = grid.quantize(rows) if guide is None else guide.coded(name, grid, rows, choice)
            scales.append(_scale_bytes(coded.scales, grid))
            if coded.zeros is not None:
                zeros.append(coded.zeros)
            total.add(rows, grid.dequantize(coded))
            yield pack_words(coded.codes, grid.bits)
        self._waiting[SCALE] = np.concatenate(scales)
        if zeros:
            self._waiting[ZERO] = pack_zeros(np.concatenate(zeros), grid.bits)
        self._outcome = Outcome(choice.rounder, *total.errors())


def _grid(row: Assigned) -> GridFormat:
    grid = _named_grid(row.scheme, row.group)
    return grid if row.dtype == "F16" else replace(grid, scale_type="BF16")


def _named_grid(scheme: str, group: int) -> GridFormat:
    return grid_named(_GRIDS[scheme] + (f"_g{group}" if group else ""))


def _scale_bytes(scales: Float32, grid: GridFormat) -> Bytes:
    if grid.scale_type == "F16":
        return scales.astype("<f2").reshape(-1).view(np.uint8)
    return (scales.reshape(-1).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def _weights(grid: GridFormat) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group,
        "dynamic": False,
    }


def _target(module: str) -> str:
    """Return a target for a module: its name, or a pattern for what transformers and vLLM call it."""
    return f"re:.*{re.escape('.' + module.removeprefix(NESTED))}$" if module.startswith(NESTED) else module


def _refuse_torn(rows: Sequence[Assigned], kept: Sequence[str]) -> None:
    schemes = {row.module: _said(row.scheme, row.group) for row in rows}
    schemes |= dict.fromkeys(kept, "as stored")
    for module in schemes:
        parent, _, last = module.rpartition(".")
        for whole, parts in FUSED.items():
            found = {f"{parent}.{part}": schemes.get(f"{parent}.{part}") for part in parts}
            if last == parts[0] and len({scheme for scheme in found.values() if scheme is not None}) > 1:
                said = ", ".join(f"{name} {scheme}" for name, scheme in found.items())
                raise BitsmithError(f"vLLM loads {parent}.{whole} as one, which needs one scheme: {said}")


def _said(scheme: str, group: int) -> str:
    return f"{scheme} in groups of {group}" if group else f"{scheme} by rows"
