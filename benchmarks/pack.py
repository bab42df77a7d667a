"""Throughput and error of NF4 and int4 against bitsandbytes and compressed-tensors, in one run.

    python benchmarks/pack.py [--threads 2] [--repeats 5] [--rows 2048] [--out FILE]

Both sides take turns on the same matrix (Gaussian, 4096 wide) with as many threads; figures are the median
and the range over the repeats, in weights per second, and the squared error over the squared weights.
bitsandbytes packs in C++ with a block's largest magnitude as its scale, compressed-tensors in torch with
2/15 of it; ours takes a scale as plain, and then searches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import numba
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from measuring import OURS, Row, Turns, alternate, arguments, rate_row, report, value_row

from bitsmith.formats.integer import GridFormat
from bitsmith.formats.nf4 import NF4, nest
from bitsmith.store.compressed_tensors import pack_words

N_IN, GROUP = 4096, 128
ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
INT4 = GridFormat(f"int4_g{GROUP}", 4, GROUP, scale_type="BF16")

Rows = np.ndarray
Packed = tuple[object, ...]


def nf4(rows: Rows, search: bool) -> Packed:
    flat = rows.reshape(-1)
    nested = NF4.searched(flat) if search else nest(NF4.absmax(flat))
    return nested, NF4.pack(NF4.nearest(flat, nested.scales()))


def nf4_rows(rows: Rows, packed: Packed) -> Rows:
    scales = packed[0].scales()
    return NF4.dequantize(NF4.nearest(rows.reshape(-1), scales), scales).reshape(rows.shape)


def int4(rows: Rows, search: bool) -> Packed:
    coded = INT4.quantize(rows, search=search)
    return coded, pack_words(coded.codes, 4)


def theirs_int4(weights: torch.Tensor) -> Packed:
    groups = weights.view(len(weights), -1, GROUP)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), ARGS)
    scale = scale.bfloat16().float()
    return pack_to_int32(quantize(weights, scale, zero, ARGS, dtype=torch.int8), 4), scale, zero


def theirs_int4_rows(packed: Packed, shape: torch.Size) -> Rows:
    return dequantize(unpack_from_int32(packed[0], 4, shape), packed[1], packed[2], ARGS).numpy()


def error(rows: Rows, decoded: Rows) -> float:
    return float(np.square(rows - decoded, dtype=np.float64).sum() / np.square(rows, dtype=np.float64).sum())


def compared(
    name: str,
    rows: Rows,
    actions: dict[str, Callable[[], object]],
    decoded: dict[str, Rows],
    repeats: int,
) -> Iterator[Row]:
    """Yield throughput of each of our ways, then its error; the last action is the peer's."""
    turns = alternate(actions, repeats)
    *ours, peer = actions
    for way in ours:
        both = Turns({OURS: turns.rounds[way], peer: turns.rounds[peer]})
        yield rate_row(f"{name}, {way}", both, rows.size, "weights/s")
    for way in ours:
        errors = {OURS: error(rows, decoded[way]), peer: error(rows, decoded[peer])}
        yield value_row(f"{name}, {way}", "relative error", errors)


def main() -> None:
    """Run the comparison and print or write its JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    numba.set_num_threads(min(options.threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(options.threads)
    rows = np.random.default_rng(0).standard_normal((options.rows, N_IN), dtype=np.float32)
    weights = torch.from_numpy(rows)
    four, state = bnb.quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=True)
    ints = theirs_int4(weights)
    results = [
        *compared(
            "NF4, 64 weights, double quantization",
            rows,
            {
                "nearest": lambda: nf4(rows, False),
                "searched": lambda: nf4(rows, True),
                "bitsandbytes": lambda: bnb.quantize_4bit(
                    weights, blocksize=64, quant_type="nf4", compress_statistics=True
                ),
            },
            {
                "nearest": nf4_rows(rows, nf4(rows, False)),
                "searched": nf4_rows(rows, nf4(rows, True)),
                "bitsandbytes": bnb.dequantize_4bit(four, state).numpy(),
            },
            options.repeats,
        ),
        *compared(
            f"int4, groups of {GROUP}, BF16 scales",
            rows,
            {
                "largest": lambda: int4(rows, False),
                "searched": lambda: int4(rows, True),
                "compressed-tensors": lambda: theirs_int4(weights),
            },
            {
                "largest": INT4.dequantize(int4(rows, False)[0]),
                "searched": INT4.dequantize(int4(rows, True)[0]),
                "compressed-tensors": theirs_int4_rows(ints, weights.shape),
            },
            options.repeats,
        ),
    ]
    protocol = {
        "statement": f"A Gaussian matrix of {options.rows} × {N_IN} float32 weights, packed whole, in turns; "
        "ours by the plain scale and by searching it.",
        "threads": options.threads,
        "repeats": options.repeats,
    }
    report("pack", protocol, results, out=options.out)


if __name__ == "__main__":
    main()
