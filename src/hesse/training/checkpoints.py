"""Save a training to disk, so that a killed run resumes and ends with the same weights."""

import hashlib
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch

from hesse.checkpoints.files import unfinished_file
from hesse.checkpoints.writer import writing
from hesse.errors import OutputError, reason
from hesse.progress import Progress, Silence
from hesse.training.loop import TrainingLoop

NAME = "training.pt"


class Checkpoints:
    """Checkpoint file of a training below a folder, replaced as a whole every `every` steps; read only as data.

    `method` identifies settings other than the loop's, `note` returns tensors and plain values to save with it.

    Raises:
        OutputError: the file belongs to another training or is damaged, or the folder cannot be written.
    """

    def __init__(
        self, folder: Path, every: int, loop: TrainingLoop, method: str = "", note: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self.path, self.every, self.loop, self.note = folder / NAME, every, loop, note
        self.identity = {"method": method, **_identity(loop)}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> dict[str, Any]:
        """Restore the last saved step, if there is one, and return the values that `note` gave."""
        if not self.path.exists():
            return {}
        device = self.loop.objective.parameters[0].device
        try:
            saved = torch.load(self.path, map_location=device, weights_only=True)
            theirs = saved["identity"]
            other = [key for key, value in self.identity.items() if theirs.get(key) != value]
            if not other:
                self.loop.restore(saved["loop"])
                return dict(saved["note"])
        except Exception as error:  # a foreign or incomplete file raises many kinds of errors
            raise OutputError(f"{self.path} cannot be read ({reason(error)}): remove it to start again") from None
        raise OutputError(
            f"{self.path} is of a training that differs from this one in its {other[0]}: give another folder, or "
            "remove it to start again"
        )

    def save(self) -> None:
        """Save the present state of the training, with the values of `note`."""
        content = {"identity": self.identity, "loop": self.loop.state(), "note": self.note()}
        with writing(self.path.parent), unfinished_file(self.path) as beside:
            torch.save(content, beside)


def run_reported(
    phase: str,
    loop: TrainingLoop,
    run: Callable[[Callable[[], None]], None],
    kept: Checkpoints | None,
    progress: Progress | None,
) -> None:
    """Run a training to its end: call `run` with a function for after each step, and save when due and at the end."""
    shown = Silence() if progress is None else progress
    shown.begin(phase, loop.training.steps - loop.step)

    def after_step() -> None:
        shown.advance()
        if kept is not None and loop.step % kept.every == 0:
            kept.save()

    run(after_step)
    if kept is not None:
        kept.save()


def _identity(loop: TrainingLoop) -> dict[str, Any]:
    """Return the identity of a training: its settings, and a digest of its initial weights."""
    digest = hashlib.sha256()
    for name, parts in loop.free.items():
        held = loop.held.get(name)
        digest.update(f"{name} {held if is_dataclass(held) else type(held).__name__}".encode())
        for part in (*parts, loop.objective.named[name]):
            digest.update(part.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    groups = [
        {key: value for key, value in group.items() if isinstance(value, int | float | bool | str | tuple)}
        for group in loop.optimizer.param_groups
    ]
    optimizer = f"{type(loop.optimizer).__name__} {groups}"
    settings = loop.training.identity()
    return {**settings, "rule": str(loop.rule), "optimizer": optimizer, "weights": digest.hexdigest()}
