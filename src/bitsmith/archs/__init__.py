"""Architectures: what each stored tensor is, and how it is exported to GGUF and imported back."""

from bitsmith.archs.arch import ARCHITECTURES, Architecture, Step, TensorSpec, architecture_of, claim
from bitsmith.archs.export import Export, ExportTensor, export_view, import_view
from bitsmith.archs.qwen3 import Qwen3
from bitsmith.archs.qwen3_5 import Qwen35
from bitsmith.archs.tokenizer import load_tokenizer, tokenizer_metadata

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Export",
    "ExportTensor",
    "Qwen3",
    "Qwen35",
    "Step",
    "TensorSpec",
    "architecture_of",
    "claim",
    "export_view",
    "import_view",
    "load_tokenizer",
    "tokenizer_metadata",
]
