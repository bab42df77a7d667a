"""What two models make of the same tokens, kept in a folder: moments of layer pairs, and sample states.

A folder holds `paired.json`, written last, `tokens.safetensors` with the token ids, `embed.safetensors` and
`final.safetensors` with the moments of the states behind the embeddings and before the final norms,
`pair.NNN.safetensors` with those of each pair of layers, and `teacher.NNN.safetensors` and
`student.NNN.safetensors` with the sample states that enter each layer (the last: the final norm) and those
between its mixer and its FFN. Tensors of moments are `PLACE.tt`, `PLACE.ss`, `PLACE.ts`, `PLACE.mean_t`,
`PLACE.mean_s`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError, printable
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.safetensors import load_json, open_safetensors
from bitsmith.store.safetensors_writer import TensorData, write_safetensors_file

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Place = Literal["states", "updates", "normed", "mixer", "ffn"]
SideName = Literal["teacher", "student"]

MANIFEST_NAME = "paired.json"
TOKENS_NAME = "tokens.safetensors"
EMBED_NAME = "embed.safetensors"
FINAL_NAME = "final.safetensors"
STATE_PLACES: tuple[Place, ...] = ("states", "updates")
WIDE_PLACES: tuple[Place, ...] = (*STATE_PLACES, "normed")
"""Places whose moments are kept as F64."""
PLACES: tuple[Place, ...] = (*STATE_PLACES, "mixer", "ffn")
SCHEMA = 1

_PARTS = ("tt", "ss", "ts", "mean_t", "mean_s")
_SLICE_BYTES = 16 << 20
_ITEMS = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}


@dataclass(frozen=True)
class CrossMoments:
    """Means over `tokens` tokens of t (`D_t`) in the teacher and s (`D_s`) in the student, about the origin.

    `tt` is E[t tᵀ] (`D_t D_t`), `ss` E[s sᵀ] (`D_s D_s`), `ts` E[t sᵀ] (`D_t D_s`), `mean_t` E[t], `mean_s`
    E[s]. Of places that are too wide `tt` and `ss` are kept as diagonal blocks (`n b b`) or as the diagonal
    alone (`D`).
    """

    tokens: int
    tt: Float64
    ss: Float64
    ts: Float64
    mean_t: Float64
    mean_s: Float64


@dataclass(frozen=True)
class PairedModel:
    """One of the two models: its content, its sizes, and the width of each place in each layer."""

    path: str
    sha256: str
    hidden: int
    layers: int
    mixer: list[int]
    ffn: list[int]


@dataclass(frozen=True)
class PairedManifest:
    """The content of `paired.json`: what was run, and the SHA-256 of each tensor's bytes by file.

    `layer_map[i]` is the teacher's layer that stands beside the student's layer i, `mapped_by` how it was
    chosen (`cka`, `proportional`, `given`). Chunks in `held_chunks` are not in the moments; they are the
    samples.
    """

    bitsmith: str
    family: str
    teacher: PairedModel
    student: PairedModel
    text: str
    text_sha256: str
    tokenizer_sha256: str
    ctx_tokens: int
    chunks: int
    held_chunks: list[int]
    fit_tokens: int
    layer_map: list[int]
    mapped_by: str
    files: dict[str, dict[str, str]]
    kind: str = "paired"
    schema: int = SCHEMA


class Paired:
    """Paired activations, read place by place; what is read is checked against its SHA-256.

    `digest` is the SHA-256 of the manifest, which covers every tensor, but for the places of models and text.
    """

    def __init__(self, path: Path, manifest: PairedManifest, digest: str) -> None:
        self.path, self.manifest, self.digest = path, manifest, digest
        self.layer_map = tuple(manifest.layer_map)
        self.resumed_steps = 0
        self._check_files()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def embedded(self) -> CrossMoments:
        """Return the moments of the states behind the embeddings."""
        return self._moments(EMBED_NAME, "states")

    def final(self) -> CrossMoments:
        """Return the moments of the states before the final norms."""
        return self._moments(FINAL_NAME, "states")

    def normed(self) -> CrossMoments:
        """Return the moments of the states behind the final norms, without their weights: `x / rms(x)`."""
        return self._moments(FINAL_NAME, "normed")

    def states(self, pair: int) -> CrossMoments:
        """Return the moments of the states entering the student's layer `pair` and its teacher's."""
        return self._moments(pair_name(pair), "states")

    def updates(self, pair: int) -> CrossMoments:
        """Return the moments of what the two layers add to their states."""
        return self._moments(pair_name(pair), "updates")

    def mixer(self, pair: int) -> CrossMoments:
        """Return the moments of what enters o_proj or out_proj: the heads' outputs, head by head."""
        return self._moments(pair_name(pair), "mixer")

    def ffn(self, pair: int) -> CrossMoments:
        """Return the moments of what enters down_proj: the neurons' activations."""
        return self._moments(pair_name(pair), "ffn")

    def samples(self, side: SideName, layer: int) -> Float32:
        """Return the held-out states (`chunks T D`) that enter `layer`; the last number: the final norm."""
        return self._read(sample_name(side, layer), "states").astype(np.float32, copy=False)

    def samples_between(self, side: SideName, layer: int) -> Float32:
        """Return the held-out states (`chunks T D`) between the mixer and the FFN's norm of `layer`."""
        return self._read(sample_name(side, layer), "between").astype(np.float32, copy=False)

    def tokens(self) -> tuple[Int64, Int64]:
        """Return the token ids of the chunks in the moments and of the held-out ones (`chunks T` each)."""
        fit, held = (self._read(TOKENS_NAME, name).astype(np.int64, copy=False) for name in ("fit", "held"))
        return fit, held

    def _moments(self, file: str, place: Place) -> CrossMoments:
        parts = {part: self._read(file, f"{place}.{part}").astype(np.float64, copy=False) for part in _PARTS}
        return CrossMoments(self.manifest.fit_tokens, **parts)

    def _read(self, file: str, name: str) -> NDArray[Any]:
        if name not in self.manifest.files.get(file, {}):
            raise BitsmithError("is not kept here", path=self.path / file, tensor=name)
        with open_safetensors(self.path / file) as opened:
            ref = opened[name]
            raw = ref.raw()
        if hashlib.sha256(raw.data).hexdigest() != self.manifest.files[file][name]:
            raise DamagedFileError(
                "is damaged: its SHA-256 is not the manifest's", path=self.path / file, tensor=name
            )
        return raw.view(_ITEMS[ref.dtype]).reshape(ref.shape)

    def _check_files(self) -> None:
        """Refuse files that are missing, and tensors of another type or shape than the manifest calls for."""
        expected = dict(_expected(self.manifest))
        for file in sorted(expected.keys() ^ self.manifest.files.keys()):
            wrong = "is missing" if file in expected else "is not called for"
            raise DamagedFileError(wrong, path=self.path / printable(file))
        for file, tensors in expected.items():
            if not (self.path / file).is_file():
                raise DamagedFileError(f"lacks its file {file}", path=self.path)
            with open_safetensors(self.path / file) as found:
                _check_tensors(found, tensors, self.manifest.files[file], self.path / file)


