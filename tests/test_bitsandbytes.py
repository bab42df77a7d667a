"""bitsandbytes' folders: read as the library decodes them, and written so that transformers runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import logging

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.formats.nf4 import DYNAMIC_MAP, FP4, NF4, FourBit, nest
from bitsmith.lab.synth import synth
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import open_model
from bitsmith.run.folder import KEPT, plan_folder, write_folder
from bitsmith.run.forward import final_hidden_states
from bitsmith.run.pack_bitsandbytes import BitsandbytesPacker
from bitsmith.run.packer import Assigned, Matrix
from bitsmith.store import ComputedTensor, TensorData, open_checkpoint, write_safetensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

CONFIG = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
TYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((48, 96), (5, 130), (3, 2), (1, 64), (6, 31), (2, 3, 50))
STATE = "quant_state.bitsandbytes__nf4"

Stored = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles its own fallback for odd shapes, which takes longer than all of this file."""
    torch.compiler.set_stance("force_eager")
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.compiler.set_stance("default")


def save(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] = CONFIG) -> Path:
    data = [
        TensorData(
            name, DTYPES[t.dtype], tuple(t.shape), [t.contiguous().view(torch.uint8).numpy().reshape(-1)]
        )
        for name, t in tensors.items()
    ]
    write_safetensors(folder, data, config)
    return folder


def packed(name: str, weights: torch.Tensor, **options: Any) -> tuple[Stored, torch.Tensor]:
    """Return what bitsandbytes stores for `weights`, and what it decodes that to."""
    codes, state = bnb.quantize_4bit(weights, **options)
    stored = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {name: codes, **stored}, bnb.dequantize_4bit(codes, state)


