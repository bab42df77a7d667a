"""The plan of a merge: which map, heads, neurons and shares each layer of the student takes, and from where.

A plan reads no text and runs no model: what it needs was kept by `paired`, or lies in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import Estimate
from bitsmith.passes.merge_fold import EndsMerge, LayerAlpha, LayerMerge, MergedView, merged_view
from bitsmith.passes.merge_inner import ffn_map, group_likeness, mixer_map, neuron_likeness
from bitsmith.passes.merge_maps import ResidualMap, norm_gain, solved_reading, transition_cost, variance_kept
from bitsmith.passes.transform import Model
from bitsmith.run.merge_alpha import (
    LayerFacts,
    PlaceFacts,
    cosine_of,
    explained,
    head_share,
    layer_share,
    share_of,
)
from bitsmith.run.merge_evidence import Evidence, Samples, TextEvidence, WeightEvidence, text_layers
from bitsmith.run.merge_mapping import Mapper
from bitsmith.run.merge_recipe import RULE, Alphas, MergeRecipe
from bitsmith.store.paired import Paired


@dataclass(frozen=True)
class MergePlan:
    """What a merge does to each of the student's layers, and what was seen on the way.

    `maps` are of the states in front of each of the student's layers, `final` before the final norms,
    `embedding` behind the embeddings. `layers` is by the student's number, without shares; `alphas` are what
    the recipe says, `facts` by layer what its rule saw (`end_facts`: of embedding and final states;
    `head_fit`: what of the teacher's final states a head that is solved for has to go on).
    """

    recipe: MergeRecipe
    paired: Paired
    blend: tuple[tuple[Paired, float], ...]
    teacher: Model
    student: Model
    layer_map: tuple[int, ...]
    maps: tuple[ResidualMap, ...]
    final: ResidualMap
    embedding: ResidualMap
    layers: dict[int, LayerMerge]
    ends: EndsMerge
    alphas: Alphas
    facts: tuple[LayerFacts, ...]
    end_facts: tuple[PlaceFacts, PlaceFacts]
    head_fit: Estimate | None

    def view(self, alphas: Alphas | None = None) -> MergedView:
        """Return the student with the teacher's shares in it, computed on read; `alphas` instead of its own.

        Raises BitsmithError for shares that do not fit.
        """
        shares = self.alphas if alphas is None else alphas
        if len(shares.layers) != len(self.layers):
            raise BitsmithError(f"shares of {len(shares.layers)} layers, the student has {len(self.layers)}")
        layers = {n: replace(one, alpha=shares.layers[n]) for n, one in self.layers.items()}
        ends = replace(self.ends, alpha=shares.embedding, head_alpha=shares.head)
        return merged_view(self.teacher, self.student, layers, ends if self.recipe.ends else None)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {
            "recipe": self.recipe.to_json(),
            "layer_map": list(self.layer_map),
            "blend": [{"paired": str(one.path), "share": share} for one, share in self.blend],
            "alphas": self.alphas.to_json(),
            "layers": [self._layer_json(n) for n in range(len(self.layers))],
            "embedding": {**self.end_facts[0].to_json(), "map": self.embedding.method},
            "final": {
                **self.end_facts[1].to_json(),
                "map": self.final.method,
                "gain": self.ends.gain,
                "head": "map" if self.head_fit is None else "solve",
                "explained": None if self.head_fit is None else vars(self.head_fit),
            },
        }

    def _layer_json(self, number: int) -> dict[str, Any]:
        merge = self.layers[number]
        cost, normalised = transition_cost(merge.before, merge.after)
        return {
            "layer": number,
            "teacher_layer": merge.teacher,
            "map": merge.before.method,
            "heads": merge.heads.method,
            "ffn": merge.ffn.method,
            "gains": list(merge.gains),
            "transition_cost": cost,
            "transition_cost_normalised": normalised,
            **self.facts[number].to_json(),
        }


def merge_plan(
    paired: Paired,
    teacher: Model,
    student: Model,
    recipe: MergeRecipe | None = None,
    blend: Sequence[tuple[Paired, float]] = (),
) -> MergePlan:
    """Return what `recipe` makes of two models and their paired activations.

    `blend` are activations of the same models on other texts, each with its share; `paired` has the rest.
    Of two texts each map lies on the geodesic between theirs, of more it is their chordal mean; heads and
    neurons are matched by the mean of all moments. Raises BitsmithError for activations of other models,
    shares that do not leave one for each, heads and neurons that do not fit, a trunk that is not within the
    student's width, and what the recipe asks that the models or the activations do not allow.
    """
    recipe = recipe or MergeRecipe()
    evidence = _evidence(paired, teacher, student, recipe, blend)
    return _Planner(evidence, teacher, student, recipe).plan(paired, tuple(blend))


def _evidence(
    paired: Paired,
    teacher: Model,
    student: Model,
    recipe: MergeRecipe,
    blend: Sequence[tuple[Paired, float]],
) -> Evidence:
    rest = 1 - sum(share for _, share in blend)
    if blend and (any(not 0 < share < 1 for _, share in blend) or rest <= 0):
        said = ", ".join(f"{share:g}" for _, share in blend)
        raise BitsmithError(f"shares of blended texts are {said}: expected each above 0, below 1 together")
    if not recipe.activations:
        if blend:
            raise BitsmithError("texts are blended by their activations: there is nothing to blend without")
        return WeightEvidence(teacher, student)
    return TextEvidence(teacher, student, ((paired, rest), *blend))


class _Planner:
    """Makes a plan layer by layer, so that one layer's moments are in memory at a time."""

    def __init__(self, evidence: Evidence, teacher: Model, student: Model, recipe: MergeRecipe) -> None:
        self._evidence, self._recipe = evidence, recipe
        self._models = teacher, student
        self._layers = [text_layers(model) for model in self._models]
        self._mapper = Mapper(evidence, recipe)

    def plan(self, paired: Paired, blend: tuple[tuple[Paired, float], ...]) -> MergePlan:
        """Return the plan."""
        count = len(self._evidence.layer_map)
        maps = [self._mapper.at(place) for place in range(count + 1)]
        embedding = self._mapper.embedding()
        places = [self._place(place, maps[place]) for place in range(count + 1)]
        made = [self._layer(n, maps, places) for n in range(count)]
        ends, head_fit = self._ends(embedding, maps[-1])
        end_facts = self._embedded(embedding), places[-1]
        facts = tuple(one for _, one in made)
        return MergePlan(
            recipe=self._recipe,
            paired=paired,
            blend=blend,
            teacher=self._models[0],
            student=self._models[1],
            layer_map=self._evidence.layer_map,
            maps=tuple(maps[:-1]),
            final=maps[-1],
            embedding=embedding,
            layers={n: one for n, (one, _) in enumerate(made)},
            ends=ends,
            alphas=_alphas(self._recipe, facts, end_facts, made, head_fit),
            facts=facts,
            end_facts=end_facts,
            head_fit=head_fit,
        )

    def _place(self, place: int, mapping: ResidualMap) -> PlaceFacts:
        return PlaceFacts(
            cosine_of(mapping, *self._evidence.samples(place)),
            self._kept(mapping, [one.tt for one in self._evidence.moments(place)]),
        )

    def _embedded(self, mapping: ResidualMap) -> PlaceFacts:
        return PlaceFacts(
            cosine_of(mapping, *self._evidence.embedded_samples()),
            self._kept(mapping, [one.tt for one in self._evidence.embedded()]),
        )

    def _kept(self, mapping: ResidualMap, moments: Sequence[Any]) -> float:
        shares = zip(self._evidence.shares, moments, strict=True)
        return variance_kept(mapping, np.sum([share * moment for share, moment in shares], axis=0))

    def _layer(
        self, number: int, maps: Sequence[ResidualMap], places: Sequence[PlaceFacts]
    ) -> tuple[LayerMerge, LayerFacts]:
        chosen = self._evidence.layer_map[number]
        before, after = maps[number], maps[number + 1]
        between = self._mapper.between(number)
        theirs, ours = self._layers[0][chosen], self._layers[1][number]
        sides = (theirs, self._models[0]), (ours, self._models[1])
        seen = self._evidence.heads(number, theirs, ours, before)
        states = self._mapper.mean(self._evidence.moments(number)).ts
        heads = mixer_map(self._recipe.heads, *sides, seen, states)
        likeness = group_likeness(heads, seen)
        del seen
        neurons = self._evidence.neurons(number, theirs, ours, between)
        ffn = ffn_map(self._recipe.ffn, neurons)
        facts = LayerFacts(places[number], places[number + 1], likeness, neuron_likeness(ffn, neurons))
        gains = self._gains(number, before, between)
        return LayerMerge(chosen, before, between, after, heads, ffn, gains), facts

    def _gains(self, number: int, before: ResidualMap, between: ResidualMap) -> tuple[float, float]:
        """Return what the norms in front of mixer and FFN lose."""
        if not self._recipe.gains:
            return 1.0, 1.0
        entering, inside = (
            self._teacher_rows(found)
            for found in (self._evidence.samples(number), self._evidence.between(number))
        )
        return norm_gain(before, entering), norm_gain(between, inside)

    def _ends(self, embedding: ResidualMap, final: ResidualMap) -> tuple[EndsMerge, Estimate | None]:
        """Return what becomes of the ends, and how far a head that is solved for can be trusted."""
        samples = self._evidence.samples(len(self._evidence.layer_map))
        gain = norm_gain(final, self._teacher_rows(samples)) if self._recipe.gains else 1.0
        if not self._solves_head:
            return EndsMerge(embedding, final, gain), None
        solved = solved_reading(self._mapper.mean(self._evidence.normed()))
        return EndsMerge(embedding, final, gain, solved=solved), explained(solved, *samples)

    @property
    def _solves_head(self) -> bool:
        recipe = self._recipe
        wanted = recipe.head == "solve" or (recipe.head == "auto" and not self._models[1].arch.tied)
        return wanted and recipe.ends and recipe.activations

    @staticmethod
    def _teacher_rows(samples: Samples) -> Any:
        return samples[0].reshape(-1, samples[0].shape[-1])


def _alphas(
    recipe: MergeRecipe,
    facts: Sequence[LayerFacts],
    ends: tuple[PlaceFacts, PlaceFacts],
    made: Sequence[tuple[LayerMerge, LayerFacts]],
    head_fit: Estimate | None,
) -> Alphas:
    if recipe.alpha != RULE:
        share = float(recipe.alpha)
        layers = tuple(LayerAlpha((share,) * one.heads.student.groups, share) for one, _ in made)
        return Alphas(layers, share, share)
    layers = tuple(layer_share(one, recipe.alpha_max) for one in facts)
    embedding, final = (share_of([one], recipe.alpha_max) for one in ends)
    head = final if head_fit is None else head_share(head_fit, recipe.alpha_max)
    return Alphas(layers, embedding, head)
