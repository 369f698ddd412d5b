"""Training loop: steps of an optimiser on free tensors, with weights given by parametrizations."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesse.curvature import Objective
from hesse.curvature.objective import Batch, in_eval_mode
from hesse.errors import DataError, OptionError
from hesse.training.held import Held
from hesse.training.passes import USE, Passes, seed_all
from hesse.training.training import Training, linear_decay

NamedGradients = dict[str, Tensor]  # of the parameters that the loss depends on


@dataclass(frozen=True)
class StepRule:
    """Rule for the direction of a step, from gradients at weights of its choice; this one's are the present weights."""

    def check(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Raise OptionError if the rule cannot train these weights."""

    def direction(
        self, weights: Mapping[str, nn.Parameter], gradients: Callable[[], NamedGradients], step: int
    ) -> NamedGradients:
        """Return the direction that the optimiser gets as the gradient.

        `gradients()` computes the gradient on the step's batches at the present weights. The rule may change weights in
        place, and must restore them at the end.
        """
        return gradients()


class TrainingLoop:
    """A training that can stop and resume after any step.

    The model's own parameters are allowed weights after every step. In place of a parametrized weight other tensors are
    trained, which takes the weight's memory once more.

    Raises:
        OptionError: a parametrization does not fit the model, or the teacher does not fit the loss.
    """

    def __init__(
        self, objective: Objective, training: Training, held: Mapping[str, Held], rule: StepRule | None = None
    ) -> None:
        known = dict(objective.model.named_parameters())
        if unknown := [name for name in held if name not in known]:
            some = next(iter(known), "nothing")
            raise OptionError(f"the model has no parameter {unknown[0]!r} to hold; one is called {some}")
        if training.teacher is not None:
            if training.teacher is objective.model:
                raise OptionError("the teacher is the model itself: give a copy of it as it was, copy.deepcopy(model)")
            training.distillation.check(objective.loss)
        self.objective, self.training = objective, training
        self.rule = StepRule() if rule is None else rule
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
        self._allowed: dict[str, Tensor] = {}  # parametrized weights as functions of the free tensors
        self.set_weights()
        self.optimizer = training.optimizer(self._named_free())
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def set_weights(self) -> None:
        """Set the model's weights to those that follow from the free tensors."""
        for name, held in self.held.items():
            weight = self.objective.named[name]
            with torch.enable_grad():
                self._allowed[name] = held.at(self.step).weight(*self.free[name]).view(weight.shape)
            weight.data.copy_(self._allowed[name].detach())

    def set_parametrizations(self, held: Mapping[str, Held]) -> None:
        """Replace the parametrizations of the same parameters; the trained tensors stay, and must fit."""
        self.held = {name: held[name] for name in self.held}
        self.set_weights()

    def restart_from(self, weights: Mapping[str, Tensor], held: Mapping[str, Held]) -> None:
        """Replace the parametrizations and restart from `weights`; the optimiser keeps its state."""
        for name, weight in weights.items():
            for part, start in zip(self.free[name], held[name].free(weight), strict=True):
                part.data.copy_(start)
        self.set_parametrizations(held)

    def first_batches(self, number: int) -> list[Batch]:
        """Return the first batches of a separate pass, without affecting the training's data and random numbers."""
        with _isolated_random_state(self.objective.parameters[0].device):
            return self._passes.first(number)

    def run(self, until: int, after_step: Callable[[], None] = lambda: None) -> None:
        """Train up to the step `until`.

        Raises:
            DataError: there is no data, or the loss or its gradient is not finite.
        """
        teacher = self.training.teacher
        evaluated = nullcontext() if teacher is None else in_eval_mode(teacher)
        with _isolated_random_state(self.objective.parameters[0].device), evaluated:
            while self.step < until:
                self._one()
                after_step()

    def _one(self) -> None:
        batches = [self._passes.fetch() for _ in range(self.training.accumulation)]
        losses: list[float] = []
        direction = self.rule.direction(self.objective.named, lambda: self._gradients(batches, losses), self.step)
        if not torch.tensor(losses).isfinite().all():
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
        self.losses.append(losses[0])
        self.set_weights()

    def _gradients(self, batches: list[Batch], losses: list[float]) -> NamedGradients:
        """Return the gradients of all batches as one; append the loss to `losses`."""
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
        losses.append(total * scale)
        return {
            name: weight.grad.mul_(scale) for name, weight in self.objective.named.items() if weight.grad is not None
        }

    def _terms(self, inputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the loss of each term, and the number of counted terms."""
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
        """Return everything that determines the rest of the training, as tensors and plain values."""
        return {
            "step": self.step,
            "losses": self.losses,
            "passes": self._passes.state(),
            "free": {name: [part.detach() for part in parts] for name, parts in self.free.items()},
            "buffers": dict(self.objective.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a loop with the same settings."""
        self.step, self.losses = state["step"], list(state["losses"])
        for name, parts in self.free.items():
            for part, saved in zip(parts, state["free"][name], strict=True):
                part.data.copy_(saved)
        for name, buffer in self.objective.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        with _isolated_random_state(self.objective.parameters[0].device):
            self._passes.go_to(state["passes"])
        self.set_weights()


def _isolated_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores torch's random state at its end."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
