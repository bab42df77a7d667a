"""A study that has every part of a report, with hostile text in each."""

from __future__ import annotations

from typing import Any

HOSTILE = '</script><img src=x onerror=console.error("ran")>"><b>bold</b>%{x}$y$\x1b[31m\u202e{{7*7}}'


def figure(value: float, unit: str = "nats", width: float = 0.1) -> dict[str, Any]:
    return {
        "value": value,
        "unit": unit,
        "low": value * (1 - width),
        "high": value * (1 + width),
        "interval": "95 %",
    }


def tensors(nbytes: int, error: float) -> list[dict[str, Any]]:
    roles = {"ffn.up": "mlp.up_proj", HOSTILE: HOSTILE, "attn.q": "self_attn.q_proj"}
    return [
        {
            "name": f"model.layers.{layer}.{name}.weight", "role": role, "layer": layer, "shape": [64, 64],
            "type": "Q4_K", "nbytes": nbytes, "squared_error": error**2,
        }
        for layer in range(3)
        for role, name in roles.items()
    ]  # fmt: skip


def everything() -> dict[str, Any]:
    """Every part of a report, hostile text in each."""
    made = [
        {
            "name": name, "group": group, "what": HOSTILE, "model": HOSTILE, "file_bytes": nbytes,
            "weights": 100_000, "bpw": 8 * nbytes / 100_000, "protocol": "p", "path": f"/x/{name}.gguf",
            "tensors": tensors(nbytes // 40, error),
            "measures": {
                "mean_kld": figure(kld), "ppl_cand": figure(20 + kld, "perplexity"), "mine": figure(kld),
            },
            "commands": [f"bitsmith compress tiny -o {name}"], "verdict": "PASS",
        }
        for name, group, nbytes, error, kld in (
            (HOSTILE, HOSTILE, 60_000, 0.05, 0.01),
            ("four", "int4", 50_000, 0.1, 0.02),
            ("svd", "low rank", 24_000, 0.98, 4.0),
        )
    ]  # fmt: skip
    original = {
        "name": "original", "group": "original", "is_original": True, "file_bytes": 200_000,
        "measures": {"ppl_cand": figure(20, "perplexity"), "mean_kld": {"value": 0, "unit": "nats"}},
    }  # fmt: skip
    line = {
        "when": "2026-01-01T00:00:00Z",
        "who": "gate",
        "artifact": "svd",
        "limit": 1.0,
        "decision": HOSTILE,
    }
    return {
        "bitsmith": "0", "title": f"Study {HOSTILE}", "artifacts": [original, *made],
        "peers": [{"name": HOSTILE, "source": "a card", "same_protocol": False, "file_bytes": 55_000,
                   "measures": {"mean_kld": figure(0.03)}}],
        "protocols": [{"name": "p", "settings": {"text": HOSTILE, "ctx_tokens": 512}}],
        "gates": [
            line | {"what": "total error", "outcome": "FAIL", "value": 1.2, "tensor": HOSTILE},
            line | {"what": "forward cosine", "outcome": "PASS", "value": 0.97, "artifact": "four"},
            line | {"what": "forward cosine", "outcome": "UNMEASURED", "evidence": {"why": [HOSTILE]}},
            line | {"what": "replanned", "artifact": "", "value": "inf"},
        ],
        "tasks": [{"name": "compress", "action": "compress", "status": "failed", "why": HOSTILE}],
        "claims": [{"claim": HOSTILE, "source": "published", "outcome": "NOT HELD", "found": "no better"}],
        "spectra": [
            {"name": HOSTILE, "role": HOSTILE, "layer": 0, "shape": [64, 64], "index": [1, 2, 64],
             "sigma": [4.0, 2.0, 0.5], "alpha": 3.5},
            {"name": "zero", "role": "ffn.up", "layer": 1, "shape": [64, 64], "index": [1], "sigma": [0.0]},
        ],
        "samples": [{"prompt": HOSTILE, "passages": [
            {"artifact": name, "how": "greedy", "text": HOSTILE}
            for name in ("original", "four", "svd", "gone")]}],
        "environment": {"python": HOSTILE}, "digests": [{"what": HOSTILE, "sha256": "b" * 64}],
        "commands": ["bitsmith study x.yaml", HOSTILE], "notes": [HOSTILE], "summary": [HOSTILE],
        "seconds": 3.0,
    }  # fmt: skip
