"""The seed's experiments on merging a teacher into a student, and the rows of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from bitsmith.errors import BitsmithError, printable
from bitsmith.lab.merge_cases import (
    PARTS,
    RULE,
    AnyCase,
    Distilled,
    Merged,
    Original,
    Shares,
    Sizes,
    Source,
    Task,
    Turned,
    Where,
    everywhere,
)
from bitsmith.lab.merge_turns import Span
from bitsmith.run.merge_recipe import FFNS, HEADS, Basis, MergeRecipe

WORKING = 0.05
"""A share at which a merge still writes sentences; at 1 nothing of the student is left to hide behind."""
BUDGET = 24
USUAL = (RULE, everywhere(WORKING), everywhere(0.5), everywhere(1.0))
DECIDED = (
    Shares(decided=True),
    Shares("all", 0.5, decided=True),
    Shares(decided=True, budget=BUDGET),
)
DATA_TOKENS = (1_000, 10_000, 50_000, 140_000)
SWEEP = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LAYER_SWEEP = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
ONCE = "once over the same tokens"
HEAD_SWEEP = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
SPARSE_CHUNKS = (2, 8, 32)
BLENDS = (0.3, 0.5, 0.7)

HEAD_SHARE = 0.3
SHARED_TOKENS = 50_000
"""Of each of two tasks that are held against each other, at most."""

SEED = MergeRecipe(head="map")
SOLVED = MergeRecipe(head="solve")


@dataclass(frozen=True)
class Experiment:
    """One of the seed's experiments: the question it puts, and its rows."""

    words: str
    rows: Callable[[Sizes], Sequence[AnyCase]]
    needs_other: bool = False


def _under(label: str, shares: Sequence[Shares], like: Merged) -> list[Merged]:
    """Return a merge under several shares."""
    return [replace(like, label=f"{label}, {share.words}", shares=share) for share in shares]


def _recipes(named: Mapping[str, MergeRecipe], shares: Sequence[Shares] = USUAL) -> list[AnyCase]:
    return [
        row for label, recipe in named.items() for row in _under(label, shares, Merged("", recipe=recipe))
    ]


def _baselines(sizes: Sizes) -> list[AnyCase]:
    del sizes
    svd, weights = replace(SEED, map="svd"), replace(SEED, activations=False)
    return [
        Original("student"),
        Original("teacher", side="teacher"),
        Merged("merge, α by rule"),
        *(Merged(f"merge, {shares.words}", shares=shares) for shares in DECIDED),
        Merged("plain SVD, α by rule", recipe=svd),
        Merged("plain SVD, α 0.5", recipe=svd, shares=everywhere(0.5)),
        Merged("uniform α 0.5", shares=everywhere(0.5)),
        Merged("no activation information, α by rule", recipe=weights),
        Merged("no activation information, α 0.5", recipe=weights, shares=everywhere(0.5)),
        Distilled(f"distillation by back-propagation, {ONCE}"),
    ]


def _ablations(sizes: Sizes) -> list[AnyCase]:
    del sizes
    named = {
        "all on (two tiers, Procrustes, activations)": SEED,
        "two tiers off (one Procrustes)": replace(SEED, map="joint"),
        "Procrustes off (plain SVD)": replace(SEED, map="svd"),
        "activations off (weights alone)": replace(SEED, activations=False),
        "a map for each layer": replace(SEED, basis="layer"),
        "no norm correction": replace(SEED, gains=False),
        "embedding and head left as they are": replace(SEED, ends=False),
    }
    uniform: AnyCase = Merged("layer-specific α off, the rule's mean everywhere", shares=Shares("mean"))
    neurons = {f"FFN: {ffn}": replace(SEED, ffn=ffn) for ffn in FFNS if ffn != SEED.ffn}
    return [*_recipes(named), uniform, *_recipes(neurons)]


def _rivals(sizes: Sizes) -> list[AnyCase]:
    del sizes
    named = {
        "two tiers (the seed's)": SEED,
        "best subspace (cross)": replace(SEED, map="cross"),
        "canonical correlations (cca)": replace(SEED, map="cca"),
        "least squares (ridge)": replace(SEED, map="ridge"),
        "residual superposed at random": replace(SEED, map="random-fold"),
        "residual superposed where rarely active at once": replace(SEED, map="sparse-fold"),
    }
    each = {f"{label}, a map for each layer": replace(one, basis="layer") for label, one in named.items()}
    return [*_recipes(named), *_recipes(each)]


