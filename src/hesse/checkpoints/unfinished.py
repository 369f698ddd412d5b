"""The folder of an unfinished run: it outlives the process, and the same command goes on in it."""

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

IDENTITY = "run"  # the first step of a journal: what the run is of


class Unfinished:
    """What a run that will write `out` has on disk before: journals, and the checkpoint.

    It lies beside `out`, as `.NAME.unfinished`. Of several processes the first keeps the journal of what is decided
    once, and each one of its `own` walks; they see the same disk.
    """

    def __init__(self, out: Path, processes: Processes) -> None:
        self.out, self.processes = out, processes
        self.folder = out.absolute().parent / f".{out.name}.unfinished"
        self.checkpoint = self.folder / "checkpoint"
        self.journal = Journal(self.folder / "journal")
        self.own = Journal(self.journals(processes.rank))
        self.resumed = False  # whether an earlier run is taken up
        self.begun = False  # whether the folder is this run's

    def journals(self, rank: int) -> Path:
        """The folder of a process's own journal, and of the parts of the checkpoint that it writes."""
        return self.folder / f"journal-{rank}"

    def begin(self, identity: Mapping[str, str], needed_bytes: int, restart: bool) -> None:
        """Make the folder, or take up what an earlier run of the same `identity` left.

        Raises:
            OutputError: what is there is of another run, or there is not enough room for `needed_bytes`.
        """
        if self.processes.is_main:
            self._begin(identity, needed_bytes, restart)
        self.begun = True
        self.processes.barrier()

    def _begin(self, identity: Mapping[str, str], needed_bytes: int, restart: bool) -> None:
        found = self.journal.recall(IDENTITY)
        if found is not None and self.checkpoint.is_dir() and not restart:
            changed = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
            if changed:
                raise OutputError(
                    f"{self.folder} holds an unfinished run that differs from this one in its {_listed(changed)}: give "
                    "--restart to lose it and begin anew, or another OUT"
                )
            self.resumed = True
            return
        self._empty()
        with writing(self.out, "made"):
            for folder in (self.checkpoint, self.journal.folder, *map(self.journals, range(self.processes.world_size))):
                folder.mkdir()
        check_room(self.folder, self.out, needed_bytes)
        self.journal.record(IDENTITY, dict(identity))

    def finish(self) -> None:
        """Give the checkpoint its name, and remove everything else, once all processes are done with it."""
        self.processes.barrier()
        if self.processes.is_main:
            put_in_place(self.checkpoint, self.out)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.processes.barrier()

    def worth_keeping(self, error: BaseException) -> bool:
        """Whether there is work that may come further than it did before `error`.

        Where Hesse itself said no it will again, unless it said so of what was asked when the run was taken up.
        """
        refused = isinstance(error, HesseError) and not isinstance(error, OutputError | ProcessError)
        again = isinstance(error, OptionError) and self.resumed
        return (again or not refused) and any(self.own.folder.glob("*.json"))

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


LOCK = "lock"


@contextmanager
def unfinished(out: Path, processes: Processes = ALONE) -> Iterator[Unfinished]:
    """The folder of a run that writes `out`, for these processes alone; it stays if the run can be taken up again.

    Raises:
        OutputError: another run is writing `out`, or the folder cannot be made.
    """
    run = Unfinished(out, processes)
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
                said = str(error) or f"{out} was not written"
                raise type(error)(f"{said}; what is done of it is kept, and the same command goes on") from None
        else:
            remove_with_parents(run.folder, made)
        raise
    finally:
        os.close(lock)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
