"""The one loop that trains: steps of an optimiser on what is free, with what is held kept held."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hesse.curvature import Objective
from hesse.curvature.objective import Batch
from hesse.errors import DataError, OptionError
from hesse.training.held import Held, check_names
from hesse.training.passes import USE, Passes, seed_all
from hesse.training.training import Training, linear_decay

NamedGradients = dict[str, Tensor]  # of the parameters that a loss reached


class StepRule(Protocol):
    """The direction of a step, from gradients at weights of its choice."""

    def check(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Raise OptionError if it cannot train these weights."""

    def direction(
        self, weights: Mapping[str, nn.Parameter], gradients: Callable[[], NamedGradients], step: int
    ) -> NamedGradients:
        """What an optimiser is given as the gradient.

        `gradients()` takes it on the step's batches at the weights as they then are. They may be changed in place,
        and must be as they were at the end.
        """


@dataclass(frozen=True)
class PlainStep:
    """The gradient."""

    def check(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Any can be trained."""

    def direction(
        self, weights: Mapping[str, nn.Parameter], gradients: Callable[[], NamedGradients], step: int
    ) -> NamedGradients:
        """The gradient where the weights are."""
        return gradients()


class TrainingLoop:
    """A training that can be stopped and gone on with after any step.

    The model's own parameters are allowed weights after every step. In the place of one that is held other tensors are
    trained, which takes its memory once more.

    Raises:
        OptionError: what is held does not fit the model, or the teacher the loss.
    """

    def __init__(
        self, objective: Objective, training: Training, held: Mapping[str, Held], rule: StepRule | None = None
    ) -> None:
        check_names(held, objective.model)
        if training.teacher is not None:
            if training.teacher is objective.model:
                raise OptionError("the teacher is the model itself: give a copy of it as it was, copy.deepcopy(model)")
            training.distillation.check(objective.loss)
        self.objective, self.training = objective, training
        self.rule = PlainStep() if rule is None else rule
        self.rule.check(objective.named)
        self.held = {name: held[name] for name in objective.names if name in held}
        self.step = 0
        self.losses: list[float] = []
        self._passes = Passes(objective, training.seed)
        self.free = {
            name: tuple(nn.Parameter(part.detach().clone()) for part in self.held[name].free(weight.detach()))
            if name in self.held
            else (weight,)
            for name, weight in objective.named.items()
        }
        self._allowed: dict[str, Tensor] = {}  # the held weights as functions of what is free
        self.allow()
        self.optimizer = training.optimizer(self._named_free())
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def allow(self) -> None:
        """Make the model's weights what follows from what is free."""
        for name, held in self.held.items():
            weight = self.objective.named[name]
            with torch.enable_grad():
                self._allowed[name] = held.at(self.step).weight(*self.free[name]).view(weight.shape)
            weight.data.copy_(self._allowed[name].detach())

    def hold(self, held: Mapping[str, Held]) -> None:
        """Hold the same parameters in other ways from now on; what is trained stays, and must fit them."""
        self.held = {name: held[name] for name in self.held}
        self.allow()

    def go_on_from(self, weights: Mapping[str, Tensor], held: Mapping[str, Held]) -> None:
        """Hold the same parameters in other ways, and begin again at `weights`; the optimiser keeps what it knows."""
        for name, weight in weights.items():
            for part, start in zip(self.free[name], held[name].free(weight), strict=True):
                part.data.copy_(start)
        self.hold(held)

    def first_batches(self, number: int) -> list[Batch]:
        """The first batches of a pass of its own, which leaves the training's data and randomness as they are."""
        with _own_randomness(self.objective.parameters[0].device):
            return self._passes.first(number)

    def run(self, until: int, after_step: Callable[[], None] = lambda: None) -> None:
        """Train up to the step `until`.

        Raises:
            DataError: there is no data, or the loss or its gradient is not finite.
        """
        with _own_randomness(self.objective.parameters[0].device), _resting(self.training.teacher):
            while self.step < until:
                self._one()
                after_step()

    def _one(self) -> None:
        batches = [self._passes.fetch() for _ in range(self.training.accumulation)]
        found: list[float] = []
        direction = self.rule.direction(self.objective.named, lambda: self._gradients(batches, found), self.step)
        if not torch.tensor(found).isfinite().all():
            raise DataError(f"the loss of step {self.step} is not finite: use a smaller learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        for weight in self.objective.parameters:
            weight.grad = None
        for name, gradient in direction.items():
            if name in self.held:
                torch.autograd.backward(self._allowed[name], gradient)
            else:
                self.objective.named[name].grad = gradient
        free = [parameter for _, parameter in self._named_free()]
        norm = torch.nn.utils.clip_grad_norm_(free, self.training.clip or torch.inf)
        if not bool(norm.isfinite()):
            raise DataError(f"the gradient of step {self.step} is not finite: use a smaller learning rate")
        rate = (self.training.rate or linear_decay)(self.step, self.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(found[0])
        self.allow()

    def _gradients(self, batches: list[Batch], found: list[float]) -> NamedGradients:
        """Those of all batches as if they were one; the loss is added to `found`."""
        total, count = 0.0, 0
        for weight in self.objective.parameters:
            weight.grad = None
        first = self._passes.number - len(batches)
        for number, batch in enumerate(batches, first):
            seed_all(self.training.seed, number, USE)
            terms, counted = self._terms(*batch)
            loss = terms.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.detach()), count + counted
        scale = self.objective.scale_of(count)
        found.append(total * scale)
        return {
            name: weight.grad.mul_(scale) for name, weight in self.objective.named.items() if weight.grad is not None
        }

    def _terms(self, inputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """The loss of each term, and how many count."""
        objective, training = self.objective, self.training
        device = objective.parameters[0].device.type
        with torch.autocast(device, training.precision, enabled=training.precision is not None):
            outputs = objective.call(objective.model, inputs)
            if training.teacher is not None:
                with torch.no_grad():
                    taught = objective.call(training.teacher, inputs)
        outputs = _wide(outputs)
        if training.teacher is None:
            terms = objective.loss.terms(outputs, targets)
        else:
            terms = training.distillation.terms(objective.loss, outputs, _wide(taught), targets)
        known = objective.loss.count(targets)
        return terms, terms.numel() if known is None else known

    def _named_free(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name if len(parts) == 1 else f"{name}.{number}", part)
            for name, parts in self.free.items()
            for number, part in enumerate(parts)
        ]

    def state(self) -> dict[str, Any]:
        """All that decides how it goes on, as tensors and plain values."""
        return {
            "step": self.step,
            "losses": self.losses,
            "passes": self._passes.state(),
            "free": {name: [part.detach() for part in parts] for name, parts in self.free.items()},
            "buffers": dict(self.objective.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be as a loop of the same kind was."""
        self.step, self.losses = state["step"], list(state["losses"])
        for name, parts in self.free.items():
            for part, saved in zip(parts, state["free"][name], strict=True):
                part.data.copy_(saved)
        for name, buffer in self.objective.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        with _own_randomness(self.objective.parameters[0].device):
            self._passes.go_to(state["passes"])
        self.allow()


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Leaves torch's random numbers as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


@contextmanager
def _resting(teacher: nn.Module | None) -> Iterator[None]:
    """A teacher in eval mode while it teaches."""
    if teacher is None:
        yield
        return
    was = {module: module.training for module in teacher.modules()}
    teacher.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training
