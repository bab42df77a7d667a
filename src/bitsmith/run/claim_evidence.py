"""What claims are judged by: each piece is made at most once, kept in a journal, and shared by the claims."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter

from bitsmith import __version__
from bitsmith.archs import claim, import_view
from bitsmith.errors import BitsmithError
from bitsmith.numerics.tensor_train import balanced_modes, matrix_shape, sweep
from bitsmith.passes.transform import model_of
from bitsmith.progress import Progress
from bitsmith.run.assay import assay
from bitsmith.run.assay_result import Assay
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import Measure, Protocol, Reference, text_chunks
from bitsmith.run.execute import compress
from bitsmith.run.format_rows import FormatsStudy
from bitsmith.run.sbgq import SBGQ_TRANSFORMS, sbgq_types
from bitsmith.run.seed_claims import LackingError
from bitsmith.run.spi_rows import SpiStudy
from bitsmith.run.studied_formats import STUDIED
from bitsmith.run.study_formats import study_formats
from bitsmith.run.study_spi import study_spi
from bitsmith.run.tiers import TierRow, measure_tiers
from bitsmith.run.transforms import asked_for
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import remove
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.journal import Journal, content_key
from bitsmith.store.statistics import open_statistics

FOLDER = "evidence"
BITS = {4: "IQ4_XS", 3: "Q3_K", 2: "Q2_K"}
"""The base type of the SBGQ recipe at each width; its table's other types stay."""
ROW_INT4 = "int4-all"
BELOW_INT4 = ("Q3_K", "Q2_K")
FORMATS = ("int2", "1-bit")
RANDOM_SEEDS = (0, 1)

_PLAIN = "drop-mtp,untie"  # what both sides of a comparison need to hold the same tensors
_STEPS = 16
_STATISTICS = "statistics"


@dataclass(frozen=True)
class Setting:
    """What a study was given: a model, texts, statistics and how to cut the text."""

    model: Path
    text: Path | None
    calibration: Path | None
    statistics: Path | None
    ctx_tokens: int
    chunks: int
    seed: int


@dataclass(frozen=True)
class TrainPoint:
    """A Tensor-Train of one matrix: parameters of the matrix over its own, and the mean row cosine."""

    name: str
    parameters: int
    ranks: tuple[int, ...]
    ratio: float
    cosine: float


@dataclass(frozen=True)
class ArtifactRow:
    """An artifact as written and measured; lists have an entry per chunk, NLL is the artifact's own."""

    name: str
    file_bytes: int
    bpw: float
    measures: Mapping[str, Measure]
    chunk_kld_nats: tuple[float, ...]
    chunk_nll_nats: tuple[float, ...]


