"""Work folder of a run: it outlives the process, and the same command resumes in it."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hesse.checkpoints.journal import Journal
from hesse.checkpoints.output import check_room, make_parents, put_in_place, remove_with_parents
from hesse.checkpoints.writer import writing
from hesse.errors import HesseError, OptionError, OutputError
from hesse.processes import ALONE, ProcessError, Processes

IDENTITY = "run"  # the first step of a journal: the identity of the run


class WorkFolder:
    """Files of a run before it writes `out`: journals, and the folder that becomes `out`.

    The work folder lies next to `out`, as `.NAME.unfinished`. Rank 0 keeps `journal`, for decisions made once; every
    rank keeps a journal of its `own` passes. All ranks see the same disk.
    """

    def __init__(self, out: Path, processes: Processes) -> None:
        self.out, self.processes = out, processes
        self.folder = out.absolute().parent / f".{out.name}.unfinished"
        self.result = self.folder / "result"  # becomes `out`
        self.journal = Journal(self.folder / "journal")
        self.own = Journal(self.journals(processes.rank))
        self.resumed = False  # True if an earlier run is resumed
        self.begun = False  # True once the folder is this run's

    def journals(self, rank: int) -> Path:
        """Return the folder of a rank's own journal and of the parts of the checkpoint that it writes."""
        return self.folder / f"journal-{rank}"

    def begin(self, identity: Mapping[str, str], needed_bytes: int, restart: bool) -> None:
        """Make the folder, or resume an earlier run of the same `identity`.

        Raises:
            OutputError: the folder has finished steps of another run, or there is not enough room for `needed_bytes`.
        """
        if self.processes.is_main:
            self._begin(identity, needed_bytes, restart)
        self.begun = True
        self.processes.barrier()

    def _begin(self, identity: Mapping[str, str], needed_bytes: int, restart: bool) -> None:
        earlier = self.journal.recall(IDENTITY)
        if earlier is not None and self.result.is_dir() and not restart:
            changed = [name for name in {**earlier, **identity} if earlier.get(name) != identity.get(name)]
            if changed and self._noted():
                raise OutputError(
                    f"{self.folder} holds an unfinished run that differs from this one in its {_listed(changed)}: give "
                    "--restart to discard that run, or another OUT"
                )
            if not changed:
                self.resumed = True
                return
        self._empty()
        with writing(self.out, "made"):
            for folder in (self.result, self.journal.folder, *map(self.journals, range(self.processes.world_size))):
                folder.mkdir()
        check_room(self.folder, self.out, needed_bytes)
        self.journal.record(IDENTITY, dict(identity))

    def finish(self) -> None:
        """Rename the result to `out` and remove everything else, once all ranks are done."""
        self.processes.barrier()
        if self.processes.is_main:
            put_in_place(self.result, self.out)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.processes.barrier()

    def worth_keeping(self, error: BaseException) -> bool:
        """Return True if the same command may get further after `error` than it did.

        A refusal by Hesse will be repeated, except one of an option that was given when an earlier run was resumed.
        """
        refused = isinstance(error, HesseError) and not isinstance(error, OutputError | ProcessError)
        again = isinstance(error, OptionError) and self.resumed
        return (again or not refused) and self._noted()

    def _noted(self) -> bool:
        """Return True if a step is recorded that a resumed run would not repeat."""
        return any(self.own.folder.glob("*.json"))

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


LOCK = "lock"


@contextmanager
def work_folder(out: Path, processes: Processes = ALONE) -> Iterator[WorkFolder]:
    """Hold the work folder of a run that writes `out`, for these processes alone; keep it if the run can resume.

    Raises:
        OutputError: another run is writing `out`, or the folder cannot be made.
    """
    run = WorkFolder(out, processes)
    if not processes.is_main:
        yield run
        return
    made = make_parents(out)
    if run.folder.is_symlink():
        raise OutputError(f"{run.folder} is a link, so what it leads to might be lost: remove it, or give another OUT")
    with writing(out, "made"):
        run.folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(run.folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise OutputError(f"another run is writing {out}: wait for it, or give another OUT") from None
    try:
        yield run
    except BaseException as error:
        if run.worth_keeping(error):
            if isinstance(error, OutputError | KeyboardInterrupt) and run.begun:
                message = str(error) or f"{out} was not written"
                raise type(error)(f"{message}; the finished part is kept, and the same command resumes") from None
        else:
            remove_with_parents(run.folder, made)
        raise
    finally:
        os.close(lock)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
