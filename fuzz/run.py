"""Fuzz one reader with atheris: `python fuzz/run.py gguf --inputs 1000000 --corpus DIR --json FILE`.

A child process runs libFuzzer; it may not take more than 64 MB beyond what it had (an RLIMIT_AS that moves
with it), and no input may take longer than ten seconds. What the child counts lies in shared memory, so that
nothing is lost when it dies. Faults are kept as files beside the corpus, and make the exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import re
import resource
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple, NoReturn

import numpy as np

ALLOWED_BYTES = 64 << 20
"""What an input may make a reader allocate."""
HANG_SECONDS = 10
MAX_INPUT_BYTES = 1 << 15
REBASED_EVERY = 256
TOKENS = (
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"weight_map"', b'"quant_method"'),
    *(b'"BF16"', b'"F8_E4M3"', b'"U8"', b'"I32"', b"general.alignment", b"split.count", b".in_sum2"),
    *(b".counts", b"imatrix.datasets", b".qscale", b"\\ud800", b"../", b"null", b"1e999", b"NaN", b"[[[["),
)
INSTRUMENTED = (
    "bitsmith.archs",
    "bitsmith.store",
    "bitsmith.run.inspect",
    "bitsmith.run.plan_file",
    "bitsmith.run.strict_yaml",
    "bitsmith.run.study_file",
)
"""Modules whose branches libFuzzer sees, by what their names begin with."""


class Counts:
    """Counters in a file that parent and child share."""

    FIELDS = ("inputs", "taken", "slowest_s")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(self.FIELDS)))
        with path.open("r+b") as file:
            self.values = np.frombuffer(mmap.mmap(file.fileno(), 0), np.float64)

    def add(self, taken: bool, seconds: float) -> None:
        """Count an input."""
        self.values[0] += 1
        self.values[1] += taken
        self.values[2] = max(self.values[2], seconds)


class Fuzzed(NamedTuple):
    """What came of fuzzing a reader; `traced_bytes` is the most that an input of the corpus allocated."""

    reader: str
    inputs: int
    taken: int
    refused: int
    seconds: float
    slowest_s: float
    edges: int
    features: int
    corpus: int
    corpus_bytes: int
    traced_bytes: int
    faults: list[str]


def main() -> int:
    """Run as the command line says."""
    options = _options()
    if options.child:
        _fuzz(options)
        return 0
    found = fuzz(options.reader, options.inputs, options.seconds, options.corpus, options.seed)
    text = json.dumps(found._asdict(), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 1 if found.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="0: as long as the inputs take")
    parser.add_argument("--corpus", type=Path, default=None, help="kept and grown; default: thrown away")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def fuzz(reader: str, inputs: int, seconds: int, corpus: Path | None, seed: int) -> Fuzzed:
    """Fuzz a reader until so many inputs, so many seconds or a fault."""
    from readers import READERS, scratch
    from seeds import seeds

    if reader not in READERS:
        raise SystemExit(f"no reader {reader}; there are: {', '.join(READERS)}")
    passing = scratch()
    corpus = corpus or passing / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for place in (Path(__file__).parent / "corpus" / reader,):
        for file in sorted(place.glob("*")):
            (corpus / file.name).write_bytes(file.read_bytes())
    for number, data in enumerate(seeds(reader)):
        (corpus / f"seed-{number}").write_bytes(data)
    faults = corpus.parent / f"{corpus.name}-faults"
    faults.mkdir(exist_ok=True)
    counts = Counts(passing / "counts")
    started = time.monotonic()
    command = [sys.executable, sys.argv[0], "--child", reader, f"--inputs={inputs}", f"--seconds={seconds}"]
    log = subprocess.run(
        [*command, f"--corpus={corpus}", f"--seed={seed}"],
        env=os.environ | {"BITSMITH_FUZZ": str(passing), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        check=False,
    )
    spent = time.monotonic() - started
    said = log.stderr.decode(errors="replace")
    kept = sorted(str(file) for file in faults.iterdir())
    if log.returncode and not kept:
        kept = [f"exit status {log.returncode}"]
    if kept:
        print(said[-6000:], file=sys.stderr)
    reached = re.findall(r"cov: (\d+) ft: (\d+)", said) or [("0", "0")]
    files = [file for file in corpus.iterdir() if file.is_file()]
    found = Fuzzed(
        reader,
        int(counts.values[0]),
        int(counts.values[1]),
        int(counts.values[0] - counts.values[1]),
        round(spent, 1),
        round(float(counts.values[2]), 3),
        *map(int, reached[-1]),
        len(files),
        sum(file.stat().st_size for file in files),
        0 if kept else traced_bytes(reader, files, passing),
        kept,
    )
    rmtree(passing)
    return found


def traced_bytes(reader: str, files: Iterable[Path], folder: Path) -> int:
    """Return the most bytes that one of the inputs in `files` made the reader allocate."""
    from readers import READERS

    most = 0
    for file in files:
        data = file.read_bytes()
        READERS[reader](data, folder)  # caches are filled
        tracemalloc.start()
        READERS[reader](data, folder)
        most = max(most, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return most


class _Limit:
    """Lets the process have so much more than it has: what is beyond is a MemoryError, which is a fault."""

    def __init__(self) -> None:
        self._page = resource.getpagesize()
        self._calls = 0

    def rebase(self) -> None:
        """Move the limit to what the process has now, now and then."""
        if self._calls % REBASED_EVERY == 0:
            has = int(Path("/proc/self/statm").read_text().split()[0]) * self._page
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (has + ALLOWED_BYTES, hard))
        self._calls += 1


def _fuzz(options: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=["bitsmith"], exclude=_not_instrumented()):
        from readers import READERS
    from changes import changed
    from seeds import seeds

    folder = Path(os.environ["BITSMITH_FUZZ"])
    reader, counts, limit = READERS[options.reader], Counts(folder / "counts"), _Limit()
    for data in seeds(options.reader):  # what is loaded and compiled at first is not the inputs' doing
        reader(data, folder)

    faults = options.corpus.parent / f"{options.corpus.name}-faults"

    def one(data: bytes) -> None:
        limit.rebase()
        started = time.perf_counter()
        taken = False
        try:
            taken = reader(data, folder)
        except BaseException:  # atheris' own way out runs Python's, during which libFuzzer's alarm kills
            _keep(faults, data)
        finally:
            counts.add(taken, time.perf_counter() - started)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return changed(reader, data, most, seed, atheris.Mutate)

    dictionary = folder / "tokens"
    dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in TOKENS))
    atheris.Setup(
        [
            sys.argv[0],
            str(options.corpus),
            f"-runs={options.inputs}",
            f"-max_total_time={options.seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-timeout={HANG_SECONDS}",
            f"-artifact_prefix={faults}/",
            f"-dict={dictionary}",
            f"-seed={options.seed}",
            "-len_control=0",
            "-rss_limit_mb=0",
            "-print_final_stats=1",
        ],
        one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def _keep(faults: Path, data: bytes) -> NoReturn:
    """Keep an input that was a fault, say what happened and end the process."""
    resource.setrlimit(
        resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1])
    )
    traceback.print_exc()
    (faults / f"crash-{hashlib.sha256(data).hexdigest()[:40]}").write_bytes(data)
    sys.stderr.flush()
    os._exit(1)


def _not_instrumented() -> list[str]:
    """Return the other modules: numba compiles what it finds, and counters are not for it."""
    root = Path(__file__).parent.parent / "src"
    files = (file.relative_to(root).with_suffix("") for file in root.glob("bitsmith/**/*.py"))
    names = (".".join(file.parts).removesuffix(".__init__") for file in files)
    return [name for name in names if not name.startswith(INSTRUMENTED)]


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
