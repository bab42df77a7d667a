"""The plan of a merge from stored activations: exact where the teacher holds the student, by every option."""

import argparse
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.lab.embedded import Embedding, Sizes, embed_student, spread_layers
from bitsmith.numerics.divergence import Estimate
from bitsmith.passes.merge_fold import LayerAlpha
from bitsmith.passes.transform import Model, model_of
from bitsmith.run.merge_alpha import LayerFacts, PlaceFacts, cosine_of, layer_share, share_of
from bitsmith.run.merge_plan import MergePlan, merge_plan
from bitsmith.run.merge_recipe import Alphas, MergeRecipe
from bitsmith.run.paired import paired
from bitsmith.store import open_checkpoint
from bitsmith.store.paired import Paired, open_paired
from merge_pairs import seen
from paired_models import DELTA, DENSE, FULL, HYBRID, SMALL, write_model

EXACT = 1e-4
CTX, TOKENS = 70, 1400
TEXT = Path(argparse.__file__).read_text()[:20_000]  # with more kinds of tokens than channels
STUDENT = SMALL | {"num_attention_heads": 4}
ONE = MergeRecipe(alpha=1.0)
FEW = (
    replace(ONE, map="cca"),
    replace(ONE, basis="layer"),
    replace(ONE, heads="frozen-kv"),
    replace(ONE, ffn="solve"),
)
MORE = (
    *(replace(ONE, map=name) for name in ("joint", "svd", "cross")),
    replace(ONE, trunk=5),
    replace(ONE, basis="layer", map="ridge"),
    *(replace(ONE, heads=name) for name in ("prune", "turn")),
    *(replace(ONE, ffn=name) for name in ("strongest", "tie")),
    MergeRecipe(),
)
OPTIONS = [*FEW, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)]
REGRESS = MergeRecipe(alpha=1.0, heads="regress", ffn="regress")


class Case:
    """A student, a teacher that holds it, and their paired activations, read back from the disk."""

    def __init__(self, folder: Path, kind: str) -> None:
        layers = {"layer_types": [DELTA, FULL]} if kind == "qwen3.5" else {"num_hidden_layers": 2}
        sizes = HYBRID | {"linear_num_value_heads": 4} if kind == "qwen3.5" else DENSE
        sizes = sizes | {"tie_word_embeddings": kind == "tied"}
        wide = {"k_heads": 3, "v_heads": 9} if kind == "qwen3.5" else {}
        self.folder = folder
        self.paths = folder / "teacher", write_model(folder / "student", 2, **sizes, **STUDENT, **layers)
        self.embedding: Embedding = embed_student(
            self.paths[1],
            self.paths[0],
            Sizes(48, spread_layers(2, 4), ffn=72, heads=9, kv_heads=3, **wide),
            seed=1,
        )
        self.teacher, self.student = (model_of(open_checkpoint(path)) for path in self.paths)
        self.tokens = np.random.default_rng(1).integers(4, 4000, (1, 40))
        self.logits = seen(self.student.checkpoint, self.tokens).logits
        self.paired = self.pairing("paired")

    def pairing(self, name: str, said: str = TEXT, **options: Any) -> Paired:
        text = self.folder / f"{name}.txt"
        text.write_text(said)
        out = self.folder / name
        paired(*self.paths, text, out, tokens=TOKENS, ctx_tokens=CTX, samples=140, **options)
        return open_paired(out)

    def plan(self, recipe: MergeRecipe, **options: Any) -> MergePlan:
        return merge_plan(self.paired, self.teacher, self.student, recipe, **options)

    def error(self, view: Any) -> float:
        found = seen(view, self.tokens).logits
        return float(np.abs(found - self.logits).max())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda kind: Case(tmp_path_factory.mktemp(kind), kind))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_an_embedded_student_is_recovered_from_what_is_stored(kind: str, case: Any) -> None:
    found = case(kind)
    plan = found.plan(ONE)
    assert plan.layer_map == found.embedding.layers
    assert found.error(plan.view()) <= EXACT
    assert plan.layers[0].before is plan.final is plan.embedding  # one map for all
    assert np.abs(np.array([one.gains for one in plan.layers.values()]) - 1).max() < 1e-6
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & set(found.student.tensors)
    view, stored = plan.view(), found.student.checkpoint
    assert not any(view[name] is stored[name] for name in ends)
    kept = found.plan(replace(ONE, ends=False)).view()
    assert all(kept[name] is stored[name] for name in ends)
    assert found.error(kept) <= EXACT


