"""The assay in a terminal: components, both ends of the matrices, verdicts; the rest is in JSON and page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.markup import escape

from bitsmith.errors import printable
from bitsmith.report.terminal import Rows, bytes_text, table
from bitsmith.run.assay_result import (
    Assay,
    ComponentRow,
    MatrixAssay,
    MixerAssay,
    Ranked,
    SeedCheck,
    TrainRow,
    Verdict,
)

_SHOWN = 5
_SMALL = 32  # a side below this says nothing of a model's ranks
_UNMEASURED = "–"
_NUMBERS = (
    "share", "claimed", "claim", "reached", "int4 error", "rank needed", "low rank", "int4", "ratio", "layer",
    "α", "r90", "error", "cosine", "score error", "output error", "prunable",
)  # fmt: skip
_KINDS = {"low_rank_wins": "low rank", "int4_wins": "int4", "unmeasured": _UNMEASURED}
_T = TypeVar("_T")


def component_table(assay: Assay) -> Rows:
    """Return the seed's components with true and claimed shares and ratios, errors, who wins."""
    columns = ("component", "share", "claimed", "claim", "reached", "int4 error", "wins")
    return columns, [_component_row(row) for row in assay.components]


def matrix_table(assay: Assay) -> Rows:
    """Return the matrices where low rank comes closest to int4 in its bytes, and where it stays farthest."""
    judged = sorted((m for m in assay.matrices if m.spectrum is not None), key=_lag)
    judged = [m for m in judged if min(m.shape) >= _SMALL] or judged
    columns = ("errors in int4's bytes", "rank needed", "low rank", "int4", "α", "r90")
    return columns, [_matrix_row(matrix) for matrix in _both_ends(judged)]


def ranking_table(assay: Assay) -> Rows:
    """Return both ends of the ranking by α, with r90 as a share of the rank."""
    r90 = {ranked.name: ranked.value for ranked in assay.ranking.r90}
    rows = [_ranked_row(ranked, r90.get(ranked.name)) for ranked in _both_ends(assay.ranking.alpha)]
    return ("ranked by α", "role", "layer", "α", "r90"), rows


def train_table(assay: Assay) -> Rows:
    """Return the Tensor-Train sweep of every embedding and head."""
    columns = ("Tensor-Train", "ranks", "ratio", "error", "cosine", "≥ 0.95")
    rows = [_train_row(m.name, row) for m in assay.matrices for row in m.tensor_train or ()]
    return columns, rows


def mixer_table(assay: Assay) -> Rows:
    """Return the seed's methods for attention and DeltaNet with their errors, both ends by output error."""
    columns = ("layer", "seed's method for", "ratio", "claim", "score error", "output error", "prunable")
    ordered = sorted(assay.mixers, key=lambda mixer: mixer.codings[0].output_error or 0.0)
    return columns, [_mixer_row(mixer) for mixer in _both_ends(ordered)]


def print_assay(assay: Assay) -> None:
    """Print an assay: components, extreme matrices, ranking, sweeps, totals, verdicts."""
    console = Console()
    architecture = assay.architecture or "no architecture file"
    lines = [
        f"{assay.path}: {architecture}, {assay.parameters:,} parameters, {bytes_text(assay.stored_bytes)}; "
        f"{len(assay.matrices)} matrices in {assay.seconds:.1f} s"
    ]
    _say(console, lines)
    views = (component_table, matrix_table, ranking_table, train_table, mixer_table)
    for columns, rows in (view(assay) for view in views):
        if rows:
            console.print(table(columns, rows, right=_NUMBERS))
    _say(console, [*_notes(assay), *_verdict_lines(assay)])


def print_seed_checks(checks: Sequence[SeedCheck]) -> None:
    """Print the published claims and what their own numbers say."""
    lines = (f"{'holds' if c.possible else 'fails'}: {c.claim}\n       {c.found}" for c in checks)
    Console().print("\n".join(lines), highlight=False, markup=False)


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(escape(printable(line, 2000)), highlight=False, soft_wrap=True)