def bits(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.float32).view(np.int32)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_bitsandbytes_own_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Types, shapes with odd ends, block sizes, scales of either kind, codes stored as another type."""
    generator, stored, expected = torch.Generator().manual_seed(1), {}, {}
    for dtype in TYPES:
        for shape in SHAPES:
            for size, nested in ((32, False), (64, True), (64, False), (128, True), (4096, True)):
                name = f"{str(dtype)[6:]}.{'x'.join(map(str, shape))}.{size}.{nested}.weight"
                values = torch.randn(shape, generator=generator).to(dtype)
                values.view(-1)[:3] = 0
                parts, expected[name] = packed(
                    name, values, quant_type=kind, blocksize=size, compress_statistics=nested
                )
                stored |= parts
        name = f"{str(dtype)[6:]}.as_bfloat16.weight"
        parts, expected[name] = packed(
            name, torch.randn(8, 64, generator=generator).to(dtype), quant_type=kind,
            quant_storage=torch.bfloat16, compress_statistics=True,
        )  # fmt: skip
        stored |= parts
    with open_checkpoint(save(tmp_path / "model", stored)) as checkpoint:
        assert set(checkpoint) == set(expected)
        for name, theirs in expected.items():
            ref, values = checkpoint[name], theirs.float().numpy()
            ours = ref.read()
            assert ref.shape == values.shape and ref.dtype == kind.upper()
            assert (ours == values).all(), name
            if ref.shape[-1] % 2 == 0:  # its fallback for odd widths gives FP4's second zero no sign
                assert (bits(ours) == bits(values)).all(), name
            for start, stop in ((0, 1), (1, 1), (1, ref.n_rows), (ref.n_rows // 2, ref.n_rows // 2 + 1)):
                assert (ref.read(start, stop) == values[start:stop]).all(), (name, start, stop)


@pytest.mark.parametrize("form", [NF4, FP4], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nearest_codes_and_scales_are_bitsandbytes_own(form: FourBit, dtype: torch.dtype) -> None:
    """Given its offset, a float32 mean that depends on the processor, the nested scales are too."""
    weights = torch.randn(40_000 + 33, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights[64:192] = 0
    codes, state = bnb.quantize_4bit(weights, quant_type=form.name.lower(), compress_statistics=True)
    flat = weights.float().numpy()
    scales = form.absmax(flat)
    assert form.pack(form.nearest(flat, scales)).tobytes() == codes.numpy().tobytes()
    nested = nest(scales, state.offset.numpy())
    assert nested.codes.tobytes() == state.absmax.numpy().tobytes()
    assert nested.absmax.tobytes() == state.state2.absmax.numpy().tobytes()
    assert abs(nest(scales).offset - nested.offset) <= np.spacing(nested.offset)


def test_levels_and_map_are_bitsandbytes_own() -> None:
    for form in (NF4, FP4):
        levels = bnb.get_4bit_type(form.name.lower(), device="cpu").numpy()
        assert (form.levels == levels).all()
    assert DYNAMIC_MAP.tobytes() == bnb.create_dynamic_map().numpy().tobytes()


def test_bytes_of_equal_scales_are_bitsandbytes_own() -> None:
    for weights in (torch.ones(256), torch.zeros(1000), torch.full((70,), 1e-39)):
        codes, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
        scales = NF4.absmax(weights.numpy())
        assert NF4.pack(NF4.nearest(weights.numpy(), scales)).tobytes() == codes.numpy().tobytes()
        assert nest(scales, state.offset.numpy()).codes.tobytes() == state.absmax.numpy().tobytes()


def test_llm_int8_is_read(tmp_path: Path) -> None:
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float16)
    codes, scales, _ = bnb.int8_vectorwise_quant(values)
    stored = {"a.weight": codes, "a.SCB": scales, "a.weight_format": torch.zeros((), dtype=torch.uint8)}
    with open_checkpoint(save(tmp_path / "a", stored)) as checkpoint:
        assert set(checkpoint) == {"a.weight"}
        theirs = bnb.int8_vectorwise_dequant(codes, scales).numpy()
        assert (checkpoint["a.weight"].read(3, 11) == theirs[3:11]).all()
    with open_checkpoint(save(tmp_path / "own", {"b.SCB": scales, **stored})) as checkpoint:
        assert set(checkpoint) == {"a.weight", "b.SCB"}
    for changed, said in (
        ({"a.weight": codes}, "without SCB"),
        ({"a.weight": codes, "a.SCB": scales[1:].clone()}, "a scale per row"),
    ):
        with pytest.raises(DamagedFileError, match=f"'a.weight'.*{said}"):
            open_checkpoint(save(tmp_path / said, changed))
    stored["a.weight_format"] += 1
    with pytest.raises(UnsupportedError, match=r"'a.weight'.*tiled layout"):
        open_checkpoint(save(tmp_path / "tiled", stored))


def _without(part: str) -> Callable[[Stored], None]:
    return lambda stored: stored.__delitem__(f"a.weight.{part}")


def _with(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Stored], None]:
    name = f"a.weight.{part}" if part else "a.weight"

    def apply(stored: Stored) -> None:
        stored[name] = change(stored[name])

    return apply


def _saying(**fields: Any) -> Callable[[Stored], None]:
    def change(state: torch.Tensor) -> torch.Tensor:
        found = json.loads(bytes(state.tolist())) | fields
        kept = {key: value for key, value in found.items() if value is not ...}
        return torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)

    return _with(STATE, change)


DAMAGES: dict[str, Callable[[Stored], None]] = {
    "lacks: absmax": _without("absmax"),
    "lacks: quant_map": _without("quant_map"),
    "lacks: nested_absmax": _without("nested_absmax"),
    "lacks: nested_quant_map": _without("nested_quant_map"),
    "needs one quant state": _without(STATE),
    "is missing, but absmax": lambda stored: stored.__delitem__("a.weight"),
    "found quant_state.bitsandbytes__af4": lambda stored: stored.update(
        {"a.weight.quant_state.bitsandbytes__af4": stored.pop(f"a.weight.{STATE}")}
    ),
    "part absmax as U8": _with("absmax", lambda part: part[1:]),
    "absmax as F32": _with("absmax", lambda part: part.float()),
    "quant_map as F32": _with("quant_map", lambda part: part[:15]),
    "nested_absmax as F32": _with("nested_absmax", lambda part: part.repeat(2)),
    "nested_quant_map as U8": _with("nested_quant_map", lambda part: part.to(torch.uint8)),
    "nested_quant_map that is not finite": _with("nested_quant_map", lambda part: part * float("nan")),
    "bytes of codes": _with("", lambda codes: codes[1:]),
    "has 0 bytes of codes": _with("", lambda codes: codes[:0]),
    "in one column": _with("", lambda codes: codes.reshape(1, -1)),
    "is not JSON": _with(STATE, lambda state: state[:-1]),
    "is not UTF-8": _with(STATE, lambda state: state + 128),
    "is not a JSON object": _with(STATE, lambda state: torch.tensor([91, 93], dtype=torch.uint8)),
    "quant state of F32": _with(STATE, lambda state: state.float()),
    "quant_type 'fp4'": _saying(quant_type="fp4"),
    "blocksize 48": _saying(blocksize=48),
    "blocksize True": _saying(blocksize=True),
    "dtype 'float64'": _saying(dtype="float64"),
    "has shape None": _saying(shape=None),
    r"shape \[4, -64\]": _saying(shape=[4, -64]),
    r"for shape \[4, 1441": _saying(shape=[4, 1 << 57]),
    r"shape \[1152921504606846976, 64\]": _saying(shape=[1 << 60, 64]),
    "nested_blocksize 0": _saying(nested_blocksize=0),
    "nested_dtype 'float16'": _saying(nested_dtype="float16"),
    "nested_offset NaN": _saying(nested_offset=float("nan")),
    "nested_offset None": _saying(nested_offset=...),
    "unknown fields in its quant state: more": _saying(more=1),
    "parts that belong to nothing: nested_absmax, nested_quant_map": _saying(
        nested_blocksize=..., nested_dtype=..., nested_offset=...
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_damaged_parts_are_refused_by_name(said: str, tmp_path: Path) -> None:
    stored, _ = packed("a.weight", torch.ones(4, 64), quant_type="nf4", compress_statistics=True)
    DAMAGES[said](stored)
    with pytest.raises(DamagedFileError, match=rf"model: .*a\.weight.*{said}".replace("NaN", "nan")):
        open_checkpoint(save(tmp_path / "model", stored))


def test_codes_without_a_state_and_foreign_books_are_refused(tmp_path: Path) -> None:
    stored, _ = packed("a.weight", torch.ones(4, 64), quant_type="nf4")
    with pytest.raises(DamagedFileError, match=r"'a\.weight': is U8 without a quant state"):
        open_checkpoint(save(tmp_path / "bare", {"a.weight": stored["a.weight"]}))
    stored["a.weight.quant_map"] = stored["a.weight.quant_map"] * 0.9
    with pytest.raises(UnsupportedError, match="quant_map that is not NF4's"):
        open_checkpoint(save(tmp_path / "book", stored))


class Folder:
    """A tiny model in NF4 with some linears left as they are, and what transformers makes of the folder."""

    KEPT = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head")

    def __init__(self, path: Path, scheme: str = "NF4", dtype: str = "F32") -> None:
        self.source = synth(path / "source", "qwen3-tiny", seed=5, dtype=dtype)
        self.path = path / "packed"
        self.record = write_folder(
            self.source, self.path, scheme, ignore=self.KEPT[:2], shard_bytes=2_000_000, rounder="nearest"
        )
        self.plan = plan_folder(
            self.source, scheme, ignore=self.KEPT[:2], shard_bytes=2_000_000, rounder="nearest"
        )
        self.model = load(self.path)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model: Any, tokens: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].float().numpy()
    return found


def own_logits(folder: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Return those of our own evaluation, but for the last position, which it never scores."""
    with open_model(folder) as model:
        hidden = final_hidden_states(model, np.array([tokens], np.int32), 0)
        return np.asarray(hidden[0] @ model.head.read().T, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("nf4"))