def _data_sizes(sizes: Sizes) -> list[int | None]:
    """Return the sizes below what is used of the text, None for that itself."""
    return [n for n in DATA_TOKENS if 2 * sizes.ctx_tokens <= n < sizes.tokens] + [None]


def _data_efficiency(sizes: Sizes) -> list[AnyCase]:
    rows: list[AnyCase] = []
    for tokens in _data_sizes(sizes):
        source, said = Source("text", tokens), f"{tokens or sizes.tokens:,} tokens"
        rows += _under(said, USUAL, Merged("", source=source))
        rows.append(Distilled(f"{said}, distillation, {ONCE}", series="distillation", source=source))
    return rows


def _tasks(sizes: Sizes) -> tuple[Source, Source]:
    """Return both tasks' texts, as much of one as of the other."""
    shared = min(SHARED_TOKENS, sizes.tokens, sizes.other_tokens)
    return Source("text", shared, fixed=True), Source("other", shared, fixed=True)


def _transfer(sizes: Sizes) -> list[AnyCase]:
    own, other = _tasks(sizes)
    shares, rows = (RULE, everywhere(WORKING), everywhere(0.5)), list[AnyCase]()
    judged: tuple[Task, Task] = ("held", "other_held")
    for on, name in zip(judged, ("the task", "the other task"), strict=True):
        rows.append(Original(f"student, judged on {name}", judged=on))
        rows.append(Original(f"teacher, judged on {name}", judged=on, side="teacher"))
        for source, found in ((own, "the task"), (other, "the other task")):
            label = f"found on {found}, judged on {name}"
            rows += _under(label, shares, Merged("", judged=on, source=source))
    return rows


def _blend(sizes: Sizes) -> list[AnyCase]:
    own, other = _tasks(sizes)
    rows = list[AnyCase]()
    judged: dict[Task, str] = {"held": "the task", "other_held": "the other task", "mixed": "both by turns"}
    for on, name in judged.items():
        rows.append(Original(f"student, judged on {name}", judged=on))
        for weight in (0.0, *BLENDS, 1.0):
            blend = ((other, weight),) if 0 < weight < 1 else ()
            like = Merged("", judged=on, source=other if weight == 1 else own, blend=blend)
            label = f"{1 - weight:g} of the task's map, {weight:g} of the other's, judged on {name}"
            rows += _under(label, (RULE, everywhere(WORKING), everywhere(0.5)), like)
    return rows


def _layers(sizes: Sizes) -> list[AnyCase]:
    rows: list[AnyCase] = []
    parts: dict[Where, str] = {"layer": "mixer and FFN", "mixer": "mixer", "ffn": "FFN"}
    for layer in range(sizes.layers):
        for where, part in parts.items():
            for alpha in (WORKING, 0.5, 1.0):
                said = f"layer {layer}, {part}"
                shares = Shares(where, alpha, layer)
                rows.append(Merged(f"{said}, {shares.words}", series=said, shares=shares))
    ends = [Shares("ends", alpha) for alpha in (WORKING, 0.5, 1.0)]
    said = "embedding and head"
    return rows + [Merged(f"{said}, {one.words}", series=said, shares=one) for one in ends]


def _sweep(sizes: Sizes) -> list[AnyCase]:
    everything = [("everywhere", everywhere(alpha)) for alpha in SWEEP]
    layers = [
        (f"layer {layer}", Shares("layer", alpha, layer))
        for layer in range(sizes.layers)
        for alpha in LAYER_SWEEP
    ]
    return [
        Merged(f"{said}, {shares.words}", series=said, shares=shares) for said, shares in everything + layers
    ]


def _head(sizes: Sizes) -> list[AnyCase]:
    """Return heads alone: the teacher's mapped, and solved for from texts of several sizes and tasks."""
    own, other = _tasks(sizes)
    rows: list[AnyCase] = [Original("student")]
    for said, recipe in (("mapped", SEED), ("solved for", SOLVED)):
        shares = [Shares("head", alpha) for alpha in HEAD_SWEEP]
        rows += [Merged(f"{said}, {one.words}", series=said, recipe=recipe, shares=one) for one in shares]
    like = Merged("", recipe=SOLVED, shares=Shares("head", HEAD_SHARE))
    for tokens in _data_sizes(sizes):
        said = f"solved for on {tokens or sizes.tokens:,} tokens, {like.shares.words}"
        rows.append(replace(like, label=said, series="by tokens", source=Source("text", tokens)))
    rows.append(Original("student, judged on the other task", judged="other_held"))
    for source, said in ((own, "the task"), (other, "the other task")):
        label = f"solved for on {said}, judged on the other task, {like.shares.words}"
        rows.append(replace(like, label=label, judged="other_held", source=source))
    decided = Shares(decided=True)
    rows.append(Merged(f"merge with its head solved for, {decided.words}", recipe=SOLVED, shares=decided))
    return rows


