"""The assay as one self-contained page of interactive plots: verdicts first, then what they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bitsmith.errors import printable
from bitsmith.report import assay_figures as figures
from bitsmith.report.page import Figure, Section, write_page
from bitsmith.run.assay_result import Assay, ComponentRow, MatrixAssay, Rival, Verdict
from bitsmith.store.hub_names import last_name

UNMEASURED = "unmeasured"
_KINDS = {"low_rank_wins": "low rank wins", "int4_wins": "int4 wins", "unmeasured": UNMEASURED}


def write_assay_page(path: Path, assay: Assay) -> Path:
    """Write the assay as one HTML page that needs no network; stored names are shown literally."""
    title = f"Assay of {printable(last_name(assay.path))}"
    return write_page(path, title, list(_sections(assay)))


def _sections(assay: Assay) -> Iterator[Section]:
    yield _verdict(assay)
    yield from _components(assay)
    yield from _plots(assay)
    yield from _tensor_trains(assay)
    yield from _mixers(assay)
    yield from _activations(assay)
    yield from _seed_checks(assay)
    yield from _matrices(assay)
    yield from _protocol(assay)


def _verdict(assay: Assay) -> Section:
    model = printable(assay.architecture or "no known architecture: taken by shape and name")
    return Section(
        "Verdict",
        lead=_sentence(assay.verdict.text),
        note=(
            f"{printable(assay.path)}: {model}, {assay.parameters:,} parameters in "
            f"{assay.stored_bytes:,} bytes; {len(assay.matrices)} matrices assayed in {assay.seconds:,.1f} s"
        ),
        columns=("component", "closer", "because"),
        rows=[
            (
                printable(f"{row.key} {row.name}"),
                _KINDS[row.verdict.kind],
                printable(row.verdict.text, 2000),
            )
            for row in assay.components
        ],
    )


def _components(assay: Assay) -> Iterator[Section]:
    if not assay.components:
        return
    totals = assay.totals
    yield Section(
        "Components: claimed and true",
        note=(
            "Ratio of 16-bit bytes to compressed bytes for the whole model: "
            f"{totals.seed_table:.2f} by the claims' own table, {_ratio(totals.claimed)} with the true "
            f"shares, {_ratio(totals.reachable)} reached by the best measured method of each matrix at "
            f"int4's quality, {_ratio(totals.int4)} by int4."
        ),
        figure=figures.shares(assay.components),
        columns=(
            "component", "assayed", "parameters", "share", "claimed share", "claimed method",
            "claimed ratio", "reached", "at error", "int4's error", "by",
        ),
        rows=[_component_row(row) for row in assay.components],
    )  # fmt: skip


def _component_row(row: ComponentRow) -> tuple[str, ...]:
    return (
        printable(f"{row.key} {row.name}"),
        f"{row.assayed} of {row.tensors}",
        f"{row.parameters:,}",
        f"{row.share:.2%}",
        f"{row.seed_share:.1%}",
        printable(row.seed_method),
        _ratio(row.seed_ratio),
        _ratio(row.ratio),
        _number(row.error),
        _number(row.quality),
        ", ".join(f"{printable(method)} ({count})" for method, count in row.best) or UNMEASURED,
    )


def _plots(assay: Assay) -> Iterator[Section]:
    yield from _plot(
        "Spectra",
        "Singular values over the largest, by index over full rank. A low-rank matrix falls off a cliff; "
        "one filled at random keeps all σ between the dashed lines (Marchenko-Pastur with the middle layer's "
        "shape and median σ²). Choose a role to see all its layers.",
        figures.spectra(assay),
    )
    yield from _plot(
        "Rank and error",
        "The least error of any approximation of that rank (Eckart-Young-Mirsky), factors exact and free. "
        "The dashed line is what int4 reaches.",
        figures.rank_error(assay),
    )
    yield from _plot(
        "Low rank against int4, at equal bytes",
        "Measured on the actual weights: each point is a matrix, with the best low-rank coding that fits "
        "int4's bytes. Above the dashed line int4 is closer.",
        figures.low_rank_against_int4(assay),
    )
    yield from _plot(
        "Claim and measurement",
        "The error that the claimed exponential decay implies, beside the measured one. Above the dotted "
        "line a matrix of zeros would have been closer.",
        figures.claims(assay),
    )
    yield from _plot(
        "By depth",
        "α of the power law p(λ) ∝ λ^−α fitted to the tail of λ = σ², with its 95 % bootstrap interval; "
        "other figures by choice. Matrices outside the layers stand at -1; intervals wider than "
        "the plot are cut.",
        figures.by_depth(assay),
    )
    yield from _plot(
        "Distance from the rate-distortion bound",
        "How much worse each format is than the best code at its rate, one point per matrix: for independent "
        "Gaussian weights or, by choice, for this spectrum with singular directions known to the decoder.",
        figures.bound_gaps(assay),
    )


def _plot(heading: str, note: str, figure: Figure | None) -> Iterator[Section]:
    if figure is not None:
        yield Section(heading, note, figure=figure)


def _tensor_trains(assay: Assay) -> Iterator[Section]:
    rows = [
        (
            printable(matrix.name),
            printable(row.method),
            str(list(row.asked)),
            str(list(row.ranks)),
            f"{row.parameters:,}",
            f"{row.ratio:,.2f}",
            _number(row.error),
            _number(row.cosine),
            {True: "pass", False: "fail", None: UNMEASURED}[row.passes],
        )
        for matrix in assay.matrices
        for row in matrix.tensor_train or ()
    ]
    if rows:
        yield Section(
            "Tensor-Train",
            "Embeddings and heads as Tensor-Trains of the asked ranks: mean row cosine against the ratio of "
            "parameters. The gate is a cosine of 0.95.",
            figure=figures.tensor_trains(assay),
            columns=("matrix", "method", "asked", "used", "parameters", "ratio", "error", "cosine", "gate"),
            rows=rows,
            closed=f"{len(rows)} trains",
        )


def _mixers(assay: Assay) -> Iterator[Section]:
    rows = [
        (
            "" if mixer.layer is None else str(mixer.layer),
            mixer.kind,
            printable(coding.method),
            f"{coding.rank}",
            f"{coding.dropped}",
            f"{coding.stored_bytes:,}",
            f"{coding.ratio_to_16_bit:.2f}",
            f"{coding.claimed_ratio:.2f}",
            _number(coding.weights_error),
            _number(coding.score_error),
            _number(coding.output_error),
            printable(coding.inputs),
        )
        for mixer in assay.mixers
        for coding in mixer.codings
    ]
    heads = [mixer.heads for mixer in assay.mixers if mixer.heads is not None]
    prunable = sum(len(found.prunable) for found in heads)
    total = sum(len(found.output or ()) for found in heads)
    if rows:
        yield Section(
            "Attention and DeltaNet",
            "Head pruning with low rank, and kernel SVD with value pruning, as claimed; errors measured on "
            "the weights, on the score maps and on the layer's output. "
            f"{prunable} of {total} query heads hold too little of the output's energy to keep.",
            columns=(
                "layer", "kind", "method", "rank", "dropped", "bytes", "ratio", "claimed ratio",
                "error of weights", "of scores", "of output", "inputs taken as",
            ),
            rows=rows,
            closed=f"{len(rows)} codings",
        )  # fmt: skip


def _activations(assay: Assay) -> Iterator[Section]:
    found = assay.activations
    if found is None:
        return
    used = found.protocol
    yield Section(
        "Activations and KV cache",
        f"{printable(used.text)} (SHA-256 {used.text_sha256[:16]}…): {used.tokens:,} tokens in "
        f"{used.chunks} chunks of {used.ctx_tokens}. RMS along the principal directions over the first's.",
        points=[printable(line, 2000) for line in found.verdicts],
        figure=figures.activations(found.sites),
        columns=(
            "cache", "layer", "head", "format", "its error", "rank needed", "bytes at 16 bits / format's",
            "at least", "low rank's error in its bytes", "winner",
        ),
        rows=[
            (
                site.site.upper(), str(site.layer), "all" if site.head is None else str(site.head),
                rival.format, _number(rival.error), f"{rival.rank_needed} of {site.dim}",
                _ratio(rival.bytes_ratio), _ratio(rival.least_bytes_ratio), _number(rival.equal_bytes_error),
                {True: "low rank", False: rival.format, None: "unsettled"}[rival.low_rank_wins],
            )
            for site in found.sites
            for rival in site.rivals or ()
        ],
        closed="low rank against quantized caches",
    )  # fmt: skip


def _seed_checks(assay: Assay) -> Iterator[Section]:
    if assay.seed_checks:
        yield Section(
            "Published claims, re-derived",
            columns=("claim", "found", "possible"),
            rows=[
                (
                    printable(check.claim, 2000),
                    printable(check.found, 2000),
                    "yes" if check.possible else "no",
                )
                for check in assay.seed_checks
            ],
        )


def _matrices(assay: Assay) -> Iterator[Section]:
    yield Section(
        "Matrices",
        columns=(
            "matrix", "role", "shape", "σ₁", "condition", "stable rank", "effective rank", "rank for 0.1",
            "spikes", "α", "int4", "low rank", "verdict", "weighted by the inputs",
        )[: None if any(matrix.whitened for matrix in assay.matrices) else -1],
        rows=[_matrix_row(matrix) for matrix in assay.matrices],
        closed=f"{len(assay.matrices)} matrices",
    )  # fmt: skip
    if assay.skipped:
        yield Section(
            "Not assayed",
            columns=("tensor", "shape", "parameters", "why"),
            rows=[
                (printable(skip.name), _times(skip.shape), f"{skip.parameters:,}", printable(skip.why))
                for skip in assay.skipped
            ],
            closed=f"{len(assay.skipped)} tensors",
        )


def _matrix_row(matrix: MatrixAssay) -> tuple[str, ...]:
    found, law = matrix.spectrum, matrix.power_law
    ranks = dict(found.rank_for_error) if found else {}
    return (
        printable(matrix.name),
        printable(matrix.role),
        f"{_times(matrix.shape)} {printable(matrix.dtype)}",
        _number(found.sigma_max if found else 0.0),
        _number(found.condition if found else None),
        _number(found.stable_rank if found else None),
        _number(found.effective_rank if found else None),
        f"{ranks[0.1]} of {min(matrix.shape)}" if 0.1 in ranks else UNMEASURED,
        f"{matrix.random.spikes}" if matrix.random else UNMEASURED,
        _interval(law.alpha, law.alpha_low, law.alpha_high) if law else UNMEASURED,
        _least(matrix.rivals, "int4"),
        _least(matrix.rivals, "low_rank"),
        _words(matrix.verdict),
        *([_words(matrix.whitened.verdict)] if matrix.whitened else []),
    )


def _protocol(assay: Assay) -> Iterator[Section]:
    settings = [(name, str(value)) for name, value in vars(assay.protocol).items() if value is not None]
    yield Section(
        "Protocol",
        "Errors are relative Frobenius errors of the weights unless said otherwise.",
        columns=("setting", "value"),
        rows=[(name, printable(value)) for name, value in settings],
        text="\n".join(printable(note, 2000) for note in assay.notes),
    )


def _sentence(text: str) -> str:
    shown = printable(text, 2000)
    return shown[:1].upper() + shown[1:]


def _words(verdict: Verdict) -> str:
    return f"{_KINDS[verdict.kind]}: {printable(verdict.text, 2000)}"


def _least(rivals: Sequence[Rival], kind: str) -> str:
    found = figures.closest(rivals, kind)
    return f"{found.error:.4f} ({printable(found.method)})" if found else UNMEASURED


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return _number(value)
    return f"{value:.2f} ({low:.2f} … {high:.2f})"


def _number(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.2f}"


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