TOKENS = list(range(3, 67))


def test_transformers_runs_what_we_write_as_we_do(folder: Folder) -> None:
    """In float32; where the source is BF16 the library decodes to whatever it computes in (see below)."""
    theirs, ours = logits(folder.model, TOKENS)[:-1], own_logits(folder.path, TOKENS)
    assert np.abs(theirs - ours).max() < 2e-5 * np.abs(ours).max()
    plain = own_logits(folder.source, TOKENS)
    assert np.abs(ours - plain).max() > 1e-2 * np.abs(plain).max()


def test_skipped_modules_are_honoured(folder: Folder) -> None:
    kinds = {name: type(module) for name, module in folder.model.named_modules()}
    packed_names = {tensor.name for tensor in folder.record.tensors if tensor.rounder}
    linears = {name for name, kind in kinds.items() if issubclass(kind, torch.nn.Linear)}
    assert {name for name in linears if kinds[name] is not Linear4bit} == set(folder.KEPT)
    assert {f"{name}.weight" for name in linears - set(folder.KEPT)} == packed_names


@pytest.mark.slow
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_multimodal_folders_load_with_and_without_vision(loader: Any, tmp_path: Path) -> None:
    """Their text model's modules have other names by themselves: both are skipped, MTP is carried along."""
    source = synth(tmp_path / "source", dtype="F32")
    record = write_folder(source, tmp_path / "packed", "NF4", tensor_types=[("lm_head", "NF4")])
    model = loader.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    packed_count = sum(bool(tensor.rounder) for tensor in record.tensors)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == packed_count > 20
    theirs, ours = logits(model, TOKENS)[:-1], own_logits(tmp_path / "packed", TOKENS)
    assert np.abs(theirs - ours).max() < 2e-5 * np.abs(ours).max()


