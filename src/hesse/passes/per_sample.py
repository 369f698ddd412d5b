"""Pass data through an objective, a few samples at a time, and record the inputs and gradients of every layer."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from hesse.curvature import Objective
from hesse.curvature.objective import label_generator
from hesse.errors import DataError, OptionError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.passes.parts import parts_of
from hesse.passes.recorded_batch import RecordedBatch, Recorder, backward
from hesse.passes.sample_gradients import summed_gradient

FisherKind = Literal["sampled", "empirical"]
BUDGET = 1 << 27  # bytes
AGREEMENT = {torch.float64: 1e-8, torch.float32: 2e-3}  # tolerance of hooks against autograd; larger in 16 bits


class GradientPass:
    """Pass over the data of an objective, with gradients.

    `kind="empirical"` uses the labels of the data, `"sampled"` draws one label per term from the model's own outputs,
    the same for the same seed. Batches are split into parts, so that the recorded tensors, plus `extra` bytes per
    sample, stay within `budget`; the first part is one sample, to measure its size.

    A parameter's gradient from hooks is compared with autograd's own gradient the first time it has one. If a layer
    uses a parameter in another way than by its call (or no layer here has it), autograd computes its gradients, sample
    by sample. `apart` distinguishes samples, so layers that mix them among their rows (experts) get one sample at a
    time.
    """

    def __init__(
        self,
        objective: Objective,
        kind: FisherKind,
        *,
        seed: int = 0,
        budget: int = BUDGET,
        extra: int = 0,
        apart: bool = True,
    ) -> None:
        if kind not in ("sampled", "empirical"):
            raise OptionError(f"the kind of gradients is 'sampled' or 'empirical', not {kind!r}")
        self.objective, self.kind, self.seed, self.apart = objective, kind, seed, apart
        if extra > budget:
            raise OptionError(f"one gradient takes {extra} bytes, more than the budget of {budget}: use more")
        self.budget, self.extra = budget, extra
        self.parts, self.modules = parts_of(objective)
        self.others = [name for name, parts in self.parts.items() if not parts]
        self._unchecked = [name for name, parts in self.parts.items() if parts]
        self._at_once, self._measured = 1, False
        self._mixed = False  # True if a layer's rows are not grouped by sample
        self._copied: set[str] = set()  # modules whose outputs the network changes in place
        self._terms = 0

    @property
    def scale(self) -> float:
        """Return the objective's factor for sums over all data; it is known when the pass has ended."""
        return self.objective.scale_of(self._terms)

    def __iter__(self) -> Iterator[RecordedBatch]:
        self._terms = 0
        draw = partial(self.objective.loss.sample_targets, generator=label_generator(self.seed))
        for inputs, targets in self.objective.batches():
            start = 0
            while start < len(targets):
                part = slice(start, start + (1 if self._mixed and self.apart else self._at_once))
                yield from self._part(rows_of(inputs, part), targets[part], draw if self.kind == "sampled" else None)
                start = part.stop

    def _part(
        self, inputs: Any, targets: Tensor, draw: Callable[[Tensor, Tensor], Tensor] | None
    ) -> Iterator[RecordedBatch]:
        objective, samples = self.objective, len(targets)
        with torch.enable_grad(), Recorder(self.modules, self._copied) as recorder:
            outputs = objective.outputs_once(inputs)
            if not all_finite(outputs):
                raise DataError("the model's outputs hold NaN or infinity: it overflows on this data, or is damaged")
            if draw is not None:
                targets = draw(outputs.detach(), targets)
            terms = objective.loss.terms(outputs, targets)
        if recorder.without_gradients:
            raise UnsupportedModelError(
                f"{min(recorder.without_gradients)} is called without gradients inside the model: with gradient "
                "checkpointing give use_reentrant=False, else leave its parameters out"
            )
        if recorder.changed:
            self._copied |= recorder.changed
            yield from self._part(inputs, targets, None)
            return
        mixed = not recorder.leading(samples, outputs.ndim)
        self._mixed = self._mixed or mixed
        if mixed and self.apart and samples > 1:
            for k in range(samples):
                yield from self._part(rows_of(inputs, slice(k, k + 1)), targets[k : k + 1], None)
            return
        unchecked = {name: objective.named[name] for name in self._unchecked}
        counted = objective.loss.count(targets)
        self._terms += terms.numel() if counted is None else counted
        slopes, wanted = backward(terms.sum(), recorder, unchecked.values())
        passage = RecordedBatch(recorder.rows(slopes, flat=mixed), samples)
        self._check(passage, dict(zip(unchecked, wanted, strict=True)))
        if self.others and self.apart:
            passage.others.update(self._by_autograd(inputs, targets))
        if not self._measured:
            self._choose_size(recorder, samples)
        yield passage

    def _choose_size(self, recorder: Recorder, samples: int) -> None:
        """Choose the number of samples per part from the size of one."""
        inputs = {received.data_ptr(): received.nbytes for _, received, _ in recorder.calls}
        outputs = sum(output.nbytes for output in recorder.outputs)
        # Outputs and their gradients; tensors between layers take about as much again.
        one = 2 * (sum(inputs.values()) + 2 * outputs) // samples + self.extra
        self._at_once, self._measured = max(self.budget // max(one, 1), 1), True

    def _check(self, passage: RecordedBatch, gradients: dict[str, Tensor | None]) -> None:
        """Compare the hooks' gradients with autograd, for the parameters that had no gradient before."""
        for name, wanted in gradients.items():
            parameter = self.objective.named[name]
            wanted = torch.zeros_like(parameter) if wanted is None else wanted
            found = summed_gradient(passage, self.parts[name], parameter)
            size = float(wanted.norm())
            if float((found - wanted).norm()) > AGREEMENT.get(wanted.dtype, 5e-2) * size:
                self.parts[name] = []
                self.others.append(name)
                self._unchecked.remove(name)
            elif size > 0:
                self._unchecked.remove(name)

    def _by_autograd(self, inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients of parameters that belong to no layer; sample by sample where vmap fails."""
        objective = self.objective
        places = [objective.names.index(name) for name in self.others]
        fixed: list[Tensor] = [p.detach() for p in objective.parameters]

        def summed(values: tuple[Tensor, ...], sample: Any, target: Tensor) -> Tensor:
            every = list(fixed)
            for place, value in zip(places, values, strict=True):
                every[place] = value
            outputs = objective.outputs(batch_of_one(sample), every)
            return objective.loss.terms(outputs, target.unsqueeze(0)).sum()

        chosen = tuple(fixed[place] for place in places)
        try:
            found = vmap(grad(summed), in_dims=(None, 0, 0), randomness="different")(chosen, inputs, targets)
        except RuntimeError as error:  # a path that depends on the data, such as that of a mixture of experts
            if "vmap" not in str(error):
                raise
            found = tuple(torch.stack(rows) for rows in zip(*self._one_by_one(places, inputs, targets), strict=True))
        return dict(zip(self.others, found, strict=True))

    def _one_by_one(self, places: Sequence[int], inputs: Any, targets: Tensor) -> Iterator[list[Tensor]]:
        parameters = [self.objective.parameters[place] for place in places]
        for k in range(len(targets)):
            one = slice(k, k + 1)
            loss = self.objective.loss.terms(self.objective.outputs(rows_of(inputs, one)), targets[one]).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            yield [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def batch_of_one(sample: Any) -> Any:
    """Return one sample as a batch."""
    return map_tensors(sample, lambda tensor: tensor.unsqueeze(0))


def rows_of(inputs: Any, part: slice) -> Any:
    """Return some samples of a batch."""
    return map_tensors(inputs, lambda tensor: tensor[part])


def map_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `inputs` with `change` applied to each tensor.

    Raises:
        OptionError: the inputs hold something other than tensors.
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {key: map_tensors(value, change) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(map_tensors(value, change) for value in inputs)
    raise OptionError(f"inputs of {type(inputs).__name__} cannot be taken apart into samples: give tensors")
