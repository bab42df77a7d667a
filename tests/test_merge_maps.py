"""Maps, layer choice, heads and neurons of a merge, against definitions and brute force."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.errors import BitsmithError
from bitsmith.passes.merge_axes import (
    AxisMap,
    best_matches,
    by_channel,
    diagonal_of,
    greedy_matches,
    mixed_columns,
)
from bitsmith.passes.merge_ffn import matched_neurons, strongest_neurons, with_rest_solved, with_rest_tied
from bitsmith.passes.merge_heads import (
    Groups,
    HeadMap,
    head_importance,
    head_likeness,
    head_power,
    head_traces,
    key_cross,
    matched_heads,
    paired_heads,
    pruned_heads,
    selected_heads,
    with_frozen_kv,
    with_turned_values,
)
from bitsmith.passes.merge_layers import (
    cka_matrix,
    monotone_layers,
    proportional_layers,
)
from bitsmith.passes.merge_maps import (
    PairMoments,
    ResidualMap,
    along_axes,
    blended_map,
    cross_map,
    geodesic_map,
    norm_gain,
    pooled,
    principal_axes,
    procrustes_map,
    random_fold,
    ridge_map,
    solved_reading,
    sparse_fold,
    subspace_map,
    tiered_map,
    transition,
    transition_cost,
    variance_kept,
    whitened_map,
)

Rows = np.ndarray
WIDE, NARROW, TOKENS = 24, 10, 400
ORTHONORMAL = (subspace_map, procrustes_map, cross_map, tiered_map)


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    """A teacher's and a student's states (`N 24`, `N 10`) that share a part of what they hold."""
    random = np.random.default_rng(2)
    shared = random.standard_normal((TOKENS, NARROW)) * np.geomspace(3, 0.3, NARROW)
    spread = np.linalg.qr(random.standard_normal((WIDE, NARROW)))[0]
    teacher = shared @ spread.T + 0.3 * random.standard_normal((TOKENS, WIDE))
    student = 0.5 * shared @ np.linalg.qr(random.standard_normal((NARROW, NARROW)))[0]
    return teacher, student + 0.05 * random.standard_normal((TOKENS, NARROW))


@pytest.fixture(scope="module")
def moments(rows: tuple[Rows, Rows]) -> PairMoments:
    return PairMoments.of(*rows)


# ---------------------------------------------------------------- residual maps


def test_a_reader_is_solved_for_between_the_text_and_the_students_own() -> None:
    """The gradient of `|x_s w - x_t w_t|² / N + λ |w - w_s|²` is zero at the solution."""
    random = np.random.default_rng(7)
    x_t = random.normal(size=(400, 12))
    x_s = x_t @ random.normal(size=(12, 6)) + 0.3 * random.normal(size=(400, 6))
    w_t, w_s = random.normal(size=(5, 12)), random.normal(size=(5, 6))
    moments, ridge = PairMoments.of(x_t, x_s), 0.1
    solved = solved_reading(moments, ridge)
    w = w_t @ solved.theirs + w_s @ solved.own
    damping = ridge * np.trace(moments.ss) / 6
    gradient = (x_s @ w.T - x_t @ w_t.T).T @ x_s / 400 + damping * (w - w_s)
    assert np.abs(gradient).max() < 1e-10
    assert np.abs(w_t @ solved_reading(moments, 1e9).theirs).max() < 1e-6  # no text: the student's own
    exact = solved_reading(PairMoments.of(x_t, x_t[:, :6]), 1e-4)
    same = np.hstack([w_s, np.zeros((5, 6))])
    np.testing.assert_allclose(same @ exact.theirs + w_s @ exact.own, w_s, atol=1e-10)


@pytest.mark.parametrize("solve", ORTHONORMAL)
def test_orthonormal_maps_have_the_students_power(solve, rows, moments) -> None:
    found = solve(moments)
    scale = np.linalg.norm(found.forward[:, 0])
    np.testing.assert_allclose(found.forward.T @ found.forward, scale**2 * np.eye(NARROW), atol=1e-12)
    np.testing.assert_allclose(found.forward.T @ found.backward, np.eye(NARROW), atol=1e-12)
    np.testing.assert_allclose(found.frame, found.forward / scale, atol=1e-12)
    assert np.mean((rows[0] @ found.forward) ** 2) == pytest.approx(np.mean(rows[1] ** 2))


def mean_cosine(mapping: ResidualMap, teacher: Rows, student: Rows) -> float:
    mapped = teacher @ mapping.forward
    sizes = np.linalg.norm(mapped, axis=1) * np.linalg.norm(student, axis=1)
    return float(((mapped * student).sum(1) / sizes).mean())


def test_alignment_finds_what_is_shared(rows, moments) -> None:
    cosines = {solve.__name__: mean_cosine(solve(moments), *rows) for solve in (*ORTHONORMAL, ridge_map)}
    assert min(cosines["cross_map"], cosines["procrustes_map"], cosines["tiered_map"]) > 0.95
    assert cosines["ridge_map"] > 0.95
    assert cosines["procrustes_map"] > cosines["tiered_map"] - 1e-3  # tiers only restrict it
    flipped = ResidualMap(-cross_map(moments).forward, cross_map(moments).backward, "flipped")
    assert mean_cosine(flipped, *rows) == pytest.approx(-cosines["cross_map"])


def test_no_rotation_meets_better_than_procrustes(moments) -> None:
    random = np.random.default_rng(0)
    best = np.vdot(cross_map(moments).frame, moments.ts)
    inside = np.vdot(procrustes_map(moments).frame, moments.ts)
    axes, _ = principal_axes(moments.tt, NARROW)
    for _ in range(50):
        turn = np.linalg.qr(random.standard_normal((NARROW, NARROW)))[0]
        assert np.vdot(axes @ turn, moments.ts) < inside + 1e-9
        assert np.vdot(np.linalg.qr(random.standard_normal((WIDE, NARROW)))[0], moments.ts) < best + 1e-9


def test_tiers_without_a_fold_span_what_plain_svd_does(moments) -> None:
    """The write-up's residual compression is vacuous: only the rotation within the subspace is restricted."""
    plain, tiers = subspace_map(moments).frame, tiered_map(moments, 4).frame
    np.testing.assert_allclose(plain @ plain.T, tiers @ tiers.T, atol=1e-10)
    left, _ = principal_axes(moments.tt, NARROW)
    right, _ = principal_axes(moments.ss)
    turn = left.T @ tiers @ right
    np.testing.assert_allclose(turn[:4, 4:], 0, atol=1e-10)
    np.testing.assert_allclose(turn[4:, :4], 0, atol=1e-10)
    np.testing.assert_allclose(tiered_map(moments).frame, tiered_map(moments, NARROW // 2).frame)


def test_principal_axes_are_eigenvectors_with_a_sign(moments) -> None:
    axes, variances = principal_axes(moments.tt, 6)
    np.testing.assert_allclose(moments.tt @ axes, axes * variances[:6], atol=1e-10)
    assert (np.diff(variances) <= 0).all()
    assert (axes[np.abs(axes).argmax(0), np.arange(6)] > 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_fold_superposes_every_direction(seed: int, moments) -> None:
    fold = random_fold(19, 5, seed)
    np.testing.assert_allclose(fold.T @ fold, np.eye(5), atol=1e-12)
    assert (np.count_nonzero(fold, axis=1) == 1).all()
    assert sorted(np.count_nonzero(fold, axis=0)) == [3, 4, 4, 4, 4]
    np.testing.assert_array_equal(fold, random_fold(19, 5, seed))
    assert (fold != random_fold(19, 5, seed + 2)).any()
    frame = tiered_map(moments, 5, fold).frame
    np.testing.assert_allclose(frame.T @ frame, np.eye(NARROW), atol=1e-12)
    beyond, _ = principal_axes(moments.tt)
    assert (np.linalg.norm(beyond[:, 5:].T @ frame, axis=1) > 0.1).all()  # none is left out


def test_a_sparse_fold_keeps_apart_what_acts_at_once(moments, rows) -> None:
    """Directions 0, 4 and 8 act on the same tokens, so do 1, 5 and 9, ...: no slot may hold two of a set."""
    random = np.random.default_rng(4)
    active = random.integers(0, 4, 2000)[:, None] == np.arange(12) % 4
    samples = random.standard_normal((2000, 12)) * active
    members = [np.flatnonzero(column) % 4 for column in sparse_fold(samples, 4).T]
    assert sorted(len(m) for m in members) == [3, 3, 3, 3]
    assert all(len(set(m)) == len(m) for m in members)
    drawn = [np.flatnonzero(column) % 4 for column in random_fold(12, 4).T]
    assert any(len(set(m)) < len(m) for m in drawn)
    along = along_axes(rows[0], moments, 4)
    np.testing.assert_allclose(
        along.T @ along / TOKENS, np.diag(principal_axes(moments.tt)[1][4:]), atol=1e-9
    )
    assert tiered_map(moments, 4, sparse_fold(along, NARROW - 4)).frame.shape == (WIDE, NARROW)


def test_ridge_is_least_squares_each_way(rows, moments) -> None:
    found = ridge_map(moments, 1e-12)
    np.testing.assert_allclose(found.forward, np.linalg.lstsq(*rows, rcond=None)[0], atol=1e-8)
    np.testing.assert_allclose(found.backward.T, np.linalg.lstsq(*rows[::-1], rcond=None)[0], atol=1e-8)


def test_whitened_states_have_the_students_covariance(rows, moments) -> None:
    found = whitened_map(moments, 1e-12)
    mapped = rows[0] @ found.forward
    np.testing.assert_allclose(mapped.T @ mapped / TOKENS, moments.ss, atol=1e-9)
    np.testing.assert_allclose(found.forward.T @ found.backward, np.eye(NARROW), atol=1e-9)


def test_the_gain_is_what_the_norm_loses(rows, moments) -> None:
    found, (x, _) = tiered_map(moments), rows
    kept = np.linalg.norm(x @ found.frame, axis=1) / np.linalg.norm(x, axis=1)
    scale = np.linalg.norm(found.forward[:, 0])
    assert norm_gain(found, x) == pytest.approx(scale * np.sqrt(WIDE / NARROW) * kept.mean())
    assert norm_gain(found, np.concatenate([x, np.zeros((9, WIDE))])) == pytest.approx(norm_gain(found, x))
    assert norm_gain(found, np.zeros((2, WIDE))) == 1.0


def test_one_map_carries_states_over_and_another_costs(moments) -> None:
    one, other = procrustes_map(moments), subspace_map(moments)
    np.testing.assert_allclose(transition(one, one), np.eye(NARROW), atol=1e-12)
    assert transition_cost(one, one)[0] == pytest.approx(0, abs=1e-10)
    cost, normalised = transition_cost(one, other)
    turned = one.frame.T @ other.frame
    assert cost == pytest.approx(np.sqrt(2 * NARROW - 2 * np.trace(turned)))
    assert normalised == pytest.approx(cost / np.sqrt(NARROW))


def test_variance_kept_is_the_share_in_the_span(moments) -> None:
    variances = principal_axes(moments.tt)[1]
    kept = variance_kept(subspace_map(moments), moments.tt)
    assert kept == pytest.approx(variances[:NARROW].sum() / variances.sum())
    assert variance_kept(cross_map(moments), moments.tt) <= kept + 1e-12
    assert variance_kept(subspace_map(moments), np.zeros((WIDE, WIDE))) == 0.0


def test_blends_lie_between(moments) -> None:
    plane = np.linalg.qr(np.random.default_rng(1).standard_normal((WIDE, 2)))[0]

    def turned(angle: float) -> ResidualMap:
        frame = plane @ np.array([[np.cos(angle)], [np.sin(angle)]])
        return ResidualMap(2 * frame, frame / 2, "turned")

    middle = blended_map([turned(0.2), turned(1.0)], [3, 3])
    np.testing.assert_allclose(middle.forward, turned(0.6).forward, atol=1e-12)
    np.testing.assert_allclose(middle.backward, turned(0.6).backward, atol=1e-12)
    quarter = geodesic_map(turned(0.2), turned(1.0), 0.25)
    np.testing.assert_allclose(quarter.forward, turned(0.4).forward, atol=1e-12)
    one = tiered_map(moments)
    np.testing.assert_allclose(blended_map([one, cross_map(moments)], [1, 0]).forward, one.forward, atol=1e-9)
    for weights in ([1], [-1, 2], [0, 0]):
        with pytest.raises(BitsmithError, match="weights"):
            blended_map([one, one], weights)


def test_the_way_between_two_maps_is_even(moments) -> None:
    random = np.random.default_rng(17)
    start, scale = tiered_map(moments), 3.0
    lift = np.linalg.qr(start.frame + 0.1 * random.standard_normal((WIDE, NARROW)))[0]
    nearer = lift @ np.linalg.qr(lift.T @ start.frame)[0]
    u, _, wt = np.linalg.svd(nearer.T @ start.frame)
    near = nearer @ (u @ wt)
    small = np.linalg.qr(np.eye(NARROW) + 0.1 * random.standard_normal((NARROW, NARROW)))
    end = ResidualMap(scale * near @ (small[0] * np.sign(np.diagonal(small[1]))), near / scale, "end")
    first = start.forward
    for share, expected in ((0.0, first), (1.0, end.forward)):
        np.testing.assert_allclose(geodesic_map(start, end, share).forward, expected, atol=1e-9)
    steps = [geodesic_map(start, end, share).frame for share in (0, 0.25, 0.5, 0.75, 1)]
    lengths = [np.linalg.norm(b - a) for a, b in pairwise(steps)]
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-3)
    np.testing.assert_allclose(steps[1].T @ steps[1], np.eye(NARROW), atol=1e-12)
    back = geodesic_map(end, start, 0.25).frame
    np.testing.assert_allclose(back, steps[3], atol=1e-9)
    mirrored = ResidualMap(first * np.where(np.arange(NARROW), 1, -1), start.backward, "mirrored")
    for other, share, said in ((mirrored, 0.5, "reflection"), (end, 1.5, "share 1.5")):
        with pytest.raises(BitsmithError, match=said):
            geodesic_map(start, other, share)


def test_pooled_moments_weigh_layers_alike(rows) -> None:
    large, small = (PairMoments.of(s * rows[0], s * rows[1]) for s in (100.0, 0.01))
    both = pooled([large, small])
    np.testing.assert_allclose(both.ts, pooled([small]).ts, atol=1e-9)
    assert np.trace(both.ss) == pytest.approx(1.0)


def test_moments_that_do_not_fit_are_refused(rows, moments) -> None:
    with pytest.raises(BitsmithError, match="smaller than the student's"):
        PairMoments.of(*rows[::-1])
    with pytest.raises(BitsmithError, match="do not fit"):
        PairMoments(moments.tt[:9], moments.ss, moments.ts)
    with pytest.raises(BitsmithError, match="not finite"):
        PairMoments(moments.tt, moments.ss, np.full_like(moments.ts, np.nan))
    for trunk in (0, NARROW):
        with pytest.raises(BitsmithError, match="trunk"):
            tiered_map(moments, trunk)
    with pytest.raises(BitsmithError, match="fold has shape"):
        tiered_map(moments, 4, random_fold(19, 6))
    with pytest.raises(BitsmithError, match="cannot fill"):
        random_fold(3, 4)
    with pytest.raises(BitsmithError, match="no moments"):
        pooled([])


# ---------------------------------------------------------------- layers


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    return float(cka_matrix([x], [y])[0, 0])


def test_cka_is_blind_to_rotation_and_scale(rows) -> None:
    x, y = rows
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDE, WIDE)))[0]
    assert linear_cka(x, x @ turn * 7 + 3) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka(x, y) == pytest.approx(
        _unbiased(x, y) / np.sqrt(_unbiased(x, x) * _unbiased(y, y)), rel=1e-5
    )
    assert linear_cka(x, np.zeros_like(y)) == 0.0
    with pytest.raises(BitsmithError, match="numbers of tokens"):
        cka_matrix([x[:5]], [y])