def _notes(assay: Assay) -> list[str]:
    totals = assay.totals
    return [
        f"16-bit bytes over compressed bytes: the claims' own table gives {totals.seed_table:.1f}×, with "
        f"this model's shares {_ratio(totals.claimed)}; int4 alone reaches {_ratio(totals.int4)}, the best "
        f"measured methods at int4's error {_ratio(totals.reachable)} ({_UNMEASURED} is unmeasured)",
        *(f"note: {note}" for note in assay.notes),
    ]


def _verdict_lines(assay: Assay) -> list[str]:
    judged = [row for row in assay.components if row.verdict.kind != "unmeasured"]
    aware = assay.data_aware
    return [
        *(f"{row.name}: {row.verdict.text}" for row in judged),
        *([] if aware is None else [f"as the outputs see it: {aware.text}"]),
        *([] if assay.activations is None else assay.activations.verdicts),
        f"model: {assay.verdict.text}",
    ]


def _component_row(row: ComponentRow) -> Sequence[str]:
    return (
        f"{row.key} {row.name}",
        f"{row.share:.2%}",
        f"{row.seed_share:.1%}",
        f"{row.seed_ratio:.1f}×",
        _ratio(row.ratio),
        _error(row.quality),
        _winner(row.verdict),
    )


def _matrix_row(matrix: MatrixAssay) -> Sequence[str]:
    verdict, spectrum, law = matrix.verdict, matrix.spectrum, matrix.power_law
    return (
        _short(matrix.name),
        f"{verdict.rank_needed:,} of {verdict.rank_full:,}",
        _error(verdict.low_rank_error),
        _error(verdict.target_error),
        _UNMEASURED if law is None or law.alpha is None else f"{law.alpha:.2f}",
        _UNMEASURED if spectrum is None else f"{spectrum.r90:,}",
    )


def _ranked_row(ranked: Ranked, r90: float | None) -> Sequence[str]:
    layer = "" if ranked.layer is None else str(ranked.layer)
    share = _UNMEASURED if r90 is None else f"{r90:.0%}"
    return _short(ranked.name), ranked.role, layer, f"{ranked.value:.2f}", share


def _train_row(name: str, row: TrainRow) -> Sequence[str]:
    ranks = " ".join(map(str, row.ranks)) + ("" if row.core_rank is None else f", core {row.core_rank}")
    passes = _UNMEASURED if row.passes is None else ("yes" if row.passes else "no")
    ratio = f"{row.ratio:,.2f}×"
    return f"{_short(name)}, {row.method}", ranks, ratio, _error(row.error), _error(row.cosine), passes


def _mixer_row(mixer: MixerAssay) -> Sequence[str]:
    coding, heads = mixer.codings[0], mixer.heads
    return (
        "" if mixer.layer is None else str(mixer.layer),
        mixer.kind,
        _ratio(coding.ratio_to_16_bit),
        _ratio(coding.claimed_ratio),
        _error(coding.score_error),
        _error(coding.output_error),
        _UNMEASURED if heads is None else str(len(heads.prunable)),
    )


def _short(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("model.").removeprefix("language_model.")


def _both_ends(items: Sequence[_T]) -> list[_T]:
    return list(items) if len(items) <= 2 * _SHOWN else [*items[:_SHOWN], *items[-_SHOWN:]]


def _lag(matrix: MatrixAssay) -> float:
    """Return low rank's error over int4's in the same bytes; below 1 low rank wins."""
    low_rank, int4 = matrix.verdict.low_rank_error, matrix.verdict.target_error
    return (low_rank or 0.0) / int4 if int4 else float("inf")


def _winner(verdict: Verdict) -> str:
    mixed = verdict.share is not None and 0 < verdict.share < 1
    return _KINDS[verdict.kind] + (f" (low rank for {verdict.share:.0%})" if mixed else "")


def _ratio(value: float | None) -> str:
    return _UNMEASURED if value is None else f"{value:.2f}×"


def _error(value: float | None) -> str:
    return _UNMEASURED if value is None else f"{value:.4f}"
