"""Real llama.cpp through ctypes: the plain C API that the `xllamacpp` wheel exports."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from ggml_oracle import library


class _Params(ctypes.Structure):
    """A params struct passed through by value; larger than any of llama.cpp's, whose layout changes often."""

    _fields_ = (("opaque", ctypes.c_uint64 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda level, text, data: None)


@cache
def _llama() -> ctypes.CDLL:
    lib = library()
    signatures = {
        "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Params]),
        "llama_model_free": (None, [ctypes.c_void_p]),
        "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
        "llama_tokenize": (
            ctypes.c_int32,
            [
                ctypes.c_void_p,
                ctypes.c_char_p,
                ctypes.c_int32,
                ctypes.c_void_p,
                ctypes.c_int32,
                ctypes.c_bool,
                ctypes.c_bool,
            ],
        ),
        "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Params]),
        "llama_free": (None, [ctypes.c_void_p]),
        "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
        "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    return lib


class Llama:
    """A GGUF file loaded by real llama.cpp."""

    def __init__(self, path: Path) -> None:
        self._lib = _llama()
        self._model = self._lib.llama_model_load_from_file(
            str(path).encode(), self._lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_model_free(self._model)

    @property
    def vocab_size(self) -> int:
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens recognised, nothing added."""
        encoded = text.encode()
        ids = np.zeros(len(encoded) + 8, np.int32)
        count = self._lib.llama_tokenize(
            self._vocab, encoded, len(encoded), ids.ctypes.data, len(ids), False, True
        )
        if count < 0:
            raise RuntimeError(f"llama_tokenize answered {count}")
        return ids[:count].tolist()

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """Return the logits (`T-first vocab`) of `tokens` (`T`) from position `first` on, from nothing."""
        with self._context() as context:
            ids, n_tokens = np.asarray(tokens, np.int32), len(tokens)
            positions, wanted = np.arange(n_tokens, dtype=np.int32), np.arange(n_tokens) >= first
            counts, flags = np.ones(n_tokens, np.int32), wanted.astype(np.int8)
            sequence = ctypes.c_int32(0)
            sequences = (ctypes.c_void_p * n_tokens)(*[ctypes.addressof(sequence)] * n_tokens)
            batch = _Batch(
                n_tokens,
                ids.ctypes.data,
                None,
                positions.ctypes.data,
                counts.ctypes.data,
                ctypes.addressof(sequences),
                flags.ctypes.data,
            )
            if self._lib.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            shape = (n_tokens - first, self.vocab_size)
            return np.ctypeslib.as_array(self._lib.llama_get_logits(context), shape).copy()

    @contextmanager
    def _context(self) -> Iterator[int]:
        """A context of llama.cpp's default 512 tokens, with one thread: more stall on models this small."""
        context = self._lib.llama_init_from_model(self._model, self._lib.llama_context_default_params())
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        try:
            self._lib.llama_set_n_threads(context, 1, 1)
            yield context
        finally:
            self._lib.llama_free(context)

    def last_logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits after the last of `tokens`."""
        return self.logits(np.asarray(tokens), len(tokens) - 1)[0]
