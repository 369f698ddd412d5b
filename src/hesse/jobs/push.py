"""`hesse push`: upload a written folder to a repository of the hub."""

from dataclasses import dataclass
from glob import escape
from pathlib import Path

from hesse.checkpoints.files import belongs, read_json
from hesse.checkpoints.locate import HUB_ID
from hesse.errors import CheckpointError, OptionError, OutputError, reason
from hesse.formats import open_checkpoint
from hesse.formats.adapter import CONFIG, WEIGHTS
from hesse.progress import Clock
from hesse.result import Report, Result
from hesse.version import versions


@dataclass(frozen=True, kw_only=True)
class PushReport(Report):
    """An uploaded folder; `bytes_after` is the size of its files."""

    repository: str
    revision: str  # the branch
    url: str  # of the commit
    files: list[str]


def push(
    out: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
) -> Result[PushReport]:
    """Upload a model or adapter folder to a repository of the hub, which is created if it does not exist.

    All files of the folder are uploaded, `hesse-report.json` with the paths as they were given included. Files that the
    repository has under other names stay. The account is that of `hf auth login`, or of the variable HF_TOKEN.

    Args:
        out: a folder that a command wrote.
        repository: an id such as owner/name.
        private: create the repository as private; one that exists stays as it is.
        revision: the branch, which is created if it does not exist; None for `main`.

    Raises:
        OptionError: `repository` is no id.
        CheckpointError: the folder is not complete, or holds a link to a file outside.
        OutputError: the hub refuses the upload.
    """
    clock, folder = Clock(), Path(out)
    if HUB_ID.fullmatch(repository) is None:
        raise OptionError(f"{repository!r} is not a repository: give an id such as owner/name")
    files = _files(folder)
    from huggingface_hub import HfApi  # imported late: it takes time

    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            allow_patterns=[escape(path.relative_to(folder).as_posix()) for path in files],
            commit_message=f"Upload {folder.absolute().name} with hesse",
        )
    except Exception as error:  # the hub client raises many kinds
        raise OutputError(
            f"{folder} cannot be pushed to {repository} ({reason(error)}): check the name, the network, and the "
            "account with `hf auth whoami`"
        ) from None
    return Result(
        PushReport(
            verb="push",
            model=str(out),
            bytes_after=sum(path.stat().st_size for path in files),
            seconds={"total": clock.total},
            versions=versions(),
            repository=repository,
            revision=revision or "main",
            url=str(commit.commit_url),
            files=[path.relative_to(folder).as_posix() for path in files],
        )
    )


def _files(folder: Path) -> list[Path]:
    """Return the files of a complete model or adapter folder, hidden ones left out."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that a command wrote")
    if folder.absolute().name.startswith("."):
        raise CheckpointError(
            f"{folder} is the work of an unfinished run: run its command again, and push what it writes"
        )
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        read_json(folder / CONFIG)
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} is not complete: {WEIGHTS} is missing; write it again")
    else:
        open_checkpoint(folder)
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in every if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in files:
        if not belongs(path, folder):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside of the folder: remove it, or copy the file"
            )
    return files
