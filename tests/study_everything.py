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


def place(layer: int | None) -> dict[str, Any]:
    """A layer of a merge; layer 1 misses its target for the cosine, layer 2 has no attention."""
    number = layer or 0
    found = {
        "layer": layer, "teacher_layer": 2 * number, "kind": "full_attention",
        "figures": {"cosine": figure(0.9 - 0.2 * number, "cosine", 0.01),
                    "transition_cost": figure(0.3, "norm"),
                    "variance_kept": {"value": 0.97, "unit": "share"}},
        "reference": {"kurtosis_gap": figure(0.2, "excess kurtosis")},
        "met": {"cosine": number == 0, "transition_cost": None}, "unmeasured": {"kurtosis_gap": HOSTILE},
    }  # fmt: skip
    if layer is None:
        return found
    shares = {"mixer": [0.1, 0.4], "ffn": 0.3, "taken_mixer": [0.05, 0.2], "taken_ffn": 0.15}
    kl = {"teacher": [figure(0.5), None], HOSTILE: [figure(0.1), figure(0.2)]} if number < 2 else {}
    return found | shares | {"attention_kl": kl}


def merge() -> dict[str, Any]:
    """A merge of three layers, hostile text wherever a file may bring some."""
    return {
        "name": HOSTILE, "teacher": HOSTILE, "student": "original", "is_adopted": True, "reason": HOSTILE,
        "settings": {"map": HOSTILE, "alpha": 0.5}, "protocol": {"text": HOSTILE},
        "diagnosed": {"tokens": 64}, "shares": {"embedding": 0.1},
        "measures": {"ppl_merged_over_student": figure(0.99, "ratio")},
        "trials": [{"label": HOSTILE, "half": "choose", "why": HOSTILE},
                   {"label": "0.5 ×", "half": "judge", "figure": figure(0.98, "ratio"), "worst_end": 0.999}],
        "targets": [{"figure": "cosine", "low": 0.8},
                    {"figure": "transition_cost", "low": 0.1, "high": 0.4, "is_band": True}],
        "places": [*map(place, range(3)), place(None)],
    }  # fmt: skip


def experiments() -> list[dict[str, Any]]:
    """One by name, one over tokens of the text (a line each for two ways), one without figures."""
    sizes = (1000, 10_000, 140_000)

    def row(label: str, value: float) -> dict[str, Any]:
        return {"label": label, "figures": {"ppl_over_student": figure(value, "ratio", 0.01)}}

    return [
        {"name": "baselines", "words": HOSTILE,
         "rows": [row(HOSTILE, 1.2) | {"facts": {"judged_on": HOSTILE, "tokens": 5}},
                  row("the merge", 0.99) | {"facts": {"judged_on": HOSTILE, "tokens": 7}}]},
        {"name": "data-efficiency", "words": "How much text?",
         "rows": [row(f"{n:,} tokens, {way}", 1 + 100 / n) for n in sizes for way in ("α by rule", HOSTILE)]},
        {"name": "lost", "words": "", "rows": [{"label": "unmeasured", "facts": {"unmeasured": HOSTILE}}]},
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
        "merges": [merge()], "experiments": experiments(),
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