def _sparse_sizes(sizes: Sizes) -> list[int]:
    return [n for n in (chunks * sizes.ctx_tokens for chunks in SPARSE_CHUNKS) if PARTS * n <= sizes.tokens]


def _sparse(sizes: Sizes) -> list[AnyCase]:
    rows: list[AnyCase] = []
    shares = (RULE, everywhere(WORKING))
    bases: dict[Basis, str] = {"layer": "a map for each layer", "global": "one map"}
    for basis, said in bases.items():
        recipe = replace(SEED, basis=basis)
        for tokens in (*_sparse_sizes(sizes), None):
            for part in range(1 if tokens is None else PARTS):
                like = Merged("", recipe=recipe, source=Source("text", tokens, part), diagnosed=True)
                label = f"{said}, {tokens or sizes.tokens:,} tokens, part {part + 1}"
                rows += [
                    replace(row, series=f"{said}, part {part + 1}, {row.shares.words}")
                    for row in _under(label, shares, like)
                ]
    return rows


def _gqa(sizes: Sizes) -> list[AnyCase]:
    del sizes
    words = {
        "match": "heads chosen",
        "pair": "heads paired by block SVD",
        "prune": "heads pruned by importance, the others tied",
        "turn": "a rotation in each KV group",
        "frozen-kv": "the student's K and V, queries turned to them",
        "regress": "heads mixed by least squares",
    }
    rows: list[AnyCase] = []
    for heads in HEADS:
        like = Merged("", recipe=replace(SEED, heads=heads), diagnosed=True)
        rows += _under(words.get(heads, heads), USUAL, like)
    return rows


def _rotations(sizes: Sizes) -> list[AnyCase]:
    spans: dict[Span, str] = {
        "all heads": "one rotation of all heads",
        "KV group": "one of each KV group's heads",
        "value channels": "one of each KV group's value channels",
    }
    return [
        Turned(f"{said}, {tokens:,} tokens", series=said, span=span, tokens=tokens)
        for tokens in _sparse_sizes(sizes)
        for span, said in spans.items()
    ]


EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "baselines": Experiment("Does the merge beat its baselines, and distillation?", _baselines),
        "ablations": Experiment("What does each part of the method add?", _ablations),
        "rivals": Experiment("Is another map of the residual stream better?", _rivals),
        "data-efficiency": Experiment("How much text does the map need?", _data_efficiency),
        "task-transfer": Experiment(
            "Does a map found on one task serve another?", _transfer, needs_other=True
        ),
        "blend": Experiment("Does a geodesic blend of two tasks' maps serve both?", _blend, needs_other=True),
        "layer-sensitivity": Experiment("Which layers gain from the teacher, or suffer?", _layers),
        "alpha-sweep": Experiment("How does the text's perplexity follow the teacher's share?", _sweep),
        "head": Experiment(
            "Does a head that is solved for, from the teacher's logits, help where maps do not?",
            _head,
            needs_other=True,
        ),
        "sparse-data": Experiment("From how little text do T and the rule's α come out alike?", _sparse),
        "gqa": Experiment(
            "Which way of bringing the teacher's heads to the student's KV groups is best?", _gqa
        ),
        "gqa-rotations": Experiment(
            "Is a rotation for each KV group found from less text than one of all heads?", _rotations
        ),
    }
)
"""In the order they are run."""


def chosen_experiments(only: Sequence[str] | None) -> dict[str, Experiment]:
    """Return the experiments called `only`, each once, in that order; all of them for None.

    Raises BitsmithError that lists the known names.
    """
    unknown = [name for name in only or () if name not in EXPERIMENTS]
    if unknown:
        raise BitsmithError(f"unknown experiment {printable(unknown[0])!r}; known: {' '.join(EXPERIMENTS)}")
    return {name: EXPERIMENTS[name] for name in (EXPERIMENTS if only is None else only)}
