"""A reference's hidden states on a text, in a file: one forward for all candidates."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.progress import Progress, silent
from bitsmith.run.evaluate import Reference
from bitsmith.run.evaluation import Protocol

STATES_NAME = "states.npy"


class KnownReference(Reference):
    """A `Reference` that reads its final hidden states (`scored_tokens hidden`, float32) from a file.

    Raises DamagedFileError, when they are first needed, for states of another number of positions.
    """

    def __init__(self, path: Path, text: Path, states: Path, **options: Any) -> None:
        super().__init__(path, text, **options)
        self._file = states

    @cached_property
    def _states(self) -> NDArray[np.float32]:
        try:
            found: NDArray[np.float32] = np.load(self._file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BitsmithError(f"cannot be read: {error}", path=self._file) from error
        rows, hidden = self.protocol.scored_tokens, self.model.head.shape[-1]
        if found.shape != (rows, hidden) or found.dtype != np.float32:
            raise DamagedFileError(
                f"holds {found.dtype} {found.shape}, expected float32 ({rows}, {hidden})", path=self._file
            )
        return found


def write_states(
    model: Path,
    text: Path,
    out: Path,
    *,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    progress: Progress = silent,
) -> Protocol:
    """Run a text through `model` and write the states that its logits are made of to the file `out`.

    Raises as `Reference` does.
    """
    with Reference(model, text, ctx_tokens, chunks, progress=progress) as reference:
        np.save(out, reference._states, allow_pickle=False)
        return reference.protocol
