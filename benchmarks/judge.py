"""Two judges of a compressed file on the same chunks of a text: real llama-perplexity, and bitsmith's own.

llama-perplexity runs the file as a user would, its activations rounded to 8 bits on a CPU, which adds a floor
to every KLD; it prints a standard error over tokens. Bitsmith decodes the file to float32 and keeps every
token's score, so that two files can be compared by a paired bootstrap over chunks. What a judge found is kept
by the digests of file and text. `benchmarks/quality.py` imports this module.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from peer import Peer, sha256_of

from bitsmith.numerics.divergence import TokenScores, estimates, resampled_quantiles
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.forward import compare, final_hidden_states

RESAMPLES = 2000
OWN = ("mean_kld", "median_kld", "kld_99", "kld_99_9", "max_kld", "top1_agreement", "ppl_cand", "ppl_ref")


@dataclass(frozen=True)
class Window:
    """What is scored: the second half of each of the first `chunks` chunks of `ctx_tokens` of `text`."""

    text: Path
    ctx_tokens: int
    chunks: int

    def key(self) -> str:
        """Name the window by the text's digest and the sizes."""
        return f"{sha256_of(self.text)[:12]}-{self.ctx_tokens}x{self.chunks}"


@dataclass(frozen=True)
class Judge:
    """Both judges of one model's candidates against `reference`, a GGUF; `folder` keeps what they found."""

    reference: Path
    folder: Path
    peer: Peer

    def by_llama(self, candidate: Path, window: Window) -> dict[str, float]:
        """Return llama-perplexity's figures."""
        kept = self._kept(candidate, window, ".json")
        if not kept.exists():
            base = self.folder / f"base-{window.key()}.kld"
            sizes = (window.ctx_tokens, window.chunks)
            if not base.exists():
                part = base.with_suffix(".part")
                self.peer.base_logits(self.reference, window.text, part, *sizes)
                part.rename(base)
            figures, _ = self.peer.divergence(candidate, window.text, base, *sizes)
            kept.write_text(json.dumps(figures))
        return {name: float(value) for name, value in json.loads(kept.read_text()).items()}

    def by_bitsmith(self, candidate: Path, window: Window) -> TokenScores:
        """Return bitsmith's scores of every token (`chunks tokens`)."""
        kept = self._kept(candidate, window, ".npz")
        if not kept.exists():
            scores = _scores(self.reference, candidate, window)
            np.savez_compressed(kept, **vars(scores))
        with np.load(kept) as stored:
            return TokenScores(**stored)

    def _kept(self, candidate: Path, window: Window, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{sha256_of(candidate)[:16]}-{window.key()}{suffix}"


@cache
def _reference_states(reference: Path, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return token chunks (`chunks ctx`) and the reference's hidden states at the scored positions."""
    with open_model(reference) as model:
        tokens, _ = text_chunks(model, window.text, window.ctx_tokens, window.chunks)
        return tokens, final_hidden_states(model, tokens, window.ctx_tokens // 2)


def _scores(reference: Path, candidate: Path, window: Window) -> TokenScores:
    tokens, states = _reference_states(reference, window)
    half = window.ctx_tokens // 2
    with open_model(reference) as base, open_model(candidate) as model:
        found = final_hidden_states(model, tokens, half)
        flat = states.reshape(-1, states.shape[-1]), found.reshape(-1, found.shape[-1])
        return compare(base, model, flat, tokens[:, half + 1 :].reshape(-1)).reshape(len(tokens))


def own_figures(scores: TokenScores) -> dict[str, list[float | None]]:
    """Return bitsmith's figures of one file, each as value and 95 % bootstrap interval over chunks."""
    found = estimates(scores, RESAMPLES)
    return {name: [found[name].value, found[name].low, found[name].high] for name in OWN}


def paired_ratios(ours: TokenScores, peers: TokenScores) -> dict[str, list[float]]:
    """Return ours over the peer's on the same chunks, each as value and 95 % paired bootstrap interval.

    `mean_kld`, `kld_99`, `kld_99_9` and `ppl` are ratios; `top1` is a difference of shares.
    """
    chunks = len(ours.kld)
    draws = np.random.default_rng(0).multinomial(chunks, np.full(chunks, 1 / chunks), size=RESAMPLES)
    counts = np.vstack([np.ones(chunks, np.int64), draws])  # the first row is the sample itself
    share = counts / chunks
    tails = [resampled_quantiles(side.kld, counts, np.array([0.99, 0.999])) for side in (ours, peers)]
    measures = {
        "mean_kld": (share @ ours.kld.mean(axis=1)) / (share @ peers.kld.mean(axis=1)),
        "kld_99": tails[0][:, 0] / tails[1][:, 0],
        "kld_99_9": tails[0][:, 1] / tails[1][:, 1],
        "ppl": np.exp(share @ (ours.nll_cand - peers.nll_cand).mean(axis=1)),
        "top1": share @ (ours.same_top.mean(axis=1) - peers.same_top.mean(axis=1)),
    }
    return {name: [float(all_[0]), *_interval(all_[1:])] for name, all_ in measures.items()}


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def printed_ratios(ours: dict[str, float], peers: dict[str, float]) -> dict[str, float]:
    """Return ours over the peer's of llama-perplexity's figures.

    `mean_kld_se` propagates both standard errors as if independent; on the same tokens they are not, so it
    is too wide. `ln_ppl` and `top1` are differences, of ln PPL and of shares.
    """
    mean = ours["mean_kld"] / peers["mean_kld"]
    spread = math.hypot(*(side["mean_kld_se"] / side["mean_kld"] for side in (ours, peers)))
    return {
        "mean_kld": mean,
        "mean_kld_se": mean * spread,
        "kld_99": ours["kld_99"] / peers["kld_99"],
        "kld_99_9": ours["kld_99_9"] / peers["kld_99_9"],
        "ppl": ours["ppl_cand"] / peers["ppl_cand"],
        "ln_ppl": math.log(ours["ppl_cand"] / peers["ppl_cand"]),
        "top1": (ours["top1_percent"] - peers["top1_percent"]) / 100,
    }