def test_written_weights_are_bitsandbytes_own(folder: Folder) -> None:
    """Codes as it would have made them itself, decoded by it bit for bit as by us; sizes as planned."""
    assert folder.plan.file_bytes == folder.record.file_bytes
    assert folder.record.file_bytes == sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    assert len(list(folder.path.glob("*.safetensors"))) > 1
    with open_checkpoint(folder.path) as ours, open_checkpoint(folder.source) as source:
        assert set(ours) == set(source)
        for name, module in folder.model.named_modules():
            if not isinstance(module, Linear4bit):
                continue
            ref = ours[f"{name}.weight"]
            theirs = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).numpy()
            assert (bits(ref.read()) == bits(theirs)).all()
            codes, _ = bnb.quantize_4bit(torch.tensor(source[ref.name].read()), quant_type="nf4")
            assert (module.weight.data == codes).all()


def test_what_transformers_quantized_and_saved_is_read_bit_for_bit(folder: Folder, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"],
    )  # fmt: skip
    model = load(folder.source, quantization_config=settings)
    model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved") as ours:
        found = 0
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                theirs = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
                assert (bits(ours[f"{name}.weight"].read()) == bits(theirs.float().numpy())).all()
                found += 1
        assert found and ours["model.layers.0.mlp.up_proj.weight"].dtype == "F32"
    ids = TOKENS[:16]
    assert np.abs(logits(model, ids)[:-1] - own_logits(tmp_path / "saved", ids)).max() < 1e-4


