"""Transforms are kept where they help on held-out tokens, and the record says what did not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.formats import Format, format_named
from bitsmith.lab.synth import synth
from bitsmith.passes.permute import PermuteFfn
from bitsmith.passes.rescale import ScaleConv, ScaleFfn, ScaleVo
from bitsmith.passes.rotate import Rotate
from bitsmith.passes.transform import Context, Model, Transform, Vector, model_of
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.forward import TextModel, compare, final_hidden_states
from bitsmith.run.mixes import is_quantizable
from bitsmith.run.transform_judge import FIRST_SHARE
from bitsmith.run.transform_search import Search, search
from bitsmith.store.safetensors_writer import TensorData, write_safetensors
from bitsmith.store.statistics import Statistics, open_statistics

CTX, CHUNKS = 64, 40


class Known(ScaleFfn):
    """`scale-ffn` by given factors."""

    def __init__(self, sigma: float, seed: int, power: int = 1) -> None:
        super().__init__()
        self.drawn = (sigma, seed, power)

    def __str__(self) -> str:
        return f"known:{self.drawn}"

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        sigma, seed, power = self.drawn
        rng = np.random.default_rng(seed)
        sizes = {name: len(sides[0].channels) for name, sides in self.sides(model).items()}
        return {name: np.exp(sigma * rng.standard_normal(size)) ** power for name, size in sizes.items()}


@dataclass(frozen=True)
class Case:
    """A model whose feed-forward channels differ wildly in size, and what a search takes."""

    network: TextModel
    model: Model
    formats: Mapping[str, Format]
    statistics: Statistics
    tokens: np.ndarray

    def search(self, *candidates: Any, **options: Any) -> Search:
        given = {"formats": self.formats, "rounder": "weighted", "tokens": self.tokens} | options
        return search(
            self.network,
            self.model,
            given.pop("formats"),
            self.statistics,
            given.pop("rounder"),
            given.pop("tokens"),
            candidates=[(one,) if isinstance(one, Transform) else one for one in candidates] or None,
            **given,
        )


def write_model(model: Model, folder: Path, files: Path) -> Path:
    view = model.view()
    form = format_named("F32")
    data = [
        TensorData(name, "F32", ref.shape, [form.encode(np.float32(ref.read()).reshape(1, -1))])
        for name, ref in view.items()
    ]
    kept = {name: (files / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_safetensors(folder, data, view.config, files=kept)
    return folder


def formats_of(model: Model, name: str) -> dict[str, Format]:
    inner = {
        spec.name: format_named("Q8_0" if spec.role in ("embed", "head") else name)
        for spec, ref in model.tensors.values()
        if spec.gguf_name is not None and is_quantizable(spec.gguf_name, ref.shape)
    }
    floats = {spec.name: format_named("F32") for spec, _ in model.tensors.values() if spec.gguf_name}
    return floats | inner


def case_of(folder: Path, text: Path, stats: Path, chunks: int = CHUNKS) -> Iterator[Case]:
    calibrate(folder, text, stats, ctx_tokens=CTX, chunks=chunks, saliency=False)
    with open_model(folder) as network:
        model = model_of(network.source)
        statistics = open_statistics(stats, [spec for spec, _ in model.tensors.values()])
        tokens = statistics.tokens()
        assert tokens is not None
        yield Case(network, model, formats_of(model, "Q2_K"), statistics, tokens[1])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def planted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("planted")
    plain = synth(folder / "plain", "qwen3-tiny", layers=2, seed=3)
    with open_model(plain) as network:
        wild = model_of(network.source)
        known = Known(2.0, 7)
        wild = wild.applying(known, known.vectors(wild, Context()))
        write_model(wild, folder / "wild", plain)
    yield from case_of(folder / "wild", text, folder / "stats")


def test_what_helps_is_kept_and_what_does_not_is_recorded(planted: Case) -> None:
    hurts, helps, idle = Known(2.0, 11), Known(2.0, 7, -1), ScaleConv()
    found = planted.search(hurts, idle, helps)
    by_name = {one.transform: one for one in found.tried}
    bad, good, nothing = (by_name[str(one)] for one in (hurts, helps, idle))
    assert [one.transform for one in found.applied] == [helps]
    assert good.kept and good.reason == "kept" and good.instances == 2
    assert good.change is not None and good.change.high is not None and good.change.high < 0
    assert good.before is not None and good.after is not None and good.after.value < 0.8 * good.before.value
    assert good.change.value == pytest.approx(good.after.value - good.before.value)
    assert not bad.kept and bad.change is not None and bad.change.value > 0 and "worse" in bad.reason
    assert bad.before == good.before
    assert not nothing.kept and nothing.before is None and nothing.reason.startswith("cannot help")


def test_a_baseline_is_what_compress_writes(planted: Case, tmp_path: Path) -> None:
    found = planted.search(Known(2.0, 11))
    types = [("token_embd", "Q8_0"), ("^output.weight", "Q8_0")]
    out, stats = tmp_path / "plain.gguf", planted.statistics.path
    source = planted.network.source.path
    compress(source, out, "Q2_K", pure=True, tensor_types=types, statistics=stats, rounder="weighted")
    first = CTX // FIRST_SHARE
    with open_model(source) as reference, open_model(out) as written:
        states = [final_hidden_states(one, planted.tokens, first) for one in (reference, written)]
        flat = states[0].reshape(-1, 256), states[1].reshape(-1, 256)
        kld = compare(reference, written, flat, planted.tokens[:, first + 1 :].reshape(-1)).kld
    before = found.tried[0].before
    assert before is not None and before.value == pytest.approx(float(kld.mean()), rel=1e-5)


def test_a_kept_transform_is_what_the_next_builds_on(planted: Case) -> None:
    found = planted.search(Known(2.0, 7, -1), PermuteFfn({"by": "scale"}))
    kept, order = found.tried
    assert kept.kept and kept.after is not None and order.before == kept.after
    assert order.after is not None and order.after.value < 0.9 * kept.before.value


def test_of_variants_the_best_is_kept(planted: Case) -> None:
    half, whole = Known(1.0, 7, -1), Known(2.0, 7, -1)
    found = planted.search(half, whole)
    assert [one.kept for one in found.tried] == [False, True]
    assert found.tried[0].reason == f"helped, but {whole} helped more"
    turned = planted.search(whole, half)
    assert [one.kept for one in turned.tried] == [True, False]
    for one, other in zip(found.tried, reversed(turned.tried), strict=True):
        assert (one.before, one.after, one.change) == (other.before, other.after, other.change)


def test_rounds_by_error_feedback_and_gives_the_same_twice(planted: Case) -> None:
    candidates = Known(2.0, 7, -1), PermuteFfn({"by": "scale"})
    feed_forward = {name: form for name, form in planted.formats.items() if "mlp.down" in name}
    options = {"formats": feed_forward, "tokens": planted.tokens[:3]}
    found = [planted.search(*candidates, rounder="gptq", **options) for _ in range(2)]
    assert found[0].tried == found[1].tried and found[0].protocol == found[1].protocol
    assert found[0].tried[0].kept
    weighted = planted.search(*candidates[:1], **options).tried[0]
    fed_back = found[0].tried[0]
    assert weighted.after is not None and fed_back.after is not None
    assert fed_back.after.value < 0.8 * weighted.after.value


def test_floats_cannot_be_helped(planted: Case) -> None:
    floats = {name: format_named("F32") for name in planted.formats}
    found = planted.search(Known(2.0, 7, -1), formats=floats)
    assert found.tried[0].reason == "cannot help: no quantized tensor's rows are stored otherwise"
    assert found.tried[0].instances == 2 and not found.applied


def test_one_chunk_is_no_basis(planted: Case) -> None:
    with pytest.raises(BitsmithError, match="held-out chunks, 2 at least; these have 1"):
        planted.search(Known(2.0, 7, -1), tokens=planted.tokens[:1])


def test_rotates_what_needs_no_other_tensors(planted: Case) -> None:
    found = planted.search(Rotate())
    [tried] = found.tried
    assert tried.change is not None and tried.reason.startswith(("kept", "did not help"))
    assert [one.transform.name for one in found.applied] == (["fold", "rotate"] if tried.kept else [])


def test_says_what_a_rotation_would_cost(tiny_qwen3_5_tied: Path, text: Path, tmp_path: Path) -> None:
    for case in case_of(tiny_qwen3_5_tied, text, tmp_path / "stats", chunks=16):
        floats = {name: format_named("F32") for name in case.formats}
        [tried] = case.search(Rotate(), formats=floats).tried
        assert tried.before is None and not tried.kept
        assert tried.reason.startswith("not tried: needs untie (lm_head.weight is added")
        assert "drop-mtp (" in tried.reason and tried.reason.count("bytes") == 2


def test_output_errors_judge_without_a_forward(planted: Case) -> None:
    hurts, helps, idle = Known(2.0, 11), Known(2.0, 7, -1), ScaleConv()
    found = planted.search(hurts, idle, helps, measure="output error", rounder="auto")
    bad, nothing, good = found.tried
    assert [one.kept for one in found.tried] == [False, False, True] and nothing.change is None
    assert good.measure == "log ratio of held-out output error" and good.change is not None
    assert good.change.low is not None and good.change.high is not None
    assert good.change.low < good.change.value < good.change.high < 0
    assert bad.change is not None and bad.change.value > 0
    assert found.tried == planted.search(hurts, idle, helps, measure="output error", rounder="auto").tried


def test_one_changed_tensor_is_judged_over_its_inputs(planted: Case) -> None:
    down = next(spec.name for spec in planted.model.having("ffn.down"))
    formats = {name: form for name, form in planted.formats.items() if name == down}
    [tried] = planted.search(Known(2.0, 7, -1), measure="output error", formats=formats).tried
    assert tried.kept and tried.change is not None and tried.change.low is not None
    assert tried.change.low < tried.change.value < (tried.change.high or 0) < 0


def test_what_is_measured_later_must_be_surer(planted: Case) -> None:
    bundle = Known(2.0, 11), PermuteFfn({"by": "scale"})
    found = planted.search(bundle, Known(0.04, 6), Known(0.03, 8)).tried
    assert found[0].transform == "known:(2.0, 11, 1) + permute-ffn:by=scale" and not found[0].kept
    assert [one.confidence for one in found] == pytest.approx([0.95, 1 - 0.025 / 2, 1 - 0.025 / 2])


def test_members_of_a_kept_bundle_are_not_tried_again(planted: Case) -> None:
    whole = Known(2.0, 7, -1), ScaleVo()
    found = planted.search(whole, ScaleFfn())
    assert found.tried[0].kept and found.tried[1].reason == "not tried: kept already"


def test_finds_the_planted_scales_by_itself(planted: Case) -> None:
    found = planted.search(ScaleFfn(), ScaleVo())
    wild = found.tried[0]
    assert wild.kept and wild.before is not None and wild.after is not None
    assert wild.after.value < 0.8 * wild.before.value
    assert found.tried[1].before == wild.after


def test_two_chunks_that_happen_to_agree_are_not_enough(planted: Case) -> None:
    found = planted.search(Known(0.05, 5), tokens=planted.tokens[:2]).tried[0].change
    assert found is not None and found.low is not None and found.high is not None
    assert found.low < 0 < found.high
    sure = planted.search(Known(2.0, 7, -1), tokens=planted.tokens).tried[0]
    assert sure.kept
