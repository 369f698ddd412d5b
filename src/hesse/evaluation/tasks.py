"""Tasks of lm-evaluation-harness, run in this process on models that transformers loads."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hesse.data.offline import without_network
from hesse.errors import DataError, OptionError, printable, reason

FILES = (".yaml", ".yml")
STANDARD_ERROR = "_stderr"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str  # with the harness's filter if it has one, such as "exact_match,strict-match"
    samples: int | None  # documents of the task; None for a group of tasks
    value: float
    standard_error: float | None
    reference: float | None  # the same of the reference


class Harness:
    """lm-evaluation-harness with the tasks of a run.

    Raises:
        OptionError: the harness is not installed, or does not know a task.
        DataError: a task's data are not on this machine; nothing is downloaded.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        try:
            from lm_eval.models.huggingface import HFLM  # noqa: F401 - the part that needs further packages
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise OptionError(
                f"--tasks needs lm-evaluation-harness ({reason(error)}): pip install 'hesse[tasks]'"
            ) from None
        with _quiet():
            self._manager = TaskManager()
            self._names = [self._name(task) for task in tasks]
            try:
                self._manager.load(self._names)
            except Exception as error:  # the harness and the data set library raise many kinds
                raise DataError(
                    f"the tasks {', '.join(tasks)} cannot be loaded from this machine, and nothing is downloaded "
                    f"({printable(reason(error))}): load their data sets once with the datasets package, or give a "
                    "task whose data are files"
                ) from None

    def _name(self, task: str) -> str:
        """Return the name that the harness knows a task by."""
        if Path(task).suffix not in FILES:
            if task not in self._manager.all_tasks:
                raise OptionError(
                    f"lm-evaluation-harness has no task {task!r}: `lm-eval ls tasks` lists them; a task of your own is "
                    "a YAML file"
                )
            return task
        if not Path(task).is_file():
            raise OptionError(f"the task file {task} does not exist: give a YAML file, or the name of a task")
        return str(Path(task).absolute())

    def run(
        self, folder: Path, reference: Path | None, device: torch.device, batch_size: int | None
    ) -> list[TaskScore]:
        """Return the scores of the model in `folder`, and those of `reference`; one of the two is in memory.

        Raises:
            OptionError: the harness cannot load a model, or fails on it.
        """
        scores = self._evaluate(folder, device, batch_size)
        dense = [] if reference is None else self._evaluate(reference, device, batch_size)
        values = {(score.task, score.metric): score.value for score in dense}
        return [replace(score, reference=values.get((score.task, score.metric))) for score in scores]

    def _evaluate(self, folder: Path, device: torch.device, batch_size: int | None) -> list[TaskScore]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            try:
                model = HFLM(str(folder), device=str(device), batch_size=batch_size or 1, trust_remote_code=False)
                found = simple_evaluate(model, tasks=self._names, task_manager=self._manager, log_samples=False)
            except Exception as error:  # of any library below the harness
                raise OptionError(
                    f"lm-evaluation-harness cannot evaluate {folder} ({printable(reason(error))}): leave out --tasks, "
                    "or a task"
                ) from None
        assert found is not None, "the harness returns None on other ranks than the first"
        counts: dict[str, Any] = found.get("n-samples", {})
        scores = []
        for task, metrics in found["results"].items():
            for metric, value in metrics.items():
                name, _, chain = metric.partition(",")
                if isinstance(value, int | float) and chain and not name.endswith(STANDARD_ERROR):
                    spread = metrics.get(f"{name}{STANDARD_ERROR},{chain}")
                    scores.append(
                        TaskScore(
                            task=task,
                            metric=name if chain == "none" else metric,
                            samples=counts.get(task, {}).get("effective"),
                            value=float(value),
                            standard_error=spread if isinstance(spread, int | float) else None,
                            reference=None,
                        )
                    )
        return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from standard output, from its log below errors, and from the network."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), without_network():
            yield
    finally:
        logger.setLevel(level)
