"""Exact second derivatives of a network's loss, as products only: Hessian, Gauss-Newton matrix, Fisher."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from hesse.curvature.base import Curvature
from hesse.curvature.objective import Objective, each, label_generator
from hesse.curvature.origin import Origin
from hesse.errors import OptionError, UnsupportedProduct

Columns = tuple[Tensor, ...]  # one tensor (columns, *shape) a parameter
COLUMNS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Exact(Curvature):
    """A matrix on the flat vector of an objective's parameters, in the unit of its loss; never formed.

    Each product takes one pass over the data. Several right-hand sides share a pass, with `columns` of them in
    memory: by default 8, or 1 where that is faster.
    """

    objective: Objective
    columns: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", self._origin())

    def _origin(self) -> Origin:
        """Return the origin of the matrix: by default per term of the loss, whatever sample the term is in."""
        name = {"GaussNewton": "Gauss-Newton"}.get(type(self).__name__, type(self).__name__)
        return Origin(name, "term", f"{self.objective.loss.reduction} loss")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.objective.size,))

    @property
    def _held(self) -> Tensor:
        return self.objective.parameters[0]

    @torch.no_grad()
    def _matvec(self, vector: Tensor) -> Tensor:
        try:
            return self._product(vector)
        except (NotImplementedError, RuntimeError) as error:
            if "derivative for" not in str(error):
                raise
            raise UnsupportedProduct(f"{str(error).splitlines()[0]}: torch cannot differentiate it twice") from error

    def _product(self, vector: Tensor) -> Tensor:
        objective = self.objective
        flat = vector.reshape(-1, objective.size).to(objective.parameters[0])
        total = torch.zeros_like(flat)
        columns = self.columns or self._best_columns()
        for product in self._batches():
            for start in range(0, len(flat), columns):
                pieces = product(objective.split(flat[start : start + columns]))
                total[start : start + columns] += torch.cat([piece.flatten(1) for piece in pieces], dim=1)
            del product  # or its graph would be there beside that of the next batch
        return (total * objective.scale).view(vector.shape).to(vector)

    def _best_columns(self) -> int:
        return COLUMNS

    @abstractmethod
    def _batches(self) -> Iterator[Callable[[Columns], Columns]]:
        """Yield the product with the matrix of each batch's summed terms."""

    def diagonal(self) -> Tensor:
        raise UnsupportedProduct(
            f"the diagonal of a {type(self).__name__} costs a product for each parameter: use "
            "hesse.solvers.hutchinson_diagonal, or .matrix() if there are few parameters"
        )

    def trace(self) -> float:
        raise UnsupportedProduct(f"use hesse.solvers.hutchinson_trace for the trace of a {type(self).__name__}")

    def rank(self) -> int:
        raise UnsupportedProduct(f"the rank of a {type(self).__name__} is unknown: use .with_damping(absolute)")

    def largest_eigenvalue(self) -> float:
        raise UnsupportedProduct(f"use hesse.solvers.lanczos for eigenvalues of a {type(self).__name__}")

    def _solve(self, vector: Tensor) -> Tensor:
        raise UnsupportedProduct(f"use hesse.solvers.conjugate_gradients to solve with a {type(self).__name__}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Hessian(Exact):
    """∇²L: symmetric, and with negative eigenvalues away from a minimum. By backward over backward (Pearlmutter, 1994).

    With `keep_graph` the graph of the gradient is kept for further products: faster, at the memory of all batches'
    graphs. The matrix is then that of the parameters at the first product.

    Example:
        >>> data = [(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))]
        >>> objective = Objective.of(nn.Linear(1, 1, bias=False), nn.MSELoss(), data)
        >>> Hessian(objective=objective) @ torch.ones(1)  # of the mean of (w x)²
        tensor([5.])
    """

    keep_graph: bool = False

    @cached_property
    def _graphs(self) -> dict[int, tuple[Tensor | None, ...]]:
        return {}

    def _gradient(self, index: int, inputs: Any, targets: Tensor) -> tuple[Tensor | None, ...]:
        if index in self._graphs:
            return self._graphs[index]
        objective = self.objective
        with torch.enable_grad():
            loss = objective.loss.terms(objective.outputs(inputs), targets).sum()
            gradient = torch.autograd.grad(loss, objective.parameters, create_graph=True, allow_unused=True)
        if self.keep_graph:
            self._graphs[index] = gradient
        return gradient

    def _batches(self) -> Iterator[Callable[[Columns], Columns]]:
        for index, (inputs, targets) in enumerate(self.objective.batches()):
            yield self._products(self._gradient(index, inputs, targets))

    def _products(self, gradient: tuple[Tensor | None, ...]) -> Callable[[Columns], Columns]:
        parameters = self.objective.parameters

        def one(vector: Sequence[Tensor]) -> Columns:
            # A gradient that does not depend on the parameters has no second derivative.
            pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g is not None and g.requires_grad]
            if not pairs:
                return tuple(torch.zeros_like(p) for p in parameters)
            outputs, directions = zip(*pairs, strict=True)
            second = torch.autograd.grad(outputs, parameters, directions, retain_graph=True, allow_unused=True)
            return tuple(torch.zeros_like(p) if s is None else s for s, p in zip(second, parameters, strict=True))

        def all_columns(vectors: Columns) -> Columns:
            each = [one([v[k] for v in vectors]) for k in range(len(vectors[0]))]
            return tuple(torch.stack(pieces) for pieces in zip(*each, strict=True))

        return all_columns


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussNewton(Exact):
    """Σ Jᵀ (∂²ℓ/∂outputs²) J: the Hessian without the curvature of the network itself.

    Positive semi-definite for a convex ℓ. Forward mode for J and backward for Jᵀ (Schraudolph, 2002).

    Example:
        >>> data = [(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))]
        >>> objective = Objective.of(nn.Linear(1, 1, bias=False), nn.MSELoss(), data)
        >>> GaussNewton(objective=objective).matrix()
        tensor([[5.]])
    """

    def _best_columns(self) -> int:
        return _best_vmap(self.objective)

    def _batches(self) -> Iterator[Callable[[Columns], Columns]]:
        for inputs, targets in self.objective.batches():
            yield self._products(inputs, targets)

    def _products(self, inputs: Any, targets: Tensor) -> Callable[[Columns], Columns]:
        loss = self.objective.loss

        def outputs(*parameters: Tensor) -> Tensor:
            return self.objective.outputs(inputs, parameters)

        def inner(result: Tensor, tangents: Tensor) -> Tensor:
            return torch.stack([loss.output_product(result, targets, tangent) for tangent in tangents])

        return _sandwich(outputs, self.objective.parameters, inner)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fisher(Exact):
    """Σ E[g gᵀ], g the gradient of a sample's (or term's) summed loss.

    Three different matrices: `kind="exact"` takes the expectation over labels of the model's own distribution, which
    for cross-entropy and squared error is the Gauss-Newton matrix; `"sampled"` draws one label a term from it, an
    unbiased estimate; `"empirical"` takes the labels of the data, which is neither (Kunstner et al., 2019).
    `per="sample"` squares the gradient of a whole sample (a sequence), `per="term"` that of each of its terms (a
    token); for the first two kinds they have the same expectation. The gradient of a batch's mean is never squared.

    `seed` draws the same labels for every product, in the order of the data, however the data is split into batches;
    None draws new labels for each product.

    Example:
        >>> data = [(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))]
        >>> objective = Objective.of(nn.Linear(1, 1, bias=False), nn.MSELoss(), data)
        >>> Fisher(objective=objective, kind="exact").matrix()
        tensor([[5.]])
    """

    kind: Literal["exact", "sampled", "empirical"]
    per: Literal["sample", "term"] = "sample"
    seed: int | None = 0

    def _origin(self) -> Origin:
        return Origin(f"{self.kind} Fisher", self.per, f"{self.objective.loss.reduction} loss")

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "sampled", "empirical"):
            raise OptionError(f"the kind of a Fisher is 'exact', 'sampled' or 'empirical', not {self.kind!r}")
        if self.per not in ("sample", "term"):
            raise OptionError(f"a Fisher is per 'sample' or per 'term', not {self.per!r}")
        if self.kind != "empirical":  # refuses a loss without a distribution
            generator = torch.Generator().manual_seed(0)
            self.objective.loss.sample_targets(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), generator)
        super().__post_init__()

    def _best_columns(self) -> int:
        return _best_vmap(self.objective)

    def _batches(self) -> Iterator[Callable[[Columns], Columns]]:
        objective, generator = self.objective, label_generator(self.seed)
        if self.kind == "exact":
            yield from GaussNewton(objective=objective)._batches()
            return
        for inputs, targets in objective.batches():
            if self.kind == "sampled":
                targets = objective.sample_targets(inputs, targets, generator)
            yield self._products(inputs, targets)

    def _products(self, inputs: Any, targets: Tensor) -> Callable[[Columns], Columns]:
        objective, loss = self.objective, self.objective.loss

        def losses(*parameters: Tensor) -> Tensor:
            terms = loss.terms(objective.outputs(inputs, parameters), targets)
            return terms.flatten(1).sum(1) if self.per == "sample" and terms.ndim > 1 else terms.flatten()

        return _sandwich(losses, objective.parameters, lambda _, tangents: tangents)


