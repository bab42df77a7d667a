"""Real llama-quantize, llama-imatrix and llama-perplexity: found, or built from llama-cpp-python's sdist.

    python benchmarks/peer.py [--llama-bin DIR]

Prints where the tools are and what they say of their version; without `--llama-bin` the first run downloads
the source (72 MB) and builds it with CMake, about 15 minutes on 2 cores, into `~/.cache/bitsmith-bench`. They
serve comparisons only; bitsmith never depends on them. The other benchmarks import this module.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SDIST = "llama-cpp-python==0.3.34"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitsmith-bench"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
# weights repacked for AMX die with "Illegal instruction" on some machines
RUN_OPTIONS = ("--no-repack",)

ATTEMPTS = 8
LAST_WORDS = "Same top p:"

# the converter knows tokenizers by a hash of known ones, which those of synthetic checkpoints are not among
_CONVERT = """
import runpy, sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""

_FIGURES = {
    "mean_kld": "Mean    KLD",
    "max_kld": "Maximum KLD",
    "kld_99_9": "99.9%   KLD",
    "kld_99": "99.0%   KLD",
    "median_kld": "Median  KLD",
    "ppl_cand": "Mean PPL(Q)",
    "ppl_ref": "Mean PPL(base)",
    "ln_ppl_ratio": "Mean ln(PPL(Q)/PPL(base))",
    "ppl_ratio": "Mean PPL(Q)/PPL(base)",
    "ppl_difference": "Mean PPL(Q)-PPL(base)",
    "top1_percent": "Same top p",
}


@dataclass(frozen=True)
class Ran:
    """One finished command: what it printed (both streams), wall seconds, peak resident bytes.

    The peak is the kernel's `ru_maxrss` of the child, which is never below what the parent held when it
    started it.
    """

    command: tuple[str, ...]
    output: str
    seconds: float
    peak_bytes: int


