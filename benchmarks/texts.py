"""Texts for the benchmarks: calibration, held out of the same kind, and English prose unlike it.

    python benchmarks/texts.py FOLDER [--tokens 102400]

The first two are pieces of about 8 kB of the lab's corpus (the Python standard library's sources), of its
training and of its held-out split, in a seeded order, so that they spread over the documents. The third is
the prose in the descriptions of the Python packages installed here, in a seeded order: the same environment
gives the same text, another one the same kind. The other benchmarks import this module.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from bitsmith.run.corpus import documents

BYTES_PER_TOKEN = 6
"""More than any tokenizer here makes of a token, so that a text cut to bytes never falls short of tokens."""
_PIECE_BYTES = 8192
_MIN_WORDS = 12
_MIN_LETTERS = 0.7


def corpus_text(limit_tokens: int, *, held_out: bool) -> str:
    """Return pieces of one split of the lab's corpus, at least `limit_tokens` tokens if it has them."""
    pieces = [piece for text in documents(held_out) for piece in _pieces(text)]
    return _shuffled(pieces, limit_tokens * BYTES_PER_TOKEN)


def package_prose(limit_tokens: int) -> str:
    """Return prose of the installed packages' descriptions, no paragraph twice, at most what there is."""
    bodies = {each.metadata["Name"].lower(): each.metadata.get_payload() or "" for each in distributions()}
    paragraphs = dict.fromkeys(text for name in sorted(bodies) for text in _prose(str(bodies[name])))
    return _shuffled(list(paragraphs), limit_tokens * BYTES_PER_TOKEN)


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in runs of whole lines of at least `_PIECE_BYTES`, the last one shorter."""
    held, size = [], 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line.encode())
        if size >= _PIECE_BYTES:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _prose(body: str) -> Iterator[str]:
    without = re.sub(r"```.*?```|<[^>]+>|\[!\[.*?\)\]\(.*?\)", " ", body, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", without):
        words = " ".join(paragraph.split())
        letters = re.findall(r"[^\W\d_]+", words)
        foreign = "http" in words or "|" in words or words.startswith((">>>", "..", "$", "-", "*", "#"))
        if len(letters) >= _MIN_WORDS and not foreign and len("".join(letters)) >= _MIN_LETTERS * len(words):
            yield words + "\n"


def _shuffled(pieces: list[str], limit_bytes: int) -> str:
    random.Random(0).shuffle(pieces)
    size, taken = 0, []
    for piece in pieces:
        if size >= limit_bytes:
            break
        taken.append(piece)
        size += len(piece.encode())
    return "\n".join(taken)


def write_texts(folder: Path, calibration_tokens: int, held_tokens: int) -> dict[str, Path]:
    """Write `calibration.txt`, `like.txt` and `unlike.txt`; return them by name without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "calibration": corpus_text(calibration_tokens, held_out=False),
        "like": corpus_text(held_tokens, held_out=True),
        "unlike": package_prose(held_tokens),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in texts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bench-texts"))
    parser.add_argument("--tokens", type=int, default=102_400)
    args = parser.parse_args()
    for name, path in write_texts(args.folder, args.tokens, args.tokens // 4).items():
        print(f"{name}: {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
