"""The recipe `sbgq-iq4xs`: rotation, gauges, importance and mixed precision as the SBGQ write-up has them.

The write-up's own gauges `v_proj <-> ssm_out` and `ssm_beta <-> v_proj` are not exact (SiLU and the gated
norm stand between); in their place goes the exact one on that axis, the gated norm's weight and `ssm_out`.
"""

from __future__ import annotations

import re

from bitsmith.passes.transform import Model

SBGQ = "sbgq-iq4xs"
SBGQ_BASE = "IQ4_XS"
"""Type of what the table does not name: FFN, attn_q, attn_k, attn_qkv, attn_gate, ssm_alpha."""

SBGQ_TRANSFORMS = "drop-mtp,untie,fold,rotate,scale-ffn,scale-vo,scale-delta"
"""Stages one and two."""

_TABLE = (
    (r"^(token_embd|output)\.weight$", "Q8_0"),
    (r"\.ssm_out\.", "Q6_K"),
    (r"\.ssm_beta\.", "Q5_K"),
    (r"\.attn_(v|output)\.", "Q5_K"),
)


def sbgq_types(model: Model) -> tuple[tuple[str, str], ...]:
    """Return the table's (regex, type) overrides that concern a tensor of `model`; some have no `ssm_*`."""
    names = [spec.gguf_name for spec, _ in model.tensors.values() if spec.gguf_name is not None]
    return tuple((rule, kind) for rule, kind in _TABLE if any(re.search(rule, name) for name in names))