def run(command: Sequence[str | Path]) -> Ran:
    """Run a command to its end; exits with the end of what it printed where it fails."""
    words = tuple(map(str, command))
    started = time.monotonic()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        output = child.stdout.read() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode}: {' '.join(words)}\n{output[-2000:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ran(words, output, time.monotonic() - started, peak)


@dataclass(frozen=True)
class Peer:
    """The folder of llama.cpp's tools; `threads` is what each may use."""

    folder: Path
    threads: int

    def version(self) -> str:
        """Return what the tools say of themselves, in one line."""
        said = run([self.folder / "llama-perplexity", "--version"]).output
        return "; ".join(line.strip() for line in said.splitlines() if line.startswith(("version", "built")))

    def convert_command(self, model: Path, out: Path, type_name: str = "bf16") -> list[str | Path]:
        """Return the command that makes a 16-bit GGUF of a Hugging Face folder by convert_hf_to_gguf.py.

        Exits where the script or what it imports is missing.
        """
        script = self.folder.parents[1] / "convert_hf_to_gguf.py"
        if not script.is_file():
            raise SystemExit(f"{self.folder}: no convert_hf_to_gguf.py two folders above")
        missing = [name for name in ("torch", "transformers", "numpy") if find_spec(name) is None]
        if missing:
            raise SystemExit(f"{script} needs {', '.join(missing)}")
        words = [sys.executable, "-c", _CONVERT, script.parent, model, "--outfile", out]
        return [*words, "--outtype", type_name]

    def quantize_command(self, model: Path, out: Path, type_name: str) -> list[str | Path]:
        """Return the command that quantizes a GGUF to a stock mix by llama-quantize, without importance."""
        return [self.folder / "llama-quantize", model, out, type_name, str(self.threads)]

    def imatrix(self, model: Path, text: Path, out: Path, ctx_tokens: int, chunks: int, *, head: bool) -> Ran:
        """Collect an importance matrix of `text`; with `head` also of the output head's inputs."""
        options = ("--process-output",) if head else ()
        return run([*self._on("llama-imatrix", model, text, ctx_tokens, chunks), "-o", out, *options])

    def quantize(
        self,
        model: Path,
        out: Path,
        type_name: str,
        *,
        imatrix: Path | None = None,
        embedding: str | None = None,
        tensor_types: Mapping[str, str] | None = None,
    ) -> Ran:
        """Quantize `model` to a stock mix; `tensor_types` overrides by regex on names, first match first.

        llama-quantize ignores `--tensor-type` where it is given `--pure`; a last override that matches every
        weight does the same.
        """
        options: list[str | Path] = [*(("--imatrix", imatrix) if imatrix else ())]
        options += ["--token-embedding-type", embedding.lower()] if embedding else []
        for name, chosen in (tensor_types or {}).items():
            options += ["--tensor-type", f"{name}={chosen.lower()}"]
        words = [self.folder / "llama-quantize", *options, model, out, type_name, str(self.threads)]
        return run(words)

    def base_logits(self, model: Path, text: Path, out: Path, ctx_tokens: int, chunks: int) -> Ran:
        """Store the reference's log-probabilities (16 bits each) of the text's first `chunks` chunks."""
        return run(
            [
                *self._on("llama-perplexity", model, text, ctx_tokens, chunks),
                "--kl-divergence-base",
                out,
            ]
        )

    def divergence(
        self, model: Path, text: Path, base: Path, ctx_tokens: int, chunks: int
    ) -> tuple[dict[str, float], Ran]:
        """Judge `model` against stored log-probabilities; figures as `parsed` returns them.

        On a busy machine the tool can end before its logger has printed everything (llama.cpp#22142): such a
        run is repeated.
        """
        words = self._on("llama-perplexity", model, text, ctx_tokens, chunks)
        for _ in range(ATTEMPTS):
            ran = run([*words, "--kl-divergence", "--kl-divergence-base", base])
            if LAST_WORDS in ran.output:
                break
        return parsed(ran.output), ran

    def _on(self, tool: str, model: Path, text: Path, ctx_tokens: int, chunks: int) -> list[str | Path]:
        words: list[str | Path] = [self.folder / tool, "-m", model, "-f", text, "-c", str(ctx_tokens)]
        return [*words, "--chunks", str(chunks), "-t", str(self.threads), *RUN_OPTIONS]


def parsed(output: str) -> dict[str, float]:
    """Return llama-perplexity's figures, KLD in nats; `*_se` is the standard error it prints behind ±.

    Exits where a figure is missing: the text was too short or the tool's words have changed.
    """
    number = r"(-?[\d.]+(?:e[-+]?\d+)?|-?nan|-?inf)"
    figures: dict[str, float] = {}
    for name, label in _FIGURES.items():
        found = re.search(rf"^{re.escape(label)}\s*:\s*{number}(?:\s*±\s*{number})?", output, re.MULTILINE)
        if found is None:
            raise SystemExit(f"llama-perplexity printed no {label!r}:\n{output[-2000:]}")
        figures[name] = float(found[1])
        if found[2]:
            figures[f"{name}_se"] = float(found[2])
    return figures


def find_peer(folder: Path | None = None, threads: int | None = None) -> Peer:
    """Return the tools in `folder`, else in LLAMA_BIN's, else in the cache, built where they are missing."""
    named = os.environ.get("LLAMA_BIN")
    place = folder or (Path(named) if named else None) or _built(CACHE / SDIST.replace("==", "-"))
    missing = [tool for tool in TOOLS if not (place / tool).is_file()]
    if missing:
        raise SystemExit(f"{place}: no {', '.join(missing)}")
    return Peer(place.resolve(), threads or os.cpu_count() or 1)


def _built(work: Path) -> Path:
    source = work / "source" / "vendor" / "llama.cpp"
    folder = source / "build" / "bin"
    if not all((folder / tool).is_file() for tool in TOOLS):
        if not source.is_dir():
            _unpack(work)
        print(f"building llama.cpp in {source}", file=sys.stderr, flush=True)
        run(["cmake", "-S", source, "-B", source / "build", *CMAKE_OPTIONS])
        run(["cmake", "--build", source / "build", "-j", str(os.cpu_count() or 1), "--target", *TOOLS])
    return folder


def _unpack(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    options = ("--no-deps", "--no-binary", ":all:", "--dest", work, SDIST)
    run([sys.executable, "-m", "pip", "download", *options])
    (archive,) = work.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    (unpacked,) = (path for path in work.glob("llama_cpp_python-*") if path.is_dir())
    unpacked.rename(work / "source")


def sha256_of(path: Path) -> str:
    """Return the digest of a file, or of the names and contents of a folder's files."""
    if path.is_dir():
        lines = [f"{file.name} {sha256_of(file)}" for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-bin", type=Path, help="folder of the tools; default: built and cached")
    peer = find_peer(parser.parse_args().llama_bin)
    print(json.dumps({"folder": str(peer.folder), "source": SDIST, "version": peer.version()}, indent=1))


if __name__ == "__main__":
    main()