def _unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """The estimator of Song et al. 2012 by its formula."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    found = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
    return float(found / (n * (n - 3)))


def test_cka_of_what_is_unrelated_is_zero_with_few_tokens() -> None:
    random = np.random.default_rng(5)
    found = [linear_cka(*random.standard_normal((2, 24, 200))) for _ in range(20)]
    assert abs(np.mean(found)) < 0.02  # biased, it is 0.9
    x = random.standard_normal((24, 200))
    assert linear_cka(x, x + 0.1 * random.standard_normal(x.shape)) > 0.9


def test_proportional_layers_of_the_published_pair() -> None:
    assert proportional_layers(["a"] * 64, ["a"] * 36) == tuple(round(63 * i / 35) for i in range(36))
    hybrid = ["d", "d", "d", "a"]
    found = proportional_layers(hybrid * 4, hybrid * 2)
    assert [(hybrid * 4)[t] for t in found] == hybrid * 2
    assert proportional_layers(["a"], ["a"]) == (0,)


@given(seed=st.integers(0, 10_000), wide=st.integers(1, 7), narrow=st.integers(1, 5))
@settings(max_examples=60, derandomize=True)
def test_monotone_layers_are_the_best_of_all(seed: int, wide: int, narrow: int) -> None:
    random = np.random.default_rng(seed)
    score = random.random((wide, narrow))
    teacher, student = ([["a", "d"][k] for k in random.integers(0, 2, n)] for n in (wide, narrow))
    allowed = [
        m
        for m in combinations(range(wide), narrow)
        if all(teacher[t] == kind for t, kind in zip(m, student, strict=True))
    ]
    if not allowed:
        with pytest.raises(BitsmithError, match="no increasing choice"):
            monotone_layers(score, teacher, student)
        return
    best = max(allowed, key=lambda m: sum(score[t, i] for i, t in enumerate(m)))
    assert monotone_layers(score, teacher, student) == best


def test_of_equal_layers_the_earlier_is_taken() -> None:
    assert monotone_layers(np.ones((5, 3)), ["a"] * 5, ["a"] * 3) == (0, 1, 2)


# ---------------------------------------------------------------- heads

DIM = 4
TEACHER, STUDENT = Groups(12, 3), Groups(4, 2)


@pytest.fixture(scope="module")
def outputs() -> tuple[Rows, Rows]:
    """Head outputs (`N 12·4`, `N 4·4`): the student's heads 0 … 3 are the teacher's 10, 8, 1, 3."""
    random = np.random.default_rng(8)
    teacher = random.standard_normal((300, 12, DIM)) * random.lognormal(0, 0.5, (12, 1))
    student = teacher[:, [10, 8, 1, 3]] + 0.2 * random.standard_normal((300, 4, DIM))
    return teacher.reshape(300, -1), student.reshape(300, -1)


def _chosen(outputs: tuple[Rows, Rows]) -> tuple[HeadMap, PairMoments, Rows]:
    found = PairMoments.of(*outputs)
    powers = [np.diagonal(head_traces(part, DIM)) for part in (found.tt, found.ss)]
    likeness = head_likeness(found.ts, *powers, DIM)
    return selected_heads(likeness, TEACHER, STUDENT, DIM), found, likeness


def test_heads_are_found_group_by_group(outputs) -> None:
    chosen, found, likeness = _chosen(outputs)
    assert chosen.shared.tolist() == [2, 0]
    assert chosen.query.tolist() == [10, 8, 1, 3]
    blocks = found.ts.reshape(12, DIM, 4, DIM)
    assert likeness[10, 0] == pytest.approx(
        np.trace(blocks[10, :, 0])
        / np.sqrt(np.mean(outputs[0][:, 40:44] ** 2) * np.mean(outputs[1][:, :4] ** 2))
        / DIM
    )
    rows = np.arange(48)[:, None]
    np.testing.assert_array_equal(rows[chosen.rows("attn.q")][:, 0].reshape(4, 4)[:, 0], [40, 32, 4, 12])
    np.testing.assert_array_equal(chosen.rows("attn.k"), [8, 9, 10, 11, 0, 1, 2, 3])


def test_matching_is_the_best_of_all(outputs) -> None:
    likeness = np.random.default_rng(3).random((12, 4))
    groups, heads = matched_heads(likeness, TEACHER, STUDENT)

    def total(order: tuple[int, ...]) -> float:
        return sum(
            max(
                likeness[4 * t + a, 2 * s] + likeness[4 * t + b, 2 * s + 1]
                for a, b in permutations(range(4), 2)
            )
            for s, t in enumerate(order)
        )

    assert likeness[heads, range(4)].sum() == pytest.approx(max(map(total, permutations(range(3), 2))))
    assert (heads // 4 == np.repeat(groups, 2)).all()
    fixed, _ = matched_heads(likeness, TEACHER, STUDENT, order=[1, 2])
    assert fixed.tolist() == [1, 2]


def test_pruned_heads_tie_the_others_to_their_nearest() -> None:
    """Heads 2 and 3 are 0.5 and -2 times heads 1 and 0: tied, what o makes of them is as before."""
    random = np.random.default_rng(5)
    kept = random.standard_normal((200, 2, DIM))
    outputs = np.concatenate([kept, 0.5 * kept[:, 1:], -2 * kept[:, :1]], axis=1)
    teacher, student = Groups(4, 1), Groups(2, 1)
    traces = np.einsum("nad,nbd->ab", outputs, outputs) / 200
    chosen = selected_heads(np.eye(4)[:, :2], teacher, student, DIM)
    pruned = pruned_heads(chosen, np.eye(4)[:, :2], np.array([3.0, 4.0, 1.0, 2.0]), traces)
    assert pruned.query.tolist() == [0, 1]
    o_proj = random.standard_normal((7, 4 * DIM))
    before = outputs.reshape(200, -1) @ o_proj.T
    after = outputs[:, :2].reshape(200, -1) @ mixed_columns(o_proj, pruned.columns("attn.o")).T
    np.testing.assert_allclose(after, before, atol=1e-10)
    dropped = outputs[:, :2].reshape(200, -1) @ mixed_columns(o_proj, chosen.columns("attn.o")).T
    assert np.abs(dropped - before).max() > 1


def test_importance_is_what_a_head_adds(outputs) -> None:
    random = np.random.default_rng(6)
    o_proj, x = random.standard_normal((7, 48)), outputs[0]
    found = head_importance(o_proj, x.T @ x / 300, 12)
    parts = x.reshape(300, 12, DIM)
    expected = [
        np.mean(np.sum((parts[:, h] @ o_proj[:, 4 * h : 4 * h + 4].T) ** 2, axis=1)) for h in range(12)
    ]
    np.testing.assert_allclose(found, expected)


def test_moments_in_blocks_or_diagonals_serve_as_far_as_they_go(outputs) -> None:
    _, found, _ = _chosen(outputs)
    blocks = np.stack([found.tt[at : at + 16, at : at + 16] for at in range(0, 48, 16)])
    o_proj = np.random.default_rng(6).standard_normal((7, 48))
    np.testing.assert_allclose(
        head_importance(o_proj, blocks, 12), head_importance(o_proj, found.tt, 12), rtol=1e-12
    )
    whole, inside = head_traces(found.tt, DIM), head_traces(blocks, DIM)
    np.testing.assert_allclose(inside[4:8, 4:8], whole[4:8, 4:8])
    assert (inside[:4, 4:] == 0).all()
    diagonal = np.diagonal(found.tt)
    for kept in (found.tt, blocks, diagonal):
        np.testing.assert_allclose(diagonal_of(kept), diagonal)
        np.testing.assert_allclose(head_power(kept, DIM), np.diagonal(whole))
        np.testing.assert_allclose(np.diagonal(head_traces(kept, DIM)), np.diagonal(whole))
    for tie in (with_rest_tied, with_rest_solved):
        with pytest.raises(BitsmithError, match="needs all of it"):
            tie(AxisMap.selecting(range(4)), diagonal)
    with pytest.raises(BitsmithError, match="heads of 5"):
        head_power(blocks, 5)


def test_key_moments_come_from_weights_and_states(rows, moments) -> None:
    random = np.random.default_rng(14)
    theirs, ours = random.standard_normal((3 * DIM, WIDE)), random.standard_normal((2 * DIM, NARROW))
    found = key_cross(theirs, ours, moments.ts, np.array([2, 0]), DIM)
    keys = (rows[0] @ theirs.T).reshape(TOKENS, 3, DIM)[:, [2, 0]], (rows[1] @ ours.T).reshape(TOKENS, 2, DIM)
    np.testing.assert_allclose(found, np.einsum("nga,ngb->gab", *keys) / TOKENS)


def test_paired_heads_keep_the_dominant_directions(outputs) -> None:
    chosen, found, _ = _chosen(outputs)
    traces, cross = head_traces(found.tt, DIM), head_traces(found.ts, DIM)
    paired = paired_heads(chosen, traces, cross)
    for s, t in enumerate(chosen.shared):
        block = paired.query[TEACHER.of(int(t)), STUDENT.of(s)]
        np.testing.assert_allclose(block.T @ block, np.eye(2), atol=1e-12)
        values = np.linalg.eigvalsh(traces[TEACHER.of(int(t)), TEACHER.of(int(t))])
        assert np.trace(block.T @ traces[TEACHER.of(int(t)), TEACHER.of(int(t))] @ block) == pytest.approx(
            values[-2:].sum()
        )
    assert np.count_nonzero(paired.query) == 16
    rows = np.asarray(paired.rows("attn.q").T @ np.arange(48.0)[:, None])
    np.testing.assert_allclose(rows[1] - rows[0], paired.query[:, 0].sum())  # channel c with channel c


def test_turned_values_undo_a_rotation(outputs) -> None:
    teacher, student = outputs
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((3, DIM, DIM)))[0]
    turned = np.einsum("nghd,ged->nghe", teacher.reshape(300, 3, 4, DIM), turn).reshape(300, -1)
    found = PairMoments.of(turned, student)
    powers = [np.diagonal(head_traces(part, DIM)) for part in (found.tt, found.ss)]
    chosen = selected_heads(head_likeness(found.ts, *powers, DIM, turn=True), TEACHER, STUDENT, DIM)
    assert chosen.query.tolist() == [10, 8, 1, 3]
    turns = with_turned_values(chosen, found.ts).value_turns
    assert turns is not None
    np.testing.assert_allclose(turns, turn[[2, 0]], atol=0.05)
    with pytest.raises(BitsmithError, match="gate"):
        with_turned_values(
            selected_heads(np.eye(12)[:, :4], TEACHER, STUDENT, DIM, gated=True),
            found.ts,
        )


@pytest.mark.parametrize("rotary", [8, 4])
def test_query_turns_meet_the_students_keys_and_rope_keeps_them(rotary: int) -> None:
    random = np.random.default_rng(9)
    dim, half = 8, rotary // 2

    def rope(angles: Rows) -> Rows:
        turn = np.eye(dim)
        for c, angle in enumerate(angles):
            turn[np.ix_([c, c + half], [c, c + half])] = [
                [np.cos(angle), -np.sin(angle)],
                [np.sin(angle), np.cos(angle)],
            ]
        return turn

    turn = rope(random.uniform(-3, 3, half))
    turn[rotary:, rotary:] = np.linalg.qr(random.standard_normal((dim - rotary, dim - rotary)))[0]
    keys = random.standard_normal((500, dim))
    theirs = keys @ turn.T
    one = selected_heads(np.eye(2)[:, :2], Groups(2, 1), Groups(2, 1), dim)
    found = with_frozen_kv(one, (theirs.T @ keys / 500)[None], rotary)
    assert found.query_turns is not None
    np.testing.assert_allclose(found.query_turns[0], turn, atol=1e-9 if rotary < dim else 0.05)
    position = rope(random.uniform(-3, 3, half))
    np.testing.assert_allclose(position @ found.query_turns[0], found.query_turns[0] @ position, atol=1e-12)
    queries = random.standard_normal((2 * dim, 5))
    rows = found.rows("attn.q").T @ queries
    np.testing.assert_allclose(rows[:dim], found.query_turns[0].T @ queries[:dim], atol=1e-12)
    assert (found.share("attn.k", np.ones(1)) == 0).all()


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BitsmithError, match="do not divide"):
        Groups(9, 2)
    for teacher in (Groups(4, 1), Groups(3, 3)):
        with pytest.raises(BitsmithError, match="do not hold"):
            matched_heads(np.ones((teacher.heads, 4)), teacher, STUDENT)
    with pytest.raises(BitsmithError, match="heads of 5"):
        head_traces(np.ones((12, 12)), 5)


# ---------------------------------------------------------------- neurons


@pytest.fixture(scope="module")
def neurons() -> tuple[Rows, Rows]:
    """Activations (`N 20`, `N 8`): student neuron j is the teacher's `(3 j) % 20`, noisy and scaled."""
    random = np.random.default_rng(11)
    teacher = random.standard_normal((500, 20)) @ np.linalg.qr(random.standard_normal((20, 20)))[0]
    teacher[:, 2] = 0.8 * teacher[:, 0] + 0.1 * teacher[:, 2]
    scale = random.lognormal(0, 1, 8)
    return teacher, teacher[:, 3 * np.arange(8) % 20] * scale + 0.1 * random.standard_normal((500, 8))


