"""Several versions of one model repository side by side, one of them served, and the way back.

Triton numbers versions per model, and an ensemble takes the newest version of its steps; so one version is served by
all models together (version policy `specific`), each with the config.pbtxt it was exported with. What a version needs
beside its models' files is kept in them: `MODEL/N/config.pbtxt`, and the parity report in `vilu/N` (of a head alone:
`vilu_embeddings/N`).
"""

from __future__ import annotations

import filecmp
import re
import shutil
from pathlib import Path

from vilu import atomic
from vilu.errors import UserError
from vilu.export.model_config import save_config
from vilu.serving import AccessDenied, AsyncClient, RequestRefused
from vilu.serving.about import CONFIG, load_config

ABOUT = ("labels.txt", "parity.json", "parity.md", "parity.png")  # of the version that is served
# The model whose version folders keep them: the first of these that the repository has.
KEEPERS = ("vilu", "vilu_embeddings")
# What makes the embeddings that all other models read, in any stage of a cascade: two of them at once would be mixed in
# one answer.
EMBEDDING = re.compile(r"(stage\d+_)?(preprocess|clip_image|clip_text|tokenize)")


def models(repository: Path) -> list[str]:
    """Names of the models in a repository."""
    return sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}"))


def keeper(repository: Path) -> str:
    """Name of the model whose version folders keep what belongs to a version as a whole."""
    return next((name for name in KEEPERS if (repository / name / CONFIG).is_file()), KEEPERS[0])


def versions(repository: Path) -> list[int]:
    """The versions that every model of a repository has.

    Raises:
        UserError: not a repository that an export wrote.
    """
    if not (repository / "parity.json").is_file():
        raise UserError(f"{repository}: not a repository that `vilu export` wrote")
    found = [{int(p.name) for p in (repository / m).iterdir() if p.name.isdigit()} for m in models(repository)]
    return sorted(set.intersection(*found)) if found else []


def served(repository: Path) -> int:
    """The version a server takes: that of the version policy, else the newest."""
    policy = load_config(repository / keeper(repository) / CONFIG).version_policy
    return int(policy.specific.versions[0]) if policy.specific.versions else max(versions(repository))


def check(repository: Path, version: int) -> None:
    """Raises UserError for a version that cannot be added."""
    if version < 1:
        raise UserError(f"version must be at least 1, got {version}")
    present = versions(repository) if (repository / "parity.json").is_file() else []
    if version in present:
        raise UserError(f"{repository}: has a version {version} already; it has {', '.join(map(str, present))}")


def add(staging: Path, repository: Path, version: int) -> None:
    """Number a staged export, whose only version is 1, and put the versions of `repository`, if it exists, beside it.

    Raises:
        UserError: the repository has other models.
    """
    for model in models(staging):
        if version != 1:
            (staging / model / "1").rename(staging / model / str(version))
    keep(staging, version)
    if repository.exists() and (repository / "parity.json").is_file():
        present = versions(repository)
        if models(repository) != models(staging):
            raise UserError(f"{repository}: was exported with other models; export this checkpoint to another folder")
        now = served(repository)
        for model in models(staging):
            for old in present:
                shutil.copytree(repository / model / str(old), staging / model / str(old))
        keep(staging, now, repository)
    serve(staging, version)


def keep_class_sets(repository: Path, staging: Path) -> None:
    """Carry over the class sets that were put while a server ran (shared/sets.py); each names its CLIP."""
    sets = Path("class_sets", "sets")
    if (repository / sets).is_dir():
        shutil.copytree(repository / sets, staging / sets)


def use(repository: Path, version: int) -> list[str]:
    """Have `version` served from a server's next start (or load) on; the repository is replaced by renaming.

    Returns:
        The models whose files differ between the version served so far and this one.

    Raises:
        UserError: not such a repository, no such version, or a folder that cannot be written.
    """
    present = versions(repository)
    if version not in present:
        raise UserError(f"{repository}: has no version {version}; it has {', '.join(map(str, present))}")
    before = served(repository)
    with atomic.folder(repository) as staging:
        shutil.copytree(repository, staging, dirs_exist_ok=True)
        keep(staging, before)
        serve(staging, version)
        return [model for model in models(staging) if _differ(staging / model, before, version)]


