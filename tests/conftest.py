"""Tiny checkpoints shared by the suite, written once per session by `bitsmith.lab.synth`."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job inherits it, children too
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("suite", deadline=None)  # the suite shares its machine; pytest-timeout bounds it
settings.load_profile("suite")

FIRST = (  # where nothing is compiled yet, one of two workers compiles while the other needs no kernels
    "test_formats", "test_engine_ray", "test_study_page", "test_engine", "test_formats_error",
    "test_graph_kill", "test_rounding", "test_pair", "test_feedback", "test_lab", "test_integer_formats",
    "test_encode",
)  # fmt: skip
LONGEST = (
    "test_cli", "test_generate", "test_cli_recipe", "test_faults_running", "test_assay_page", "test_execute",
    "test_calibrate", "test_tune", "test_allocate", "test_transforms", "test_transform_search",
    "test_transforms_exact", "test_evaluate", "test_study_claims", "test_factored", "test_gauges", "test_hub",
    "test_llama", "test_llama_transforms", "test_store", "test_study_formats",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what others wait for and with the longest files, so that workers end at about one time."""
    places = {f"{name}.py": place for place, name in enumerate((*FIRST, *LONGEST))}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3.5 as published: text nested beside vision, MTP, twice as many V as K heads, untied."""
    return synth(tmp_path_factory.mktemp("tiny") / "qwen3_5")


@pytest.fixture(scope="session")
def tiny_qwen3_5_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text-only Qwen3.5 with MTP, tied, in several shards."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen3_5_tied"
    return synth(folder, vision=False, tied=True, seed=1, shard_bytes=2_000_000)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense Qwen3, untied."""
    return synth(tmp_path_factory.mktemp("tiny") / "qwen3", "qwen3-tiny", seed=2)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The bundled trained Qwen3.5: text alone, untied, without MTP."""
    return DEMO_MODEL