class Evidence:
    """The pieces, each made on first use; a context manager that holds the journal and the model.

    What a killed run had finished is taken from the journal in `out`. Raises LackingError for a piece whose
    text or statistics were not given, and BitsmithError where a piece cannot be made of this model.
    """

    def __init__(self, setting: Setting, out: Path, journal: str, progress: Progress) -> None:
        self.setting, self.progress = setting, progress
        self.folder = out / FOLDER
        self._stack = ExitStack()
        self._refused: dict[str, BitsmithError] = {}
        try:
            self.checkpoint: Checkpoint = self._stack.enter_context(open_checkpoint(setting.model))
            self.key = content_key(self.checkpoint, _facts(setting, self.checkpoint))
            self.journal = self._stack.enter_context(Journal(out / journal, self.key))
            self.folder.mkdir(exist_ok=True)
        except BaseException:
            self._stack.close()
            raise
        self.resumed = len(self.journal.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, BitsmithError):
            remove(self._work)
        self._stack.close()

    @property
    def _work(self) -> Path:
        return self.folder / "work"

    @cached_property
    def reference(self) -> Reference:
        """The original's forward over the text."""
        s = self.setting
        reference = Reference(s.model, self.text, s.ctx_tokens, s.chunks, s.seed, self.progress)
        return self._stack.enter_context(reference)

    @property
    def text(self) -> Path:
        """The text to measure on."""
        if self.setting.text is None:
            raise LackingError("no text was given")
        return self.setting.text

    @cached_property
    def statistics(self) -> Path:
        """The statistics that were given, or those of the calibration text, collected now."""
        if self.setting.statistics is not None:
            return self.setting.statistics
        if self.setting.calibration is None:
            raise LackingError("neither statistics of activations nor a calibration text were given")
        path, text = self.folder / _STATISTICS, self.setting.calibration
        self._once(
            _STATISTICS,
            str,
            lambda: (
                calibrate(self.setting.model, text, path, overwrite=True, progress=self.progress).text_sha256
            ),
        )
        return path

    @property
    def has_statistics(self) -> bool:
        """Whether statistics were given or can be collected."""
        return self.setting.statistics is not None or self.setting.calibration is not None

    @property
    def protocol(self) -> Protocol:
        """How the text is cut and scored."""
        return self.reference.protocol

    @cached_property
    def assay(self) -> Assay:
        """Every matrix's spectrum and codings, without the bootstrap of power laws."""

        def make() -> Assay:
            out = self.folder / "assay"
            return assay(
                self.setting.model,
                out,
                resamples=0,
                seed=self.setting.seed,
                overwrite=True,
                progress=self.progress,
            )

        found: Assay = self._once("assay", Assay, make)
        return found

    @cached_property
    def trains(self) -> tuple[TrainPoint, ...]:
        """A finer sweep of Tensor-Trains than the write-up's, over embedding and head."""
        names = [matrix.name for matrix in self.assay.matrices if matrix.tensor_train is not None]
        if not names:
            raise LackingError("the model has no embedding or head to sweep")
        found: tuple[TrainPoint, ...] = self._once(
            "trains", tuple[TrainPoint, ...], lambda: tuple(p for name in names for p in self._swept(name))
        )
        return found

    def _swept(self, name: str) -> list[TrainPoint]:
        ref = self.checkpoint.get(name) or import_view(self.checkpoint)[name]
        sizes = balanced_modes(*matrix_shape(ref)).sizes
        ranks = [
            (1, max(1, sizes[0] * step // _STEPS), max(1, sizes[2] * step // _STEPS), 1)
            for step in range(1, _STEPS + 1)
        ]
        return [
            TrainPoint(name, prod(ref.shape), one.ranks, one.ratio, one.mean_row_cosine)
            for one in sweep(ref, ranks)
            if one.mean_row_cosine is not None
        ]

    @cached_property
    def spi(self) -> SpiStudy:
        """The SPI recipe in every reading, with a few random choices."""
        s, text = self.setting, self.text
        found: SpiStudy = self._once(
            "spi",
            SpiStudy,
            lambda: study_spi(
                s.model,
                text,
                self.folder / "spi",
                random_seeds=RANDOM_SEEDS,
                ctx_tokens=s.ctx_tokens,
                chunks=s.chunks,
                seed=s.seed,
                overwrite=True,
                progress=self.progress,
            ),
        )
        return found

    @cached_property
    def formats(self) -> FormatsStudy:
        """How cellm's int2 and 1-bit files write."""
        s, text = self.setting, self.text
        found: FormatsStudy = self._once(
            "formats",
            FormatsStudy,
            lambda: study_formats(
                s.model,
                text,
                self.folder / "formats",
                formats=FORMATS,
                ctx_tokens=s.ctx_tokens,
                chunks=s.chunks,
                seed=s.seed,
                overwrite=True,
                progress=self.progress,
            ),
        )
        return found

    @cached_property
    def tiers(self) -> tuple[TierRow, ...]:
        """The split of residual states, its bases found on the calibration text, else on half the chunks."""
        found: tuple[TierRow, ...] = self._once("tiers", tuple[TierRow, ...], self._split)
        return found

    def _split(self) -> tuple[TierRow, ...]:
        s, model = self.setting, self.reference.model
        held, protocol = text_chunks(model, self.text, s.ctx_tokens, s.chunks)
        if s.calibration is not None:
            fit, _ = text_chunks(model, s.calibration, s.ctx_tokens, s.chunks)
        elif protocol.chunks < 2:
            raise LackingError("one chunk without a calibration text leaves nothing to find bases on")
        else:
            fit, held = held[::2], held[1::2]
        return measure_tiers(model, fit, held, self.progress)

    def row_int4(self) -> ArtifactRow:
        """Return int4 with a scale per row of every matrix of the text model, as the write-up ended with."""
        form = STUDIED[ROW_INT4]
        return self._artifact(
            ROW_INT4,
            form.suffix,
            lambda out: form.make(self.setting.model, out, None, self.progress),
        )

    def below_int4(self, type_name: str) -> ArtifactRow:
        """Return every matrix in a smaller type, by error feedback where there are statistics."""
        statistics = self.statistics if self.has_statistics else None
        return self._artifact(
            f"pure-{type_name}",
            ".gguf",
            lambda out: compress(
                self.setting.model,
                out,
                type_name,
                pure=True,
                statistics=statistics,
                overwrite=True,
                progress=self.progress,
            ),
        )

    def sbgq(self, bits: int, *, transforms: bool) -> ArtifactRow:
        """Return the SBGQ recipe at a width with importance rounding, with its transforms or without."""
        statistics = self.statistics
        rules = sbgq_types(model_of(self.checkpoint))
        names = SBGQ_TRANSFORMS if transforms else _PLAIN
        return self._artifact(
            f"sbgq-{bits}-{'transforms' if transforms else 'plain'}",
            ".gguf",
            lambda out: compress(
                self.setting.model,
                out,
                BITS[bits],
                pure=True,
                tensor_types=rules,
                statistics=statistics,
                rounder="weighted",
                transforms=asked_for(names),
                overwrite=True,
                progress=self.progress,
            ),
        )

    def _artifact(self, name: str, suffix: str, make: Callable[[Path], Any]) -> ArtifactRow:
        _ = self.text  # said before an artifact is written

        def measured() -> ArtifactRow:
            self._work.mkdir(exist_ok=True)  # what a killed run left of this artifact is gone on with
            path = self._work / f"{name}{suffix}"
            make(path)
            found, scores = self.reference.measure(path)
            remove(self._work)
            return ArtifactRow(
                name,
                found.candidate.file_bytes,
                found.candidate.bpw,
                found.measures,
                tuple(scores.kld.mean(axis=1).tolist()),
                tuple(scores.nll_cand.mean(axis=1).tolist()),
            )

        row: ArtifactRow = self._once(name, ArtifactRow, measured)
        return row

    def _once(self, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        """Return a piece from the journal, or make it now; what was refused is refused again at once."""
        if name in self._refused:
            raise self._refused[name]
        if name not in self.journal.entries:
            try:
                made = make()
            except BitsmithError as error:
                self._refused[name] = error
                raise
            self.journal.add(name, TypeAdapter(kind).dump_python(made, mode="json"))
        return TypeAdapter(kind).validate_python(self.journal.entries[name])


def _facts(setting: Setting, checkpoint: Checkpoint) -> list[Any]:
    """Return what the pieces depend on beside the model."""
    digest = None
    if setting.statistics is not None:
        digest = open_statistics(setting.statistics, [spec for spec, _ in claim(checkpoint)]).digest
    texts = [sha256_of(path) for path in (setting.text, setting.calibration)]
    options = {**asdict(setting), "model": None, "text": None, "calibration": None, "statistics": None}
    return [__version__, *texts, digest, options]


def sha256_of(path: Path | None) -> str | None:
    """Return a file's SHA-256, None for none. Raises BitsmithError if it cannot be read."""
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
