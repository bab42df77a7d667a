"""GGUFs of the original tool chain: the converter's, llama-quantize's of every type, split ones, imatrices.

`tests/data/toolchain/make.py` tells how they were made.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from bitsmith.archs import import_view
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.run.compress import compress
from bitsmith.run.evaluate import evaluate, open_model
from bitsmith.run.forward import final_hidden_states
from bitsmith.run.inspect import inspect
from bitsmith.run.job import Job
from bitsmith.store import TensorInfo, open_checkpoint, open_gguf, write_gguf
from llama_oracle import Llama

DATA = Path(__file__).parent / "data" / "toolchain"
SOURCE, CONVERTED, ALL_TYPES = DATA / "source", DATA / "converted.gguf", DATA / "all-types.gguf"
PARTS = [DATA / f"split-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
TYPES = {
    "F16", "F32", "IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL",
    "IQ4_XS", "Q1_0", "Q2_0", "Q2_K", "Q3_K", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K",
    "Q8_0", "TQ1_0", "TQ2_0",
}  # fmt: skip
NEWER = {"Q1_0", "Q2_0"}  # than the `gguf` package
OURS_ALONE = {"qwen35.attention.recurrent_layers", "tokenizer.ggml.add_eos_token"}
THEIRS_ALONE = {"general.size_label", "general.name", "general.sampling.temp"}


def logits(path: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with open_model(path) as model:
        states = final_hidden_states(model, tokens, 0)
        found: NDArray[np.float32] = states @ np.asarray(model.head.read(), np.float32).T
    return found


def decoded(path: Path, out: Path) -> Path:
    """Write a GGUF again with every tensor decoded to F32."""
    with open_gguf(path) as stored:
        infos = [TensorInfo(name, ref.shape, "F32") for name, ref in stored.items()]
        write_gguf(out, stored.typed_metadata(), infos, lambda info: [stored[info.name].read()])
    return out


def test_our_export_is_the_converters(tmp_path: Path) -> None:
    """The same names, types, bytes and key/values of a vision-language checkpoint with MTP."""
    compress(Job(model=SOURCE, out=tmp_path / "ours.gguf", type_name="BF16"))
    with open_gguf(tmp_path / "ours.gguf") as ours, open_gguf(CONVERTED) as theirs:
        assert ours.keys() == theirs.keys()
        for name, ref in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (ref.dtype, ref.shape)
            if ref.dtype == "F32":  # the converter's exp and sums are torch's
                np.testing.assert_allclose(ours[name].read(), ref.read(), rtol=1e-6)
            else:
                np.testing.assert_array_equal(ours[name].raw(), ref.raw())
        shared = ours.metadata.keys() & theirs.metadata.keys() - THEIRS_ALONE
        assert {key: ours.metadata[key] for key in shared} == {key: theirs.metadata[key] for key in shared}
        assert theirs.metadata.keys() - shared <= THEIRS_ALONE
        assert ours.metadata.keys() - shared - THEIRS_ALONE <= OURS_ALONE


@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_a_split_file_is_the_whole(part: Path) -> None:
    with open_gguf(part) as split, open_gguf(CONVERTED) as whole:
        assert split.source_digest == whole.source_digest
        assert split.path == PARTS[0]
        assert split.files == tuple(PARTS)
        assert not [key for key in split.metadata if key.startswith("split.")]


def test_a_folder_of_parts_is_one_checkpoint_and_another_file_beside_them_is_not(tmp_path: Path) -> None:
    for part in PARTS:
        shutil.copy(part, tmp_path)
    out = tmp_path / "out" / "q.gguf"
    out.parent.mkdir()
    compress(Job(model=tmp_path, out=out, type_name="Q8_0"))
    assert inspect(out).parameters == inspect(CONVERTED).parameters
    shutil.copy(CONVERTED, tmp_path / "split.gguf")
    with pytest.raises(BitsmithError, match="several model files"):
        open_checkpoint(tmp_path)


def test_torn_sets_of_parts_are_refused(tmp_path: Path) -> None:
    first, second, third = (Path(shutil.copy(part, tmp_path)) for part in PARTS)
    third.unlink()
    with pytest.raises(DamagedFileError, match="1 of 3 parts are missing beside it: split-00003"):
        open_gguf(first)
    shutil.copy(second, third)
    with pytest.raises(DamagedFileError, match=r"00003-of-00003\.gguf: says that it is part 1 of 3"):
        open_gguf(first)
    lone = tmp_path / "renamed.gguf"
    shutil.copy(PARTS[0], lone)
    with pytest.raises(DamagedFileError, match="is one of 3 parts: its name must end in -00001-of-00003"):
        open_gguf(lone)


def test_a_tensor_in_two_parts_and_a_wrong_total_are_refused(tmp_path: Path) -> None:
    for part in PARTS:
        shutil.copy(part, tmp_path)
    twice = tmp_path / PARTS[2].name
    raw = twice.read_bytes()
    with open_gguf(PARTS[0]) as whole:
        last = list(whole)[-1]
    other = next(name for name in whole if len(name) == len(last) and name != last)
    twice.write_bytes(raw.replace(last.encode(), other.encode(), 1))
    with pytest.raises(DamagedFileError, match="is in an earlier part too"):
        open_gguf(tmp_path / PARTS[0].name)
    twice.write_bytes(raw)
    first = tmp_path / PARTS[0].name
    at = first.read_bytes().index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    with first.open("r+b") as stream:
        stream.seek(at)
        stream.write((7).to_bytes(4, "little"))
    with pytest.raises(DamagedFileError, match="says that all parts hold 7 tensors, they hold"):
        open_gguf(first)


def test_every_type_that_llama_quantize_writes_is_read_as_the_gguf_package_does() -> None:
    with open_gguf(ALL_TYPES) as stored:
        assert {ref.dtype for ref in stored.values()} == TYPES
        for ref in stored.values():
            if ref.dtype not in NEWER:
                blocks = ref.raw().reshape(ref.n_rows, -1)
                values = dequantize(blocks, GGMLQuantizationType[ref.dtype])
                np.testing.assert_array_equal(ref.read().reshape(values.shape), values)


@pytest.mark.slow
def test_a_file_of_every_type_runs_as_real_llama_cpp_runs_its_values(tmp_path: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 256, (1, 48))
    ours = logits(ALL_TYPES, tokens)[0]
    with Llama(decoded(ALL_TYPES, tmp_path / "decoded.gguf")) as real:
        theirs = real.logits(tokens[0], 0)[:-1]
    np.testing.assert_allclose(ours, theirs, atol=2e-2 * np.abs(theirs).max())


def test_rounded_weights_are_rounded_again_only_when_that_is_allowed(tmp_path: Path) -> None:
    """Tensors that keep their type keep their bytes, and real llama.cpp loads and runs the result."""
    out = tmp_path / "q4.gguf"
    with pytest.raises(
        UnsupportedError, match=r"is stored as \w+; expected the original .*--allow-requantize"
    ):
        compress(Job(model=ALL_TYPES, out=out, type_name="Q4_K_M"))
    assert list(tmp_path.iterdir()) == []
    record = compress(Job(model=ALL_TYPES, out=out, type_name="Q4_K_M", allow_requantize=True))
    assert any("rounded already" in note for note in record.plan.notes)
    with open_gguf(ALL_TYPES) as before, open_gguf(out) as after:
        kept = [
            n for n in before if before[n].dtype == after[n].dtype and before[n].dtype not in ("F32", "F16")
        ]
        assert {before[name].dtype for name in kept} == {"Q4_K"}
        for name in kept:
            np.testing.assert_array_equal(before[name].raw(), after[name].raw())
        errors = {one.gguf_name: one.relative_error for one in record.tensors}
        assert {errors[name] for name in kept} == {0.0}
        assert after.keys() == before.keys()
        assert not [key for key in after.metadata if key.startswith("quantize.imatrix")]
    tokens = np.random.default_rng(3).integers(0, 256, 16)
    with Llama(out) as real:
        assert np.isfinite(real.logits(tokens, 0)).all()


def test_what_the_tool_chain_wrote_is_evaluated_and_re_encoded(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DATA / "make.py").read_text())
    same = evaluate(SOURCE, CONVERTED, text, 64, 2)
    assert same.mean_kld.value < 1e-9
    compress(Job(model=CONVERTED, out=tmp_path / "q8.gguf", type_name="Q8_0"))
    compress(Job(model=SOURCE, out=tmp_path / "direct.gguf", type_name="Q8_0"))
    with open_gguf(tmp_path / "q8.gguf") as through, open_gguf(tmp_path / "direct.gguf") as direct:
        for name, ref in direct.items():
            np.testing.assert_allclose(through[name].read(), ref.read(), rtol=1e-6)
    assert 0 < evaluate(SOURCE, tmp_path / "q8.gguf", text, 64, 2).mean_kld.value < 1e-2


@pytest.mark.slow
def test_both_kinds_of_imatrix_guide_the_same_bytes(tmp_path: Path) -> None:
    sums = []
    for name in ("imatrix.gguf", "imatrix.dat"):
        job = Job(
            model=ALL_TYPES, out=tmp_path / f"{name}.gguf", type_name="IQ4_XS", rounder="weighted",
            statistics=DATA / name, allow_requantize=True,
        )  # fmt: skip
        record = compress(job)
        assert any(one.rounding.rounder == "weighted" for one in record.tensors)
        with open_gguf(job.out) as written:
            sums.append({key: ref.raw().tobytes() for key, ref in written.items()})
    assert sums[0].keys() == sums[1].keys()


def test_mtp_and_vision_of_the_source_are_told() -> None:
    with open_gguf(CONVERTED) as stored:
        view = import_view(stored)
        assert [name for name in view if name.startswith("mtp.")]
    assert any("vision tensors are set aside" in note for note in inspect(SOURCE).notes)