def _best_vmap(objective: Objective) -> int:
    """Return how many columns vmap takes together: one where convolutions would become slow grouped ones."""
    convolutions = any(isinstance(m, nn.modules.conv._ConvNd) for m in objective.model.modules())
    return 1 if convolutions else COLUMNS


def _sandwich(
    function: Callable[..., Tensor], parameters: Sequence[Tensor], inner: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Columns], Columns]:
    """Return v ↦ Jᵀ M J v for columns v, J being the derivative of `function` and M v = inner(function's value, v)."""
    point = tuple(p.detach() for p in parameters)
    value, pull_back = vjp(function, *point)[:2]

    def product(vectors: Columns) -> Columns:
        tangents = each(partial(_derivative, function, point), vectors)
        assert isinstance(tangents, Tensor)
        pulled = each(pull_back, (inner(value.detach(), tangents),))
        assert isinstance(pulled, tuple)
        return pulled

    return product


def _derivative(function: Callable[..., Tensor], point: Columns, *direction: Tensor) -> Tensor:
    try:
        slope: Tensor = jvp(function, point, direction)[1]
    except NotImplementedError:  # an operation without forward mode: Jᵀ is linear, and its own backward is J
        value, pull_back = vjp(function, *point)[:2]
        slope = vjp(pull_back, torch.zeros_like(value))[1](direction)[0]
    return slope
