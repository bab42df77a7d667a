"""Killed, or out of disk, at any change it makes: what the store writes is whole or absent, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crash_points import FULL, FULL_ONCE, KILL, Play, Stage, stage, sweep
from crash_scenes import SCENES

PROGRAM = Path(__file__).with_name("crash_scenes.py")


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("crash"), PROGRAM) as made:
        yield made


@pytest.mark.parametrize("kind", [KILL, FULL])
@pytest.mark.parametrize("scene", SCENES)
def test_at_some_changes(on: Stage, scene: str, kind: int) -> None:
    assert sweep(on, Play((scene,), works=("store",)), kind=kind, most=4) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KILL, FULL, FULL_ONCE])
@pytest.mark.parametrize("scene", SCENES)
def test_at_each_change(on: Stage, scene: str, kind: int) -> None:
    assert sweep(on, Play((scene,), works=("store",)), kind=kind) > 10