def open_paired(path: Path) -> Paired:
    """Open a folder of paired activations; headers and shapes are checked here, bytes when they are read.

    Raises BitsmithError for a folder without a manifest, DamagedFileError for a damaged or incomplete one.
    """
    path = Path(path)
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise BitsmithError(f"holds no {MANIFEST_NAME}: no finished run of paired activations", path=path)
    manifest = _parsed(file.read_bytes(), file)
    return Paired(path, manifest, _digest(manifest))


def _digest(manifest: PairedManifest) -> str:
    facts = asdict(manifest)
    for place in (facts["teacher"], facts["student"]):
        del place["path"]
    del facts["text"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def pair_name(pair: int) -> str:
    """Return the file of a pair of layers."""
    return f"pair.{pair:03d}.safetensors"


def sample_name(side: SideName, layer: int) -> str:
    """Return the file of the sample states entering a layer of one model."""
    return f"{side}.{layer:03d}.safetensors"


def write_arrays(path: Path, arrays: Mapping[str, tuple[str, NDArray[Any]]]) -> dict[str, str]:
    """Write arrays by name as F32, F64 or I64, not atomically; return the SHA-256 of each one's bytes."""
    digests = {name: hashlib.sha256() for name in arrays}

    def chunks(name: str, dtype: str, array: NDArray[Any]) -> Iterator[NDArray[Any]]:
        step = max(1, _SLICE_BYTES * len(array) // max(1, array.nbytes))
        for start in range(0, len(array), step):
            part = np.ascontiguousarray(array[start : start + step], dtype=_ITEMS[dtype])
            digests[name].update(part.reshape(-1).view(np.uint8).data)
            yield part

    data = [
        TensorData(name, dtype, array.shape, chunks(name, dtype, array))
        for name, (dtype, array) in arrays.items()
    ]
    write_safetensors_file(path, data)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_paired_manifest(path: Path, manifest: PairedManifest) -> None:
    """Write `paired.json`, not atomically."""
    path.write_text(json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n", "utf-8")


def is_paired_file(name: str) -> bool:
    """Tell whether a file of a folder to overwrite belongs to the run that is replaced."""
    if name in (MANIFEST_NAME, TOKENS_NAME, EMBED_NAME, FINAL_NAME):
        return True
    kind, number, suffix = [*name.split("."), "", ""][:3]
    return kind in ("pair", "teacher", "student") and number.isdecimal() and suffix == "safetensors"


class _Shapes:
    """Which shapes a tensor may have."""

    def __init__(self, allowed: Iterable[tuple[int, ...]], blocks_of: int | None = None) -> None:
        self._allowed, self._blocks_of = set(allowed), blocks_of

    def __call__(self, shape: tuple[int, ...]) -> bool:
        blocked = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == self._blocks_of
        return shape in self._allowed or blocked


def _expected(manifest: PairedManifest) -> Iterator[tuple[str, dict[str, tuple[str, _Shapes]]]]:
    """Yield what each file has to hold: by tensor its type and shapes."""
    chunks, held, ctx = manifest.chunks, len(manifest.held_chunks), manifest.ctx_tokens
    splits = {"fit": chunks - held, "held": held}
    yield TOKENS_NAME, {name: ("I64", _Shapes([(count, ctx)])) for name, count in splits.items()}
    sides: dict[SideName, PairedModel] = {"teacher": manifest.teacher, "student": manifest.student}
    for side, model in sides.items():
        for layer in range(model.layers + 1):
            sampled = ("states", "between") if layer < model.layers else ("states",)
            shape = "F32", _Shapes([(held, ctx, model.hidden)])
            yield sample_name(side, layer), dict.fromkeys(sampled, shape)
    widths = manifest.teacher.hidden, manifest.student.hidden
    yield EMBED_NAME, _place("states", "F64", *widths)
    yield FINAL_NAME, _place("states", "F64", *widths) | _place("normed", "F64", *widths)
    for pair, layer in enumerate(manifest.layer_map):
        tensors = _place("states", "F64", *widths) | _place("updates", "F64", *widths)
        tensors |= _place("mixer", "F32", manifest.teacher.mixer[layer], manifest.student.mixer[pair])
        tensors |= _place("ffn", "F32", manifest.teacher.ffn[layer], manifest.student.ffn[pair])
        yield pair_name(pair), tensors


def _place(place: Place, dtype: str, teacher: int, student: int) -> dict[str, tuple[str, _Shapes]]:
    shapes = {
        "ts": _Shapes([(teacher, student)]),
        "mean_t": _Shapes([(teacher,)]),
        "mean_s": _Shapes([(student,)]),
    }
    for part, width in (("tt", teacher), ("ss", student)):
        whole = [(width, width)]
        shapes[part] = _Shapes(whole) if dtype == "F64" else _Shapes([*whole, (width,)], width)
    return {f"{place}.{part}": (dtype, shape) for part, shape in shapes.items()}


def _check_tensors(
    found: Checkpoint, expected: Mapping[str, tuple[str, _Shapes]], said: Mapping[str, str], path: Path
) -> None:
    for name in sorted(found.keys() ^ expected.keys() | said.keys() ^ expected.keys()):
        raise DamagedFileError(f"does not fit {MANIFEST_NAME}", path=path, tensor=name)
    for name, (dtype, shapes) in expected.items():
        ref = found[name]
        if ref.dtype != dtype or not shapes(ref.shape):
            raise DamagedFileError(
                f"is {ref.dtype} {list(ref.shape)}, which does not fit {MANIFEST_NAME}",
                path=path,
                tensor=name,
            )


def _parsed(raw: bytes, path: Path) -> PairedManifest:
    value = load_json(raw, path, "manifest")
    if value.get("kind") != "paired":
        raise DamagedFileError("is no manifest of paired activations", path=path)
    if value.get("schema") != SCHEMA:
        found = printable(str(value.get("schema")), 40)
        raise UnsupportedError(f"has schema {found}, expected {SCHEMA}", path=path)
    try:
        manifest = TypeAdapter(PairedManifest).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedFileError(f"{printable(where)}: {printable(first['msg'])}", path=path) from error
    for model in (manifest.teacher, manifest.student):
        if not model.layers == len(model.mixer) == len(model.ffn):
            raise DamagedFileError("has not as many widths as layers", path=path)
    sound = all(0 <= layer < manifest.teacher.layers for layer in manifest.layer_map)
    if len(manifest.layer_map) != manifest.student.layers or not sound:
        raise DamagedFileError("layer_map does not fit the models' layers", path=path)
    return manifest
