"""The gates of an artifact as written and read back: every shape, finite values, every layer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bitsmith.run.gate import BYTES_OVER_PLAN, FINITE, SHAPES, Gate, Judged
from bitsmith.run.sahc_layer import Cosine, LayerProbe, lowest
from bitsmith.store.checkpoint import Checkpoint

_BUFFER_BYTES = 1 << 20


def artifact_gates(
    source: Checkpoint, written: Checkpoint, probe: LayerProbe, planned: int | None, cosine: Gate
) -> list[Judged]:
    """Judge a checkpoint that was written of `source`; `planned` bytes of tensors were promised (None: none).

    The layers' cosines are those of all weights of a layer as they are read back; the lowest is judged.
    """
    missing = [
        name for name, ref in source.items() if name not in written or written[name].shape != ref.shape
    ]
    said = f"{len(source) - len(missing)} of {len(source)} tensors have the source's shape"
    judged = [SHAPES.judge(len(missing), evidence=", ".join([said, *missing[:5]]))]
    judged.append(FINITE.judge(_not_finite(written), evidence=f"all values of {len(written)} tensors read"))
    if planned:
        actual = sum(ref.nbytes for ref in written.values())
        judged.append(BYTES_OVER_PLAN.judge(actual / planned, evidence=f"{actual} of {planned} bytes"))
    if missing:
        return [*judged, cosine.judge(None, evidence="tensors are missing")]
    found = _layer_cosines(written, probe)
    least = lowest(found)
    said = f"the lowest of {len(found)} layers: {least.evidence}"
    return [*judged, cosine.judge(least.value, low=least.low, high=least.high, evidence=said)]


def digest(folder: Path) -> str:
    """Return the SHA-256 of the shards and the config of a folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name == "config.json":
            total.update(path.name.encode())
            with path.open("rb") as stream:
                while part := stream.read(_BUFFER_BYTES):
                    total.update(part)
    return total.hexdigest()


def _not_finite(written: Checkpoint) -> int:
    count = 0
    for ref in written.values():
        for start, stop in ref.slices():
            count += int(np.count_nonzero(~np.isfinite(ref.read(start, stop))))
    return count


def _layer_cosines(written: Checkpoint, probe: LayerProbe) -> list[Cosine]:
    found = []
    for layer in range(probe.layers):
        probe.enter(layer)
        changed = {name: written[name].read() for name in probe.names()}
        found.append(probe.layer(changed))
    return found
