"""What claims are judged by: each piece is made at most once, kept in a journal, and shared by the claims."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter

from bitsmith.archs import TensorSpec, claim, import_view
from bitsmith.errors import BitsmithError
from bitsmith.numerics.tensor_train import RowSource
from bitsmith.passes.transform import model_of
from bitsmith.progress import Progress
from bitsmith.run.assay import assay
from bitsmith.run.assay_result import Assay, MatrixAssay, Rival
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import Reference, open_model, text_chunks, tokenizer_keys
from bitsmith.run.evaluation import Measure, Protocol
from bitsmith.run.execute import compress
from bitsmith.run.format_rows import FormatsStudy
from bitsmith.run.sbgq import SBGQ_TRANSFORMS, sbgq_types
from bitsmith.run.seed_claims import LackingError
from bitsmith.run.spi_rows import SpiStudy
from bitsmith.run.studied_formats import STUDIED
from bitsmith.run.study_formats import study_formats
from bitsmith.run.study_spi import study_spi
from bitsmith.run.tiers import TierRow, measure_tiers
from bitsmith.run.train_search import TrainPoint, search_trains
from bitsmith.run.transforms import asked_for
from bitsmith.run.whole_factors import WholeFactors, whole_factors
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import remove
from bitsmith.store.checkpoint import Checkpoint, ComputedTensor
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
_STATISTICS = "statistics"
CALIBRATION_CHUNKS = 200
"""Of the calibration text at most, where statistics are collected on it."""


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
    text or statistics were not given, and BitsmithError where a piece cannot be made of this model;
    OutputError as `Journal` does.
    """

    def __init__(
        self, setting: Setting, out: Path, journal: str, progress: Progress, *, overwrite: bool = False
    ) -> None:
        self.setting, self.progress = setting, progress
        self.folder = out / FOLDER
        self._stack = ExitStack()
        self._refused: dict[str, BitsmithError] = {}
        try:
            self.checkpoint: Checkpoint = self._stack.enter_context(open_checkpoint(setting.model))
            self.key = content_key(self.checkpoint, _facts(setting, self.checkpoint))
            kept = Journal(out / journal, self.key, overwrite=overwrite)
            self.journal = self._stack.enter_context(kept)
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
                calibrate(
                    self.setting.model,
                    text,
                    path,
                    chunks=CALIBRATION_CHUNKS,
                    overwrite=True,
                    progress=self.progress,
                ).text_sha256
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
        """Where Tensor-Trains of embedding and head pass the gate."""
        matrices = [matrix for matrix in self.assay.matrices if matrix.tensor_train is not None]
        if not matrices:
            raise LackingError("the model has no embedding or head to sweep")

        def make() -> tuple[TrainPoint, ...]:
            points: list[TrainPoint] = []
            for done, one in enumerate(matrices):
                self.progress("trains", done, len(matrices))
                points += search_trains(one.name, self._folded(one.name), 16 / row_int4(one).bpw)
            self.progress("trains", len(matrices), len(matrices))
            return tuple(points)

        found: tuple[TrainPoint, ...] = self._once("trains", tuple[TrainPoint, ...], make)
        return found

    @cached_property
    def whole_factors(self) -> tuple[WholeFactors, ...]:
        """The FFN's matrices at the write-up's rank, 4-bit factors with one scale each."""

        def make() -> tuple[WholeFactors, ...]:
            names = [one.name for one in self.assay.matrices if one.component == "C1"]
            found = []
            for done, name in enumerate(names):
                self.progress("factors", done, len(names))
                found.append(whole_factors(name, self._folded(name)))
            self.progress("factors", len(names), len(names))
            return tuple(one for one in found if one is not None)

        rows: tuple[WholeFactors, ...] = self._once("factors", tuple[WholeFactors, ...], make)
        return rows

    def _folded(self, name: str) -> RowSource:
        """Return a matrix that the assay found, by its name."""
        ref = self.checkpoint.get(name) or import_view(self.checkpoint)[name]
        rows, columns = ref.shape[0], ref.size // ref.shape[0]
        return ComputedTensor(
            name,
            (rows, columns),
            ref.dtype,
            lambda start, stop: np.asarray(ref.read(start, stop)).reshape(-1, columns),
        )

    @property
    def _options(self) -> dict[str, Any]:
        """What every study within this one is given."""
        s = self.setting
        window = {"ctx_tokens": s.ctx_tokens, "chunks": s.chunks, "seed": s.seed}
        return {**window, "overwrite": True, "progress": self.progress}

    @cached_property
    def spi(self) -> SpiStudy:
        """The SPI recipe in every reading, with a few random choices."""
        model, text = self.setting.model, self.text
        found: SpiStudy = self._once(
            "spi",
            SpiStudy,
            lambda: study_spi(
                model,
                text,
                self.folder / "spi",
                random_seeds=RANDOM_SEEDS,
                **self._options,
            ),
        )
        return found

    @cached_property
    def formats(self) -> FormatsStudy:
        """How cellm's int2 and 1-bit files write."""
        model, text = self.setting.model, self.text
        found: FormatsStudy = self._once(
            "formats",
            FormatsStudy,
            lambda: study_formats(
                model,
                text,
                self.folder / "formats",
                formats=FORMATS,
                **self._options,
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


def row_int4(one: MatrixAssay) -> Rival:
    """Return int4 of a matrix with a scale per row, as measured."""
    return next(rival for rival in one.rivals if rival.method == "int4 row")


def check_setting(setting: Setting) -> None:
    """Refuse, before anything is written, what no claim could be judged by.

    Texts are tokenized where the model can be; one whose forward is not known is no error here, its claims
    say so. Raises BitsmithError for a model that cannot be opened, statistics that are not its own, and texts
    that cannot be read, are not UTF-8 or shorter than a chunk.
    """
    with open_checkpoint(setting.model) as checkpoint:
        _facts(setting, checkpoint)
    try:
        model = open_model(setting.model)
    except BitsmithError:
        return
    with model:
        try:
            tokenizer_keys(model)
        except BitsmithError:
            return
        for text in (setting.text, setting.calibration):
            if text is not None:
                text_chunks(model, text, setting.ctx_tokens, setting.chunks)


def _facts(setting: Setting, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the pieces depend on beside the model."""
    digest = None
    if setting.statistics is not None:
        digest = open_statistics(setting.statistics, _specs(checkpoint)).digest
    texts = {"text": sha256_of(setting.text), "calibration": sha256_of(setting.calibration)}
    return {**asdict(setting), **texts, "statistics": digest, "model": None}


def _specs(checkpoint: Checkpoint) -> list[TensorSpec]:
    """Return what the tensors are, nothing where that is not known."""
    try:
        return [spec for spec, _ in claim(checkpoint if checkpoint.config else import_view(checkpoint))]
    except BitsmithError:
        return []


def sha256_of(path: Path | None) -> str | None:
    """Return a file's SHA-256, None for none. Raises BitsmithError if it cannot be read."""
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
