"""Allocation: groups, sensitivities through the real forward, plans within a limit, and the choice."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bitsmith.archs.tokenizer import load_tokenizer
from bitsmith.errors import BitsmithError
from bitsmith.lab.corpus import held_out_text
from bitsmith.run.allocate import Allocation, allocate, held_out_scores, held_out_tokens, pick, plans_within
from bitsmith.run.budget import limit_of, parse_fit, parse_target
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.groups import Group, groups_of
from bitsmith.run.mixes import is_quantizable
from bitsmith.run.plan import Plan, Source, open_source, plan_source
from bitsmith.run.sensitivity import Budget, Sensitivities, Sensitivity, measure_sensitivities
from bitsmith.store import open_checkpoint
from bitsmith.store.statistics import SiteStatistics

CTX = 64
FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "BF16")


@pytest.fixture(scope="module")
def tokens(demo_model: Path) -> np.ndarray:
    with open_checkpoint(demo_model) as checkpoint:
        ids = load_tokenizer(checkpoint).encode(held_out_text(6_000)).ids
    return np.array(ids[: 8 * CTX], dtype=np.int64).reshape(8, CTX)


@pytest.fixture(scope="module")
def source(demo_model: Path) -> Source:
    return open_source(open_checkpoint(demo_model))


@pytest.fixture(scope="module")
def groups(source: Source) -> tuple[Group, ...]:
    return groups_of(source, FORMATS)


@pytest.fixture(scope="module")
def late(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups of the last two layers and the head: the cheapest to measure."""
    return tuple(group for group in groups if group.layer is not None and group.layer >= 2)


@pytest.fixture(scope="module")
def measured(demo_model: Path, late: tuple[Group, ...], tokens: np.ndarray) -> Sensitivities:
    with open_model(demo_model) as model:
        return measure_sensitivities(model, late, tokens, None, Budget(4 * CTX, 18))


def invented(groups: tuple[Group, ...], seed: int = 0) -> Sensitivities:
    """Sensitivities that fall fourfold per bit from a scale of each group's own."""
    rng = np.random.default_rng(seed)
    bits = {"Q2_K": 2.6, "Q3_K": 3.4, "Q4_K": 4.5, "Q6_K": 6.6, "Q8_0": 8.5, "BF16": 16, "F16": 16, "F32": 32}
    table = []
    for group in groups:
        scale = float(np.exp(rng.normal(0, 1)))
        nats = {name: scale * 4.0 ** -bits[name] for name in group.formats}
        tensors = tuple(tensor.gguf_name for tensor in group.tensors)
        table.append(Sensitivity(group.name, group.kind, tensors, {}, {}, nats))
    return Sensitivities(tuple(table), (), 0, 0.0)


def formats_of(groups: tuple[Group, ...], plan: Plan) -> dict[str, str]:
    types = {row.gguf_name: row.type for row in plan.rows}
    return {group.name: types[group.tensors[0].gguf_name] for group in groups}


def test_every_quantizable_tensor_is_in_one_group(tiny_qwen3_5: Path, tiny_qwen3_5_tied: Path) -> None:
    for model in (tiny_qwen3_5, tiny_qwen3_5_tied):
        with open_checkpoint(model) as checkpoint:
            source = open_source(checkpoint)
            found = groups_of(source)
        names = [tensor.gguf_name for group in found for tensor in group.tensors]
        wanted = [t.gguf_name for t in source.tensors if is_quantizable(t.gguf_name, t.ref.shape)]
        assert sorted(names) == sorted(wanted)
        by_name = {group.name: group for group in found}
        assert [t.gguf_name for t in by_name["blk.0 delta.in_a+b"].tensors] == [
            "blk.0.ssm_beta.weight",
            "blk.0.ssm_alpha.weight",
        ]
        assert by_name["blk.0 delta.in_a+b"].formats[-1] == "F32"
        assert "Q4_K" not in by_name["blk.0 delta.in_a+b"].formats
        assert by_name["embed"].layer == -1
        assert {group.layer for group in found if "mtp" in group.name or "blk.4" in group.name} == {None}
        assert ("head" in by_name) == (model is tiny_qwen3_5)


def test_rows_that_are_not_whole_blocks_get_small_blocks(tiny_qwen3_5: Path) -> None:
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        found = groups_of(open_source(checkpoint), ("Q4_K", "Q6_K", "BF16"))
    for group in found:
        widths = {tensor.ref.shape[-1] for tensor in group.tensors}
        whole = all(width % 256 == 0 for width in widths)
        assert ("Q4_K" in group.formats) == (
            whole and "Q4_0" not in group.formats and "F32" not in group.formats
        )


def test_a_measured_group_is_what_evaluating_its_file_gives(
    demo_model: Path, measured: Sensitivities, tokens: np.ndarray, tmp_path: Path
) -> None:
    """One group at its anchor, written as a real file and evaluated, agrees with the measurement."""
    for name, pattern in (("blk.2 ffn.down", r"blk\.2\.ffn_down"), ("head", r"^output\.weight")):
        entry = next(entry for entry in measured.groups if entry.group == name)
        form = next(iter(entry.measured))
        file = compress(
            demo_model, tmp_path / f"{len(name)}.gguf", "BF16", tensor_types=[(pattern, form)]
        ).out
        kept = tokens[np.linspace(0, 7, 4).round().astype(int)]
        (scores,) = held_out_scores(demo_model, [file], kept)
        assert scores["mean_kld"].value == pytest.approx(entry.measured[form], rel=1e-3)