async def switch(client: AsyncClient, repository: Path, version: int, *, control_token: str | None = None) -> list[str]:
    """`use`, of the running server that serves the repository, too: without a restart, and without an answer lost.

    A request under way is answered by the version that took it, later ones by the new one. Where a model of it does
    not load, all go back to the version before.

    Returns:
        The models that were loaded.

    Raises:
        UserError: as `use` does; versions of different CLIPs, or a version that lacks an output (the outlier score),
            where only a restart keeps answers whole.
        RequestRefused: a model that did not load.
        AccessDenied, ServerUnavailable: as `AsyncClient` does.
    """
    (running,) = await client.versions(keeper(repository))
    present = versions(repository)
    if running not in present:
        raise UserError(f"{client.url}: serves version {running}, which {repository} lacks: is it another repository?")
    before = served(repository)
    names = [model for model in models(repository) if not EMBEDDING.fullmatch(model)]
    ensembles = {model for model in names if load_config(repository / model / CONFIG).platform == "ensemble"}
    if version in present:
        embedding = [model for model in models(repository) if EMBEDDING.fullmatch(model)]
        different = [model for model in embedding if _differ(repository / model, running, version)]
        if different:
            raise UserError(
                f"versions {running} and {version} differ in {', '.join(different)}: during the change an answer could "
                f"come from both; `vilu versions {repository} --use {version}` without --live, and restart the server"
            )
        # A request under way asks its ensemble's steps for every output that the ensemble has.
        lacking = {
            name for m in ensembles for name in _outputs(repository, m, running) - _outputs(repository, m, version)
        }
        if lacking:
            raise UserError(
                f"version {version} does not give {', '.join(sorted(lacking))} as version {running} does: during the "
                f"change an answer could be lost; `vilu versions {repository} --use {version}` without --live, and "
                "restart the server"
            )
    use(repository, version)
    names.sort(key=lambda model: model in ensembles)  # after their steps
    tried: list[str] = []
    try:
        for model in names:
            tried.append(model)
            await client.load(model, None, control_token)
    except UserError as error:
        if isinstance(error, RequestRefused) and not isinstance(error, AccessDenied):
            use(repository, running)
            for model in reversed(tried):
                await client.load(model, None, control_token)
            error = RequestRefused(f"version {version}: {error}; version {running} is served as before")
        if served(repository) != before:
            use(repository, before)
        raise error from None
    return names


def keep(root: Path, version: int, source: Path | None = None) -> None:
    """Copy what `source` (by default root itself) serves now into the version's folders, unless it is there already."""
    source = source or root
    if (root / keeper(root) / str(version) / CONFIG).exists():  # a first export keeps nothing twice
        return
    for model in models(root):
        shutil.copyfile(source / model / CONFIG, root / model / str(version) / CONFIG)
    for name in ABOUT:
        shutil.copyfile(source / name, root / keeper(root) / str(version) / name)


def serve(root: Path, version: int) -> None:
    """Make a kept version the one that a repository serves."""
    for model in models(root):
        config = load_config(root / model / str(version) / CONFIG)
        config.version_policy.specific.versions[:] = [version]
        save_config(root / model, config)
    for name in ABOUT:
        shutil.copyfile(root / keeper(root) / str(version) / name, root / name)


def _outputs(repository: Path, model: str, version: int) -> set[str]:
    kept = repository / model / str(version) / CONFIG  # absent where there is one version alone
    return {output.name for output in load_config(kept if kept.is_file() else repository / model / CONFIG).output}


def _differ(model: Path, one: int, other: int) -> bool:
    """Whether two versions of a model have different files; the reports do not count."""

    def files(version: int) -> dict[str, Path]:
        found = (path for path in (model / str(version)).rglob("*") if path.is_file())
        return {
            str(p.relative_to(model / str(version))): p for p in found if p.name not in ABOUT[1:] and p.suffix != ".pyc"
        }

    mine, others = files(one), files(other)
    if set(mine) != set(others):
        return True
    return not all(filecmp.cmp(mine[name], others[name], shallow=False) for name in mine)
