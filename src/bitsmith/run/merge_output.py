"""Write a merged student as a normal checkpoint: a tensor in memory at a time, resumably."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitsmith.archs.tokenizer import tokenizer_folder
from bitsmith.passes.merge_fold import MergedView
from bitsmith.progress import Progress
from bitsmith.run.decoded import relative_error
from bitsmith.run.folder import SIDE_FILES
from bitsmith.run.merge_written import WrittenTensor, as_written
from bitsmith.run.record import TensorFacts, output_record
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Chunk, Content, Finish, atomic_folder
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.journal import Key
from bitsmith.store.manifest import write_manifest
from bitsmith.store.parts import Parts, finished_parts
from bitsmith.store.safetensors import INDEX_NAME, SINGLE_NAME, side_file, side_files
from bitsmith.store.safetensors_writer import SHARD_BYTES, TensorData, write_safetensors

CONFIG_NAME = "config.json"
_COPIED_BYTES = 16 << 20


def write_merged(
    view: MergedView,
    folder: Path,
    key: Key,
    *,
    sources: Iterable[Path] = (),
    shard_bytes: int = SHARD_BYTES,
    finish: Finish | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the student's checkpoint with what `view` changes; return how many tensors changed and did not.

    Tensors keep names, order and types; packed weights become BF16, without a `quantization_config`. What is
    not changed has the student's own bytes. Tensors are made one after the other beside the folder, where a
    killed run of the same `key` finds those it had finished; `finish` is told of the whole folder before it
    appears. Raises as `write_safetensors` does.
    """
    made = as_written(view)
    changed = {name: ref for name, ref in made.items() if isinstance(ref, WrittenTensor)}

    def make(parts: Parts, name: str) -> tuple[list[str], dict[str, Any]]:
        parts.write(name, _raw(changed[name]))
        return [name], {}

    def folded(_: str, done: int, total: int) -> None:
        progress("fold", done, total)

    with finished_parts(folder, key, list(changed), make, folded, overwrite=True) as parts:
        total = sum(ref.nbytes for ref in made.values())
        done = 0

        def chunks(ref: TensorRef) -> Iterator[Chunk]:
            nonlocal done
            for chunk in parts.read(ref.name) if ref.name in changed else _raw(ref):
                yield chunk
                done += chunk.nbytes
                progress("write", done, total)

        tensors = [TensorData(ref.name, ref.dtype, ref.shape, chunks(ref)) for ref in made.values()]
        write_safetensors(
            folder,
            tensors,
            _config(view),
            shard_bytes=shard_bytes,
            files=side_files(tokenizer_folder(view), SIDE_FILES),
            overwrite=True,
            sources=sources,
            finish=finish,
        )
        resumed = parts.resumed
    return {"tensors_changed": len(changed), "tensors_kept": len(made) - len(changed), "resumed": resumed}


def copy_student(
    student: Checkpoint, folder: Path, *, finish: Finish | None = None, progress: Progress
) -> dict[str, Any]:
    """Write the student as it is stored, byte for byte: its shards, config and tokenizer.

    Raises OutputError as `atomic_folder` does.
    """
    index = side_file(_home(student), INDEX_NAME) if len(student.files) > 1 else None
    last = SINGLE_NAME if index is None else INDEX_NAME
    names = {file: file.name if index is not None else SINGLE_NAME for file in student.files}
    texts = side_files(tokenizer_folder(student), SIDE_FILES) | side_files(_home(student), [CONFIG_NAME])
    texts |= {} if index is None else {INDEX_NAME: index}
    total = sum(file.stat().st_size for file in student.files)
    done = 0
    with atomic_folder(
        folder, last=last, stale=lambda _: True, overwrite=True, expect_bytes=total, finish=finish
    ) as part:
        for name, raw in texts.items():
            (part / name).write_bytes(raw)
        for file, name in names.items():
            with file.open("rb") as source, (part / name).open("wb") as target:
                while chunk := source.read(_COPIED_BYTES):
                    target.write(chunk)
                    done += len(chunk)
                    progress("write", done, total)
    return {"tensors_changed": 0, "tensors_kept": len(student), "resumed": 0}


def recorder(
    student: Checkpoint, folder: Path, sources: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> Finish:
    """Return what writes the record and the manifest of a merge in `folder`, told of it before it appears.

    Errors of tensors are to the student's, as both are read: how far the merge moved each.
    """

    def finish(content: Content) -> None:
        with open_checkpoint(content[CONFIG_NAME].parent) as made:
            rows = [
                TensorFacts(name, name, ref.dtype, ref.shape, _moved(student, ref))
                for name, ref in made.items()
            ]
        write_manifest(folder, output_record(folder, "merge", sources, options, rows), content=content)

    return finish


def _moved(student: Checkpoint, ref: TensorRef) -> float | None:
    own = student.get(ref.name)
    return None if own is None or own.shape != ref.shape else relative_error(own, ref)


def _home(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _raw(ref: TensorRef) -> Iterator[Any]:
    for start, stop in ref.slices():
        yield ref.raw(start, stop)


def _config(view: MergedView) -> dict[str, Any]:
    return dict(view.config)