def test_llm_int8_that_transformers_saved_is_read(folder: Folder, tmp_path: Path) -> None:
    model = load(folder.source, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved") as ours:
        names = [name for name, module in model.named_modules() if isinstance(module, Linear8bitLt)]
        for name in names:
            weight = model.get_submodule(name).weight
            theirs = bnb.int8_vectorwise_dequant(weight.data, weight.SCB).numpy()
            assert (ours[f"{name}.weight"].read() == theirs).all()
        assert names


def test_bf16_is_decoded_as_the_state_says(tmp_path: Path) -> None:
    """A packed BF16 matrix decodes to BF16, in transformers where it decodes them once and for all."""
    written = Folder(tmp_path, "FP4", "BF16")
    model = written.model.dequantize(dtype=torch.float32).float()
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    theirs, ours = logits(model, TOKENS)[:-1], own_logits(written.path, TOKENS)
    assert np.abs(theirs - ours).max() < 2e-5 * np.abs(ours).max()


def test_blocks_and_schemes_that_cannot_be_are_refused(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match=r"NF4 has blocks of 32, .* weights, not of 0"):
        plan_folder(folder.source, "NF4", group=0)
    with pytest.raises(BitsmithError, match="FP4 and NF4"):
        plan_folder(folder.source, "NF4", tensor_types=[("down_proj", "FP4")])
    write_folder(folder.source, tmp_path / "32", "FP4", group=32, rounder="auto")
    with open_checkpoint(tmp_path / "32") as ours, open_checkpoint(folder.source) as source:
        name = "model.layers.0.mlp.down_proj.weight"
        rows = source[name].read()
        left = ((ours[name].read() - rows) ** 2).sum() / (rows**2).sum()
        assert 0.003 < left < 0.013


def test_statistics_guide_the_codes(tiny_qwen3: Path, tmp_path: Path) -> None:
    """At the same bytes; the folder's values, read back, have the errors that the record says."""
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    calibrate(tiny_qwen3, tmp_path / "text.txt", tmp_path / "stats", ctx_tokens=64, chunks=8, saliency=False)
    held, sizes = {}, set()
    for rounder in ("nearest", "weighted", "gptq"):
        out = tmp_path / rounder
        record = write_folder(
            tiny_qwen3, out, KEPT, tensor_types=[(r"layers\.0\.mlp", "NF4")], statistics=tmp_path / "stats",
            rounder=rounder,
        )  # fmt: skip
        coded = [tensor for tensor in record.tensors if tensor.rounder]
        assert {tensor.rounder for tensor in coded} == {rounder}
        held[rounder] = sum(tensor.held_error or np.nan for tensor in coded)
        sizes.add(record.file_bytes)
        with open_checkpoint(out) as ours, open_checkpoint(tiny_qwen3) as source:
            for tensor in coded:
                rows = source[tensor.name].read()
                left = ((rows - ours[tensor.name].read()) ** 2).sum() / (rows**2).sum()
                assert abs(left - tensor.relative_error) < 0.01 * left
    assert len(sizes) == 1 and held["gptq"] < 0.8 * held["weighted"] < 0.8 * 0.9 * held["nearest"]


class FewRows(ComputedTensor):
    """A matrix that is read three rows at a time."""

    def slices(self, limit_bytes: int = 0) -> Iterator[tuple[int, int]]:
        for start in range(0, self.n_rows, 3):
            yield start, min(start + 3, self.n_rows)


@pytest.mark.parametrize(("rounder", "columns"), [("nearest", 50), ("auto", 50), ("auto", 64), ("auto", 33)])
def test_slices_cut_no_block(rounder: Any, columns: int) -> None:
    """Blocks cross rows of 50 and 33 weights, of which 32 and 64 are a whole number of blocks."""
    rows = np.random.default_rng(6).standard_normal((80, columns)).astype(np.float32)
    assigned = Assigned("a.weight", rows.shape, "F32", "NF4", 64)
    packer, found = BitsandbytesPacker(), []
    for kind in (ComputedTensor, FewRows):
        ref = kind("a.weight", rows.shape, "F32", lambda start, stop: rows[start:stop])
        encoding = packer.encode(assigned, Matrix(ref, Path("model"), None, rounder))
        parts = {
            part.suffix: b"".join(bytes(chunk) for chunk in encoding.chunks(part.suffix))
            for part in reversed(packer.parts(assigned))  # the order of asking is the file's
        }
        found.append((parts, encoding.outcome().rounder))
    assert found[0] == found[1] and found[0][1] == ("nearest" if rounder == "nearest" else "weighted")
    for part in packer.parts(assigned):
        width = {"U8": 1, "F32": 4}[part.dtype]
        assert len(found[0][0][part.suffix]) == width * int(np.prod(part.shape))


def test_weights_too_large_for_scales_are_refused(tmp_path: Path) -> None:
    rows = np.full((8, 64), 3e38, np.float32)
    rows[0] = np.where(np.arange(64) == 0, -3e38, 2.1e38)  # a scale below zero suits these
    ref = ComputedTensor("a.weight", rows.shape, "F32", lambda start, stop: rows[start:stop])
    encoding = BitsandbytesPacker().encode(
        Assigned("a.weight", rows.shape, "F32", "NF4", 64), Matrix(ref, tmp_path)
    )
    with pytest.raises(BitsmithError, match=r"'a\.weight': is too large for float32 scales"):
        list(encoding.chunks("weight"))