def test_what_was_measured_and_what_not_is_said(measured: Sensitivities, late: tuple[Group, ...]) -> None:
    for entry, group in zip(measured.groups, late, strict=True):
        assert set(entry.nats) == set(entry.noise) == set(group.formats)
        assert set(entry.measured) <= set(entry.nats)
        assert bool(entry.measured) != bool(entry.borrowed)
        for name, nats in entry.measured.items():
            assert entry.nats[name] == nats
        by_noise = sorted(group.formats, key=lambda form: entry.noise[form])
        assert [entry.nats[form] for form in by_noise] == sorted(entry.nats.values())
        exact = group.formats[-1]  # BF16, as the source is, or F32
        assert entry.noise[exact] == entry.nats[exact] == 0
    assert measured.forwards <= 18
    assert len(measured.uniform) == 3
    assert measured.scored_tokens == 4 * (CTX // 2 - 1)


def test_the_sum_of_groups_predicts_the_whole(measured: Sensitivities) -> None:
    for summed, whole in measured.uniform:
        assert 0.7 < whole / summed < 1.4
        assert 0.6 < measured.total(summed) / whole < 1.6
    assert measured.total(0.0) == 0.0


def test_a_small_budget_borrows_from_neighbours(
    demo_model: Path, groups: tuple[Group, ...], tokens: np.ndarray
) -> None:
    ffn = [group for group in groups if group.kind == "ffn.down"]
    with open_model(demo_model) as model:
        found = measure_sensitivities(model, ffn, tokens, None, Budget(CTX, 2))
    assert found.forwards <= 2
    assert [bool(entry.measured) for entry in found.groups] == [False, True, False, True]
    assert found.groups[0].borrowed == (ffn[1].name,)
    assert found.groups[2].borrowed == (ffn[1].name, ffn[3].name)
    borrowed = [entry for entry in found.groups if entry.borrowed]
    assert borrowed
    for entry in borrowed:
        assert all(nats >= 0 and np.isfinite(nats) for nats in entry.nats.values())
        assert entry.nats["BF16"] == 0 < entry.nats["Q6_K"] < entry.nats["Q2_K"]


def test_measuring_twice_gives_the_same(
    demo_model: Path, groups: tuple[Group, ...], tokens: np.ndarray
) -> None:
    with open_model(demo_model) as model:
        last = [group for group in groups if group.layer == 4]
        first, second = (measure_sensitivities(model, last, tokens, None, Budget(CTX)) for _ in range(2))
    assert first == second


def test_mtp_is_priced_like_its_kind_and_noise_knows_the_inputs(tiny_qwen3_5: Path) -> None:
    class Known:
        """Inputs of which the first column is by far the largest."""

        def of(self, spec):
            diagonal = np.ones(spec.shape[-1], dtype=np.float32)
            return SiteStatistics("s", 9, diagonal, moment=np.diag(diagonal)) if spec.site else None

    with open_checkpoint(tiny_qwen3_5) as checkpoint, open_model(tiny_qwen3_5) as model:
        groups = [g for g in groups_of(open_source(checkpoint)) if g.layer in (3, 4, None)]
        ids = np.random.default_rng(0).integers(0, 200, (2, 16))
        plain, known = (
            measure_sensitivities(model, groups, ids, moments, Budget(16)) for moments in (None, Known())
        )
    for entry, other in zip(plain.groups, known.groups, strict=True):
        assert bool(entry.borrowed) == (not entry.measured)
        assert entry.noise == pytest.approx(other.noise, rel=0.2)
    assert {entry.group for entry in plain.groups if entry.borrowed} == {
        g.name for g in groups if g.layer is None
    }


@pytest.mark.parametrize("target", ["4.5bpw", "3.7bpw", "4600000", "12MB", "100GB"])
def test_plans_keep_the_limit_to_the_byte(
    target: str, source: Source, groups: tuple[Group, ...], demo_model: Path, tmp_path: Path
) -> None:
    limit = limit_of(source, parse_target(target))
    found = plans_within(source, groups, invented(groups), limit, 3)
    types = [tuple(row.type for row in plan.rows) for plan in found.plans]
    assert len(set(types)) == len(types) >= (1 if target == "100GB" else 3)
    for candidate in found.candidates:
        assert limit.holds(candidate.plan.tensor_bytes, candidate.plan.file_bytes)
        assert candidate.predicted_nats >= found.candidates[0].predicted_nats
        for row in candidate.plan.rows:
            assert is_quantizable(row.gguf_name, row.shape) or row.type == "F32"
    best = found.candidates[0]
    assert best.gap_nats == pytest.approx(0, abs=1e-12)
    types_of_best = [
        (f"^{re.escape(r.gguf_name)}$", r.type) for r in best.plan.rows if r.reason != "never quantized"
    ]
    out = compress(demo_model, tmp_path / "best.gguf", best.plan.type, tensor_types=types_of_best)
    assert out.file_bytes == best.plan.file_bytes


def test_the_optimum_is_brute_force_s(source: Source) -> None:
    """All choices of four groups, the rest fixed by offering them one format."""
    groups = tuple(
        group if number < 4 else Group(group.name, group.kind, group.layer, group.tensors, group.formats[-1:])
        for number, group in enumerate(groups_of(source, FORMATS))
    )
    table = invented(groups, 5)
    middle = plan_source(source, "Q4_K_M").file_bytes
    smallest = None
    for target in (str(middle + 8_000_000), str(middle + 7_900_001)):
        limit = limit_of(source, parse_target(target))
        found = plans_within(source, groups, table, limit, 1).candidates[0]
        losses = []
        for choice in product(*(group.formats for group in groups)):
            sizes = sum(
                -(-_nbytes(tensor, form) // 32) * 32
                for group, form in zip(groups, choice, strict=True)
                for tensor in group.tensors
            )
            fixed = found.plan.file_bytes - sum(
                -(-row.nbytes // 32) * 32
                for row in found.plan.rows
                if is_quantizable(row.gguf_name, row.shape)
            )
            if sizes + fixed <= limit.limit_bytes:
                names = (group.name for group in groups)
                losses.append(table.predicted(dict(zip(names, choice, strict=True))))
        assert found.predicted_nats == pytest.approx(min(losses))
        smallest = min(losses)
    assert smallest


def _nbytes(tensor, form: str) -> int:
    from bitsmith.formats import format_named

    return int(np.prod(tensor.ref.shape[:-1])) * format_named(form).row_bytes(tensor.ref.shape[-1])


@pytest.mark.parametrize("text", ["2bpw", "100000", "1"])
def test_a_target_below_the_smallest_is_refused_before_any_measuring(
    text: str, demo_model: Path, tokens: np.ndarray
) -> None:
    def measuring(*_: object) -> None:
        raise AssertionError("it measured")

    with pytest.raises(BitsmithError, match=r"too small: the smallest formats offered take [\d,]+ bytes"):
        allocate(demo_model, None, parse_target(text), tokens=tokens, progress=measuring)


def test_without_tokens_there_is_one_error(demo_model: Path) -> None:
    class Imatrix:
        def tokens(self):
            return None

    for statistics in (None, Imatrix()):
        with pytest.raises(BitsmithError, match="pass statistics made by calibrate"):
            held_out_tokens(demo_model, statistics)


def test_candidates_are_written_measured_and_the_best_comes_first(
    demo_model: Path, groups: tuple[Group, ...], source: Source, tokens: np.ndarray, tmp_path: Path
) -> None:
    limit = limit_of(source, parse_fit("18MiB", 512))
    found: Allocation = plans_within(source, groups, invented(groups), limit, 3)

    def write(plan: Plan, number: int) -> Path:
        types = [(f"^{re.escape(r.gguf_name)}$", r.type) for r in plan.rows if r.reason != "never quantized"]
        return compress(demo_model, tmp_path / f"{number}.gguf", plan.type, tensor_types=types).out

    tried = pick(demo_model, found, write, tokens[:3])
    assert sorted(found.name for found in tried) == sorted(candidate.name for candidate in found.candidates)
    means = [one.mean_nats for one in tried]
    assert means == sorted(means)
    assert all(one.file.stat().st_size == one.plan.file_bytes <= limit.limit_bytes for one in tried)
    assert all(one.measures["mean_kld"].low <= one.mean_nats for one in tried)


def test_formats_per_group_come_out_of_a_plan(source: Source, groups: tuple[Group, ...]) -> None:
    measured = invented(groups)
    found = plans_within(source, groups, measured, limit_of(source, parse_target("5bpw")), 3)
    best = found.candidates[0]
    assert measured.predicted(formats_of(groups, best.plan)) == pytest.approx(best.predicted_nats)
    assert sum(best.tensor_nats.values()) == pytest.approx(
        sum(entry.nats[formats_of(groups, best.plan)[entry.group]] for entry in measured.groups)
    )
    record = found.to_json()
    assert record["candidates"][0]["types"]["output_norm.weight"] == "F32"


def test_a_tied_embedding_is_changed_as_the_head_too(tiny_qwen3_5_tied: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 200, (2, 16))
    with open_checkpoint(tiny_qwen3_5_tied) as checkpoint, open_model(tiny_qwen3_5_tied) as model:
        groups = [group for group in groups_of(open_source(checkpoint)) if group.kind == "embed"]
        (entry,) = measure_sensitivities(model, groups, ids).groups
    form, nats = next(iter(entry.measured.items()))
    overrides = [("token_embd", form)]
    file = compress(tiny_qwen3_5_tied, tmp_path / "tied.gguf", "BF16", tensor_types=overrides).out
    (scores,) = held_out_scores(tiny_qwen3_5_tied, [file], ids)
    assert scores["mean_kld"].value == pytest.approx(nats, rel=1e-3)
