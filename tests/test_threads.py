"""Threads of pieces in order end with whoever started them, never when garbage is collected."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.numerics.threads import ahead, in_order
from bitsmith.run.execute import compress
from bitsmith.store import TensorData, open_checkpoint, write_safetensors


@pytest.fixture
def started() -> Iterator[set[threading.Thread]]:
    """Give the threads that run before the test."""
    yield set(threading.enumerate())


def fails(piece: int) -> int:
    if piece == 3:
        raise BitsmithError("piece 3")
    return piece


def test_pieces_that_are_read_ahead_end_with_a_failure(started: set[threading.Thread]) -> None:
    pieces = ahead(iter(range(100)), 2)
    with pytest.raises(BitsmithError, match="piece 3"):
        list(in_order(fails, pieces))
    assert pieces.gi_frame is None
    assert set(threading.enumerate()) <= started


def test_a_consumer_that_stops_ends_the_threads(started: set[threading.Thread]) -> None:
    pieces = ahead(iter(range(100)), 2)
    with closing(in_order(lambda piece: piece, pieces, overlaps=True)) as found:
        assert next(found) == 0
        assert set(threading.enumerate()) - started
    assert pieces.gi_frame is None
    assert set(threading.enumerate()) <= started


def test_a_run_that_fails_leaves_no_threads(
    tiny_qwen3: Path, tmp_path: Path, started: set[threading.Thread]
) -> None:
    with open_checkpoint(tiny_qwen3) as checkpoint:
        data = []
        for name, ref in checkpoint.items():
            rows = np.array(ref.read(), np.float32)
            rows.reshape(-1)[-1] = np.nan
            data.append(TensorData(name, "F32", ref.shape, [rows.reshape(1, -1).view(np.uint8)]))
        write_safetensors(tmp_path / "model", data, checkpoint.config)
    with pytest.raises(DamagedFileError) as caught:
        compress(tmp_path / "model", tmp_path / "out.gguf", "Q8_0")
    assert caught.value.tensor is not None
    assert set(threading.enumerate()) <= started
