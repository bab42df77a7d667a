"""Undoes what MLX does to Qwen3.5 besides packing: other names, norms plus one, the convolution's axes.

mlx-lm and mlx-vlm store the text model under `language_model.`, the vision tower under `vision_tower.`,
`1 + w` for the norms that act so, and the kernel of `conv1d` as `channels width 1` (Hugging Face:
`channels 1 width`). Loading again, mlx-lm tells by that kernel whether the norms have been shifted
(mlx_lm/models/qwen3_5.py, `sanitize`), and so does this. Norms of MTP layers are found in either convention
behind converted kernels (omlx#1507, #3750).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitsmith.errors import DamagedFileError, UnsupportedError
from bitsmith.store.checkpoint import Bytes, Checkpoint, Rows, TensorRef
from bitsmith.store.packed import PackedTensor

_MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
_LAYER_NORMS = (".input_layernorm.weight", ".post_attention_layernorm.weight")
_ONE_PLUS = (*_LAYER_NORMS, ".q_norm.weight", ".k_norm.weight", "model.norm.weight")
_KERNEL = ".linear_attn.conv1d.weight"
_PATCHES = "patch_embed.proj.weight"
# Means of w told of Qwen3.5 and 3.6 are -0.06 to 0.03 (llama.cpp#23758, mlx-lm#1623, mlx-lm#1735).
_SHIFTED = 0.5
_CLEAR = 0.9  # share of the norms that must speak against a layout before it is refused


class Renamed(TensorRef):
    """A stored tensor under another name."""

    def __init__(self, base: TensorRef, name: str) -> None:
        self.base, self.name = base, name
        self.shape, self.dtype = base.shape, base.dtype

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.base.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` as Hugging Face has them."""
        return self.base.read(start, stop)

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of rows `[start, stop)` as Hugging Face would store them."""
        return self.base.raw(start, stop)


class Moved(Renamed):
    """One whose axis `source`, not the rows', goes back to `target`."""

    def __init__(self, base: TensorRef, name: str, source: int, target: int) -> None:
        super().__init__(base, name)
        axes = list(range(len(base.shape)))
        axes.insert(target, axes.pop(source))
        self._axes = axes
        self.shape = tuple(base.shape[axis] for axis in axes)

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` with their axes in order."""
        return np.ascontiguousarray(self.base.read(start, stop).transpose(self._axes))

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the stored bytes of rows `[start, stop)` with their axes in order."""
        rows = (self.n_rows if stop is None else stop) - start
        shape = (rows, *self.base.shape[1:], self.nbytes // max(1, self.size))
        moved = self.base.raw(start, stop).reshape(shape).transpose(*self._axes, len(self._axes))
        return np.ascontiguousarray(moved).reshape(-1)


class Unshifted(Renamed):
    """A norm less the one that MLX added, in float32."""

    def __init__(self, base: TensorRef, name: str) -> None:
        super().__init__(base, name)
        self.dtype = "F32"

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` less one."""
        return self.base.read(start, stop) - np.float32(1)

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of rows `[start, stop)` as float32."""
        return self.read(start, stop).view(np.uint8)


def hugging_face_layout(stored: Checkpoint, tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Return `tensors` of `stored` under Hugging Face names and in its layout; the same where they are so.

    Reads the layer norms of a Qwen3.5, nothing of other models. Norms lose their 1 in float32.

    Raises UnsupportedError where kernels and norms say different things, and for MTP tensors among shifted
    norms; DamagedFileError for kernels of both layouts and for names that meet.
    """
    if stored.config.get("model_type") not in _MODEL_TYPES:
        return tensors
    kernels = [ref.shape for name, ref in tensors.items() if name.endswith(_KERNEL) and len(ref.shape) == 3]
    ours = [shape for shape in kernels if shape[1] == 1 and shape[2] > 1]
    theirs = [shape for shape in kernels if shape[2] == 1 and shape[1] > 1]
    if ours and theirs:
        raise DamagedFileError("holds conv1d kernels in MLX's layout and others", path=stored.path)
    _refuse_contradiction(stored, tensors, bool(ours), bool(theirs))
    return _restored(stored, tensors) if theirs else tensors


def _refuse_contradiction(
    stored: Checkpoint, tensors: Mapping[str, TensorRef], ours: bool, theirs: bool
) -> None:
    """Refuse norms that are in another layout than the kernels, where nearly all of a model's say so."""
    means = _means(tensors)
    if not len(means):
        return
    shifted, twice = (float(np.mean(means > _SHIFTED + extra)) for extra in (0, 1))
    middle = f"means of the layers' norms have the median {np.median(means):.3f}"
    if ours and shifted >= _CLEAR:
        found = "conv1d is as Hugging Face stores it, but the norms look shifted by one, as MLX stores them"
    elif theirs and shifted < 1 - _CLEAR:
        found = "conv1d is as MLX stores it, but the norms do not look shifted by one"
    elif theirs and twice >= _CLEAR:
        found = "conv1d is as MLX stores it, but the norms look shifted by one twice"
    else:
        return
    raise UnsupportedError(f"{found} ({middle}): give the original", path=stored.path)


def _means(tensors: Mapping[str, TensorRef]) -> Rows:
    norms = [ref for name, ref in tensors.items() if name.endswith(_LAYER_NORMS) and "mtp." not in name]
    return np.array([float(np.mean(ref.read())) for ref in norms if len(ref.shape) == 1 and ref.size])


def _restored(stored: Checkpoint, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    model = "model.language_model." if "text_config" in stored.config else "model."
    prefixes = {
        "language_model.model.": model,
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.visual.",
    }
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        if "mtp." in name:
            raise UnsupportedError(
                "is an MTP tensor in MLX's layout, where nothing tells whether its norms are shifted: "
                "give the original",
                path=stored.path,
                tensor=name,
            )
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed = prefixes.get(prefix, "") + name.removeprefix(prefix)
        if renamed in found:
            raise DamagedFileError(f"is {renamed!r} as another is", path=stored.path, tensor=name)
        found[renamed] = _changed(ref, renamed)
    return found


def _changed(ref: TensorRef, name: str) -> TensorRef:
    """Return a tensor as Hugging Face has it: what was moved is moved back, what was shifted loses its 1."""
    if name.endswith(_KERNEL) and len(ref.shape) == 3:
        return Moved(ref, name, 2, 1)
    if name.endswith(_PATCHES) and len(ref.shape) == 5 and ref.shape[2] == ref.shape[3] != ref.shape[4]:
        return Moved(ref, name, 4, 1)
    if name.endswith(_ONE_PLUS) and len(ref.shape) == 1:
        return Unshifted(ref, name)
    if isinstance(ref, PackedTensor):
        return PackedTensor(name, ref.shape, ref.dtype, ref.parts, ref.read)
    return Renamed(ref, name)
