"""A GGUF being written: its source is read once, and a killed run goes on only from the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.errors import OutputError
from bitsmith.run import gguf_job
from bitsmith.run.cellm import write_cellm
from bitsmith.run.execute import Record, compress
from bitsmith.run.folder import write_folder
from bitsmith.run.verify import verify
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Bytes
from bitsmith.store.manifest import digest_of
from bitsmith.store.stored import SourceFile


class Reads:
    """Counts the bytes that are read of model files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes, self._read = 0, SourceFile.read

        def read(file: SourceFile, offset: int, length: int) -> Bytes:
            if file.path.suffix == ".safetensors":
                self.nbytes += length
            return self._read(file, offset, length)

        monkeypatch.setattr(SourceFile, "read", read)


def stored_bytes(model: Path) -> int:
    """Return the bytes of a model's headers and tensors."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_every_stored_byte_is_read_once(
    tiny_qwen3_5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of tensors whose rows change their order, and of those that no tensor is made of (vision).

    Norms, a few KB, are looked at before, to tell a layout.
    """
    out, stored, reads = tmp_path / "out.gguf", stored_bytes(tiny_qwen3_5), Reads(monkeypatch)
    model = tmp_path / "model"  # of which nothing in this process has a digest yet
    shutil.copytree(tiny_qwen3_5, model)
    record = compress(model, out, "Q8_0")
    assert stored <= reads.nbytes < 1.001 * stored
    reads.nbytes = 0
    assert verify(out, model).passed
    assert 0 < reads.nbytes < 1.001 * stored
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.source_digest == record.source["sha256"]
    assert digest_of(out) == record.sha256


@pytest.mark.parametrize("kind", ["i4", "W4A16"])
def test_other_formats_read_every_stored_byte_once(
    kind: str, tiny_qwen3_5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed, and what is copied as it is: each is hashed as it is read."""
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen3_5, model)
    stored, reads = stored_bytes(model), Reads(monkeypatch)
    if kind == "i4":
        write_cellm(model, tmp_path / "out.cellm", kind)
    else:
        write_folder(model, tmp_path / "out", kind)
    assert stored <= reads.nbytes < 1.005 * stored


def stopped(model: Path, out: Path, at: int, **options: Any) -> None:
    """Compress up to the `at`-th report of progress, all that is finished by then kept."""
    seen = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal seen
        seen += stage == "compress"
        if seen == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, out, "Q8_0", progress=progress, **options)


def finished(out: Path) -> list[str]:
    """Return the stored tensors that finished ones were made of."""
    lines = (out.parent / f".{out.name}.parts" / "journal").read_text().splitlines()[1:]
    return [name for line in lines for name in json.loads(line)["value"]["sources"]]


def with_one_less(model: Path, name: str) -> None:
    """Change the last stored weight of a tensor by its last bit."""
    with open_checkpoint(model) as checkpoint:
        ref: Any = checkpoint[name]
        place, last = ref.offset + ref.nbytes - 2, int(ref.raw()[-2])
    with ref.file.path.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes([last ^ 1]))


@pytest.fixture
def killed(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A copy of the demo model, and the output of a run of it that was stopped half way."""
    monkeypatch.setattr(gguf_job, "KEPT_BYTES", 1)
    model, out = tmp_path / "model", tmp_path / "out.gguf"
    shutil.copytree(demo_model, model)
    stopped(model, out, 40)
    assert not out.exists() and 3 < len(finished(out)) < 40
    return model, out


def fresh(model: Path, folder: Path) -> Record:
    folder.mkdir()
    return compress(model, folder / "out.gguf", "Q8_0")


def test_a_stopped_run_goes_on_without_encoding_again(killed: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = killed
    kept = len(finished(out))
    record = compress(model, out, "Q8_0")
    assert record.resumed >= kept - 1
    assert record.sha256 == digest_of(out) == fresh(model, tmp_path / "fresh").sha256
    assert not (tmp_path / ".out.gguf.parts").exists()


def test_a_finished_tensor_of_other_weights_is_refused_by_name(
    killed: tuple[Path, Path], tmp_path: Path
) -> None:
    model, out = killed
    name = finished(out)[2]
    with_one_less(model, name)
    with pytest.raises(OutputError, match=f"tensor '{name}': .* with another source, .* --overwrite"):
        compress(model, out, "Q8_0")
    assert not out.exists()
    record = compress(model, out, "Q8_0", overwrite=True)
    assert record.resumed == 0
    assert record.sha256 == digest_of(out) == fresh(model, tmp_path / "fresh").sha256


def test_weights_that_nothing_was_made_of_yet_may_change(killed: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = killed
    with open_checkpoint(model) as checkpoint:
        [name] = [name for name in checkpoint if name.endswith("layers.3.mlp.down_proj.weight")]
        was = checkpoint.source_digest
    assert name not in finished(out)
    with_one_less(model, name)
    record = compress(model, out, "Q8_0")
    assert record.resumed > 0 and record.source["sha256"] != was
    assert record.sha256 == digest_of(out) == fresh(model, tmp_path / "fresh").sha256


def test_a_file_that_is_gone_from_beside_its_journal_is_begun_anew(killed: tuple[Path, Path]) -> None:
    model, out = killed
    (out.parent / ".out.gguf.parts" / "file").unlink()
    record = compress(model, out, "Q8_0")
    assert record.resumed == 0 and digest_of(out) == record.sha256


def test_what_is_read_in_any_order_gives_the_same_digest(tiny_qwen3: Path) -> None:
    with open_checkpoint(tiny_qwen3) as whole:
        expected = whole.source_digest
    with open_checkpoint(tiny_qwen3) as checkpoint:
        assert checkpoint.hash_reads()
        rng = np.random.default_rng(0)
        for ref in checkpoint.values():
            for _ in range(3):
                start, stop = sorted(rng.integers(0, ref.n_rows + 1, 2))
                ref.raw(int(start), int(stop))
        read = checkpoint.digests_of_read()
        assert set(read) == set(checkpoint) and not checkpoint.digests_of_read()
        assert checkpoint.source_digest == expected


def test_a_source_is_hashed_once_in_a_process_until_it_changes(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(demo_model) as checkpoint:
        first, nbytes = checkpoint.source_digest, sum(ref.nbytes for ref in checkpoint.values())
    reads = Reads(monkeypatch)
    with open_checkpoint(demo_model) as checkpoint:
        assert checkpoint.source_digest == first
    assert reads.nbytes < nbytes / 100
    changed = shutil.copytree(demo_model, tmp_path / "changed")
    with_one_less(changed, "model.norm.weight")
    reads.nbytes = 0
    with open_checkpoint(changed) as checkpoint:
        assert checkpoint.source_digest != first
    assert reads.nbytes > nbytes