def test_neurons_are_matched_by_what_they_do(neurons) -> None:
    found = PairMoments.of(*neurons)
    chosen = matched_neurons(found.ts, np.diagonal(found.tt), np.diagonal(found.ss))
    assert chosen.producing.tolist() == [3 * j % 20 for j in range(8)]
    assert chosen.reading is chosen.producing
    power = np.diagonal(found.tt)
    strongest = strongest_neurons(found.ts, power, np.diagonal(found.ss), importance=np.arange(20.0))
    assert sorted(strongest.producing) == list(range(12, 20))
    with pytest.raises(BitsmithError, match="cannot fill"):
        matched_neurons(found.ts[:5], power[:5], np.diagonal(found.ss))


def test_what_is_left_out_is_folded_into_down(neurons) -> None:
    teacher, _ = neurons
    found = PairMoments.of(*neurons)
    chosen = matched_neurons(found.ts, np.diagonal(found.tt), np.diagonal(found.ss))
    down = np.random.default_rng(12).standard_normal((6, 20))
    before = teacher @ down.T

    def error(made: AxisMap) -> float:
        after = teacher[:, made.producing] @ mixed_columns(down, made.reading).T
        return float(np.square(after - before).sum())

    solved = with_rest_solved(chosen, found.tt, ridge=1e-12)
    best = np.linalg.lstsq(teacher[:, chosen.producing], before, rcond=None)[1].sum()
    assert error(solved) == pytest.approx(best, rel=1e-6)
    tied = with_rest_tied(chosen, found.tt)
    assert error(solved) < error(tied) < error(chosen)
    factor = tied.reading.toarray()[2, 0]  # neuron 2 mostly follows neuron 0, the student's first
    assert factor == pytest.approx(found.tt[0, 2] / found.tt[0, 0])


