"""What a study reads: refused before anything runs where it is not there or cannot be, and its digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, printable
from bitsmith.progress import Progress, silent
from bitsmith.run.study_file import AUTO, Study
from bitsmith.run.study_merge import refuse_merges
from bitsmith.run.study_peers import read_peers
from bitsmith.run.study_recipe import refuse_recipes
from bitsmith.store import open_checkpoint
from bitsmith.store.artifacts import ArtifactStore
from bitsmith.store.digests import SourceDigests
from bitsmith.store.hub import fetch, origin, parse_hub_id

Place = tuple[str | int, ...]


def check_study(study: Study) -> list[dict[str, Any]]:
    """Refuse what is not there, and merges, recipes and claims that cannot be; return the peers.

    Raises BitsmithError with the line and the name.
    """
    for place, path in _paths(study):
        _refuse_missing(study, place, path)
    for name in study.texts:
        if not study.text(name).is_file():
            raise study.refusal(("texts", name), f"{study.text(name)} is no file")
    refuse_merges(study)
    refuse_recipes(study)
    if study.claims is not None and study.claims.only is not None:
        from bitsmith.run.study_claims import claims_cost  # noqa: PLC0415 (loads torch)

        try:
            claims_cost(study.model(next(iter(study.models))), only=study.claims.only)
        except BitsmithError as error:
            raise study.refusal(("claims", "only"), error.message) from error
    return [] if study.peers is None else read_peers(study.place(study.peers))


def fetch_models(
    study: Study, pins: Mapping[str, str], progress: Progress = silent
) -> tuple[Study, dict[str, str]]:
    """Return the study with its models of a hub as the paths of the cache, and the commits they are of.

    Those in `pins` stay at their commits. Raises BitsmithError with the line and the name.
    """
    given: dict[Place, str] = {("models", name): model for name, model in study.models.items()}
    given |= {
        ("merges", name, "teacher"): merge.teacher
        for name, merge in study.merges.items()
        if merge.teacher not in study.models
    }
    paths: dict[str, str] = {}
    commits: dict[str, str] = {}
    for place, model in given.items():
        wanted = None if study.place(model).exists() else parse_hub_id(model)
        if wanted is None or model in paths:
            continue
        try:
            path = fetch(replace(wanted, revision=pins.get(model, wanted.revision)), progress)
        except BitsmithError as error:
            raise study.refusal(place, str(error)) from error
        paths[model] = str(path)
        found = origin(path)
        commits[model] = "" if found is None else found.commit
    models = {name: paths.get(model, model) for name, model in study.models.items()}
    merges = {
        name: merge.model_copy(update={"teacher": paths.get(merge.teacher, merge.teacher)})
        for name, merge in study.merges.items()
    }
    return study.model_copy(update={"models": models, "merges": merges}), commits


def source_digests(study: Study, store: ArtifactStore) -> dict[str, str]:
    """Return the SHA-256 of models, their weight files and texts; what is gone meanwhile is left out.

    A folder's is what `LC_ALL=C sha256sum * | sha256sum` gives in it.
    """
    digests = SourceDigests(store.root / "sources.json")
    found: dict[str, str] = {}
    models = {name: study.model(name) for name in study.models}
    models |= {
        one.teacher: study.teacher(name) for name, one in study.merges.items() if one.teacher not in models
    }
    for name, path in models.items():
        with suppress(BitsmithError, OSError):
            found |= _model_digests(f"model {name}", path, digests)
    for name in study.texts:
        with suppress(BitsmithError, OSError):
            found[f"text {name}"] = digests.of(study.text(name))
    return found


def _model_digests(what: str, model: Path, digests: SourceDigests) -> dict[str, str]:
    if not model.is_dir():
        return {what: digests.of(model)}
    files = sorted(path.name for path in model.iterdir() if path.is_file() and path.name[0] != ".")
    lines = "".join(f"{digests.of(model / name)}  {name}\n" for name in files)
    with open_checkpoint(model) as checkpoint:
        weights = {f"{what}: {path.name}": digests.of(path) for path in checkpoint.files}
    return {what: hashlib.sha256(lines.encode()).hexdigest(), **weights}


def _paths(study: Study) -> list[tuple[Place, Path]]:
    """Return every path that the file names, with the place where it does."""
    found: list[tuple[Place, Path]] = [(("models", name), study.model(name)) for name in study.models]
    found += [(("texts", name), study.text(name)) for name in study.texts]
    found += [(("merges", name, "teacher"), study.teacher(name)) for name in study.merges]
    for name, recipe in study.recipes.items():
        given = {"stats": recipe.stats, "plan": recipe.plan}
        found += [
            (("recipes", name, option), study.place(path))
            for option, path in given.items()
            if path is not None and not (option == "stats" and path == AUTO)
        ]
    if study.claims is not None and study.claims.stats not in (None, AUTO):
        found.append((("claims", "stats"), study.place(str(study.claims.stats))))
    if study.peers is not None:
        found.append((("peers",), study.place(study.peers)))
    return found


def _refuse_missing(study: Study, place: Place, path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError as error:
        raise study.refusal(place, f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        said = printable(getattr(error, "strerror", None) or str(error))
        raise study.refusal(place, f"{path} cannot be read: {said}") from error