@pytest.mark.parametrize("recipe", OPTIONS, ids=lambda one: f"{one.map}-{one.basis}-{one.heads}-{one.ffn}")
def test_every_option_recovers_what_is_there(recipe: MergeRecipe, case: Any) -> None:
    found = case("qwen3")
    plan = found.plan(recipe)
    assert found.error(plan.view()) <= EXACT
    assert json.loads(json.dumps(plan.to_json(), allow_nan=False))["recipe"]["map"] == recipe.map


@pytest.mark.slow
def test_deltanet_layers_take_what_applies(case: Any) -> None:
    found = case("qwen3.5")
    for heads in ("prune", "frozen-kv"):
        assert found.error(found.plan(replace(ONE, heads=heads)).view()) <= EXACT
    with pytest.raises(BitsmithError, match="gated attention cannot be turned"):
        found.plan(replace(ONE, heads="turn"))


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3.5", marks=pytest.mark.slow)])
def test_regressing_recovers_what_the_text_shows(kind: str, case: Any) -> None:
    found = case(kind)
    tokens = found.paired.tokens()[0][:1]
    expected, got = (
        seen(view, tokens).logits for view in (found.student.checkpoint, found.plan(REGRESS).view())
    )
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


def test_paired_heads_are_blocks_of_their_groups(case: Any) -> None:
    found = case("qwen3")
    for merge in found.plan(replace(ONE, heads="pair")).layers.values():
        mixing, shared = merge.heads.query, merge.heads.shared
        np.testing.assert_allclose(mixing.T @ mixing, np.eye(4), atol=1e-12)
        assert np.array_equal(np.flatnonzero(np.abs(mixing[:, 0]) > 0) // 3, [shared[0]] * 3)


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3.5", marks=pytest.mark.slow)])
def test_regressing_changes_what_writes_alone(kind: str, case: Any) -> None:
    found = case(kind)
    view = found.plan(MergeRecipe(alpha=0.4, heads="regress", ffn="regress", ends=False)).view()
    stored = found.student.checkpoint
    changed = {name.split("layers.")[1][2:] for name in stored if view[name] is not stored[name]}
    writers = {"self_attn.o_proj.weight", "mlp.down_proj.weight", "linear_attn.out_proj.weight"}
    assert changed == (writers if kind == "qwen3.5" else writers - {"linear_attn.out_proj.weight"})


def test_the_rule_trusts_what_it_has_seen(case: Any, tmp_path: Path) -> None:
    found = case("qwen3")
    plan = found.plan(MergeRecipe(alpha_max=0.3))
    shares = [share for one in plan.alphas.layers for share in (*one.mixer, one.ffn)]
    assert np.allclose([*shares, plan.alphas.embedding, plan.alphas.head], 0.3, atol=1e-4)
    assert all(one.before.certainty > 0.999 for one in plan.facts)
    stranger = write_model(tmp_path / "stranger", 9, **DENSE, **STUDENT, num_hidden_layers=2)
    (text := tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "paired"
    other = paired(found.paths[0], stranger, text, out, tokens=TOKENS, ctx_tokens=CTX, samples=140)
    model = model_of(open_checkpoint(stranger))
    unlike = merge_plan(other, found.teacher, model)
    assert unlike.alphas.is_zero
    view = unlike.view()
    assert all(view[name] is model.checkpoint[name] for name in model.checkpoint)
    with pytest.raises(BitsmithError, match=r"was made of .*student, which is not .*stranger"):
        merge_plan(found.paired, found.teacher, model)


def test_shares_are_those_of_the_rule_by_its_formula() -> None:
    def place(low: float | None, kept: float) -> PlaceFacts:
        return PlaceFacts(Estimate(0.9, low, None), kept)

    said = {(0.65, 0.99): 0.25, (0.9, 0.95): 0.5, (0.5, 1.0): 0.0, (-1.0, 1.0): 0.0, (0.9, 0.949): 0.0}
    for (low, kept), share in said.items():
        assert share_of([place(low, kept)], 0.5) == pytest.approx(share)
    assert share_of([place(None, 1.0)], 0.5) == 0.0
    assert share_of([place(0.9, 1.0), place(0.65, 1.0)], 0.5) == pytest.approx(0.25)  # the worst place
    found = layer_share(LayerFacts(place(0.9, 1.0), place(0.9, 1.0), (1.0, 0.5, -0.2), 0.4), 0.5)
    assert found == LayerAlpha((0.5, 0.25, 0.0), 0.2)


def test_certainty_is_of_pieces_that_are_drawn_together(case: Any) -> None:
    found = case("qwen3")
    mapping = found.plan(ONE).final
    random = np.random.default_rng(0)
    states = random.standard_normal((6, 20, 48))
    aim = states @ mapping.forward
    noisy = aim + aim.std() * random.standard_normal(aim.shape)
    noisy[0] = -noisy[0]  # one piece of six goes the other way
    estimate = cosine_of(mapping, states, noisy)
    flat = cosine_of(mapping, states.reshape(120, 1, 48), noisy.reshape(120, 1, 32))
    assert estimate.value == pytest.approx(flat.value)
    assert estimate.low < flat.low < estimate.value  # tokens of a piece are no witnesses of their own
    assert cosine_of(mapping, states[:1], noisy[:1]).low is None


def test_a_number_is_everyones_share(case: Any) -> None:
    found = case("qwen3.5")
    alphas = found.plan(MergeRecipe(alpha=0.3)).alphas
    assert alphas == Alphas((LayerAlpha((0.3,) * 2, 0.3), LayerAlpha((0.3,) * 2, 0.3)), 0.3, 0.3)
    with pytest.raises(BitsmithError, match="shares of 1 layers, the student has 2"):
        found.plan(ONE).view(Alphas((LayerAlpha(0.1, 0.1),)))


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3.5", marks=pytest.mark.slow)])
def test_weights_alone_find_a_teacher_of_the_same_depth(kind: str, case: Any, tmp_path: Path) -> None:
    """Nothing of the text is used: what was paired may be anything."""
    found, wide = case(kind), {"k_heads": 3, "v_heads": 9} if kind == "qwen3.5" else {}
    sizes = Sizes(48, ffn=72, heads=9, kv_heads=3, **wide)
    embed_student(found.paths[1], tmp_path / kind, sizes, seed=3)
    teacher = model_of(open_checkpoint(tmp_path / kind))
    plan = merge_plan(found.paired, teacher, found.student, replace(ONE, activations=False))
    assert plan.layer_map == (0, 1)
    assert found.error(plan.view()) <= EXACT
    refused = {"ffn": ("solve", "tie", "regress"), "heads": ("regress",)}
    for key, names in refused.items():
        for name in names:
            with pytest.raises(BitsmithError, match="cannot do without"):
                found.plan(replace(ONE, activations=False, **{key: name}))


@pytest.mark.parametrize("kind", ["tied", "qwen3.5"])
def test_a_head_that_is_solved_for_is_the_students_own_tensor(kind: str, case: Any) -> None:
    found = case(kind)
    plan = found.plan(replace(ONE, head="solve"))
    view = plan.view()
    assert view.config["tie_word_embeddings"] is False
    assert view["lm_head.weight"].shape == found.student.tensors["model.embed_tokens.weight"][1].shape
    assert found.error(view) <= EXACT
    assert plan.head_fit is not None and plan.head_fit.low == pytest.approx(1, abs=1e-4)
    ruled = found.plan(MergeRecipe(head="solve", alpha_max=0.5))
    assert ruled.alphas.head == pytest.approx(0.5 * plan.head_fit.low)
    alone = plan.view(plan.alphas.head_alone)
    assert found.error(alone) <= EXACT
    assert (
        alone["model.layers.0.mlp.up_proj.weight"]
        is found.student.checkpoint["model.layers.0.mlp.up_proj.weight"]
    )


def test_a_head_is_solved_for_where_the_student_has_its_own(case: Any) -> None:
    for kind in ("qwen3", "tied"):
        found = case(kind)
        assert found.student.arch.tied == (kind == "tied")
        assert (found.plan(MergeRecipe()).head_fit is None) == (kind == "tied")
        assert found.plan(MergeRecipe(head="map")).head_fit is None
    with pytest.raises(BitsmithError, match="solved for from activations"):
        MergeRecipe(head="solve", activations=False)


@pytest.mark.slow
def test_two_texts_are_blended_along_the_geodesic(case: Any) -> None:
    found = case("qwen3")
    prose = Path(json.__file__).read_text()
    other = found.pairing("prose", prose, layer_map=found.paired.layer_map)
    plan = found.plan(ONE, blend=[(other, 0.25)])
    assert plan.final.method == "geodesic"
    assert found.error(plan.view()) <= EXACT  # both texts have the same map
    assert found.plan(ONE, blend=[(other, 0.25), (other, 0.25)]).final.method == "blended"
    oblique = found.plan(replace(ONE, map="cca"), blend=[(other, 0.5)])
    assert oblique.final.method == "whitened mean" and found.error(oblique.view()) <= EXACT
    for shares in ((0.0,), (1.0,), (0.6, 0.4)):
        with pytest.raises(BitsmithError, match="expected each above 0, below 1 together"):
            found.plan(ONE, blend=[(other, share) for share in shares])
    with pytest.raises(BitsmithError, match="nothing to blend without"):
        found.plan(replace(ONE, activations=False), blend=[(other, 0.5)])
    elsewhere = found.pairing("elsewhere", layer_map=[0, 2])
    with pytest.raises(BitsmithError, match=r"pairs layers \[0, 2\], .*pair both with the same layers"):
        found.plan(ONE, blend=[(elsewhere, 0.5)])


def test_folds_superpose_and_are_drawn_by_their_seed(case: Any) -> None:
    found = case("qwen3")
    maps = [found.plan(replace(ONE, map="random-fold", seed=seed)).final for seed in (0, 0, 1)]
    np.testing.assert_array_equal(maps[0].forward, maps[1].forward)
    assert np.abs(maps[0].forward - maps[2].forward).max() > 1e-3
    for one in (maps[0], found.plan(replace(ONE, map="sparse-fold")).final):
        gram = one.forward.T @ one.forward
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(32), atol=1e-10 * gram[0, 0])
    with pytest.raises(BitsmithError, match=r"trunk has 32 dimensions, expected 1 … 31"):
        found.plan(replace(ONE, trunk=32))


@pytest.mark.slow
def test_without_norm_gains_a_longer_teacher_is_not_met(case: Any, tmp_path: Path) -> None:
    found = case("qwen3")
    embed_student(found.paths[1], tmp_path / "teacher", replace(Sizes(48), scale=3.0), seed=3)
    (text := tmp_path / "text.txt").write_text(TEXT)
    paths = tmp_path / "teacher", found.paths[1]
    other = paired(*paths, text, tmp_path / "paired", tokens=TOKENS, ctx_tokens=CTX, samples=140)
    teacher: Model = model_of(open_checkpoint(paths[0]))
    errors = [
        found.error(merge_plan(other, teacher, found.student, replace(ONE, gains=gains)).view())
        for gains in (True, False)
    ]
    assert errors[0] <= 10 * EXACT < 100 * EXACT < errors[1]


@pytest.mark.slow
def test_moments_kept_as_diagonals_are_said_to_be_too_little(case: Any) -> None:
    found = case("qwen3")
    narrow = found.pairing("narrow", widest_square=35, layer_map=found.paired.layer_map)
    for recipe, said in (
        (replace(ONE, ffn="solve"), "needs all of it"),
        (replace(ONE, ffn="tie"), "needs all of it"),
        (replace(ONE, ffn="regress"), "kept as a diagonal"),
    ):
        with pytest.raises(BitsmithError, match=said):
            merge_plan(narrow, found.teacher, found.student, recipe)
    blocks = merge_plan(narrow, found.teacher, found.student, replace(ONE, heads="regress"))
    assert blocks.layers[0].heads.method == "heads.regress"