def test_a_split_neuron_is_put_together_again() -> None:
    """A teacher's neuron twice, each with half the column of down: tied, the column is whole."""
    random = np.random.default_rng(13)
    own = random.standard_normal((300, 6))
    teacher = np.concatenate([own, own[:, 2:3]], axis=1)
    whole = random.standard_normal((5, 6))
    down = np.concatenate([whole, whole[:, 2:3] / 2], axis=1)
    down[:, 2] /= 2
    found = PairMoments.of(teacher, own)
    chosen = matched_neurons(found.ts, np.diagonal(found.tt), np.diagonal(found.ss))
    tied = with_rest_tied(chosen, found.tt)
    np.testing.assert_allclose(mixed_columns(down, tied.reading), whole, atol=1e-12)


def test_greedy_matching_takes_the_best_pairs_first() -> None:
    score = np.array([[7.0, 9.0, 0.0], [4.0, 8.0, 1.0], [0.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
    assert greedy_matches(score).tolist() == [1, 0, 2]
    assert best_matches(score).tolist() == [0, 1, 2]
    drawn = np.random.default_rng(2).random((9, 6))
    left, pairs = drawn.copy(), {}
    for _ in range(6):
        row, column = np.unravel_index(left.argmax(), left.shape)
        pairs[column] = row
        left[row], left[:, column] = -1, -1
    assert greedy_matches(drawn).tolist() == [pairs[column] for column in range(6)]
    order = np.random.default_rng(1).permutation(40)[:25]
    shuffled = np.eye(40)[:, order]
    assert greedy_matches(shuffled).tolist() == best_matches(shuffled).tolist() == order.tolist()
    with pytest.raises(BitsmithError, match="not finite"):
        best_matches(np.full((3, 2), np.nan))


def test_channels_go_with_their_blocks() -> None:
    assert by_channel(np.array([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
    mixing = np.array([[1.0], [0.0], [2.0]])
    np.testing.assert_array_equal(by_channel(mixing, 2).toarray(), np.kron(mixing, np.eye(2)))
