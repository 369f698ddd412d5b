"""Lanczos: extreme eigenvalues of a curvature from its products, and the density of its spectrum."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesse.curvature import Curvature
from hesse.errors import OptionError
from hesse.solvers.linear.stochastic import Estimate, mean_of, random_signs

FIRST_VECTORS = 16  # allocated at first


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues (k,), eigenvectors (k, *shape), and ‖Hv - λv‖ of each (k,); the requested first.

    For both ends: the largest in falling order, then the smallest in rising order.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool

    @property
    def sentence(self) -> str:
        """One sentence on how the iteration ended and what to do next."""
        worst = float(self.residuals.max())
        if self.converged:
            return f"Lanczos converged in {self.products} products; the largest residual is {worst:.1e}."
        return (
            f"Lanczos did not converge in {self.products} products; the largest residual is {worst:.1e}, within which "
            "each value is right: use more products, or ask for fewer eigenvalues"
        )


def lanczos(
    curvature: Curvature,
    k: int = 1,
    *,
    which: Literal["largest", "smallest", "both"] = "largest",
    tolerance: float = 1e-4,
    max_products: int = 100,
    seed: int = 0,
) -> Eigenpairs:
    """Return the `k` largest or smallest eigenpairs of H (without damping), or `k` of both ends.

    With full reorthogonalization, so memory is one vector per product. It ends when all residuals are at most
    `tolerance` times the largest eigenvalue in size. For a repeated eigenvalue it finds one vector.
    Source: Lanczos, 1950.

    Raises:
        OptionError: `k` or `max_products` has no meaning here.
    """
    size = curvature.shape.numel()
    if not 1 <= k <= size:
        raise OptionError(f"{k} eigenvalues were asked of a curvature with {size}")
    enough = min(2 * k if which == "both" else k, size)
    if max_products < enough:
        raise OptionError(f"{enough} eigenvalues need {enough} products or more, not {max_products}")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(curvature.device)
    walk = _Walk(curvature, start)
    while True:
        ended = not walk.step()
        if len(walk.alphas) < enough and not ended:
            continue
        # An early end means fewer distinct eigenvalues than requested: the others are copies of these.
        values, coordinates, residuals = walk.ritz()
        order = _selected(values, k, which)
        converged = ended or bool((residuals[order] <= tolerance * float(values.abs().max())).all())
        if converged or len(walk.alphas) >= max_products:
            break
    vectors = coordinates[:, order].T @ walk.basis[: len(walk.alphas)]
    shaped = vectors.reshape(-1, *curvature.shape).to(curvature.dtype)
    return Eigenpairs(values[order], shaped, residuals[order], len(walk.alphas), converged)


def _selected(values: Tensor, k: int, which: str) -> Tensor:
    """Places of the wanted among ascending `values`: the largest from the largest on, or the smallest."""
    smallest = torch.arange(min(k, len(values)), device=values.device)
    largest = len(values) - 1 - smallest
    if which == "both":
        return torch.cat([largest, smallest[smallest < len(values) - len(largest)]])
    return largest if which == "largest" else smallest


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Quadrature of the spectrum of H by probe: `nodes` and `weights` (probes, steps); a probe's weights sum to 1."""

    nodes: Tensor
    weights: Tensor
    dimension: int

    def density(self, points: Tensor, width: float) -> Estimate:
        """Eigenvalues per unit at `points` (n,), smoothed by a Gaussian of standard deviation `width`."""
        distance = (points.double()[None, :, None] - self.nodes[:, None, :]) / width
        bumps = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi))
        return mean_of(self.dimension * (bumps * self.weights[:, None, :]).sum(2))

    def share_below(self, value: float) -> Estimate:
        """Return the share of eigenvalues below `value`."""
        return mean_of(((self.nodes < value) * self.weights).sum(1))


def spectral_density(curvature: Curvature, probes: int = 8, steps: int = 40, seed: int = 0) -> Spectrum:
    """Return the spectrum of H (without damping) by stochastic Lanczos quadrature, `probes` · `steps` products.

    Source: Golub and Meurant, 1994; Ghorbani, Krishnan and Xiao, 2019.
    """
    if steps < 1:
        raise OptionError(f"{steps} steps were asked: use 1 or more")
    signs = random_signs(curvature, probes, seed).double().reshape(probes, -1)
    nodes, weights = torch.zeros(probes, steps).double(), torch.zeros(probes, steps).double()
    for probe, sign in enumerate(signs):
        walk = _Walk(curvature, sign)
        while len(walk.alphas) < steps and walk.step():
            pass
        values, coordinates, _ = walk.ritz()
        nodes[probe, : len(values)] = values.cpu()
        weights[probe, : len(values)] = coordinates[0].square().cpu()
    return Spectrum(nodes, weights, curvature.shape.numel())


def log_determinant(curvature: Curvature, probes: int = 8, steps: int = 40, seed: int = 0) -> Estimate:
    """Log det(H + λI), by stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017).

    Raises:
        OptionError: an eigenvalue of H + λI that is not positive was met.
    """
    spectrum = spectral_density(curvature, probes, steps, seed)
    shifted = spectrum.nodes + curvature.damping
    if bool((shifted[spectrum.weights > 0] <= 0).any()):
        raise OptionError("H + λI is not positive definite, so its determinant has no logarithm: use more damping")
    terms = torch.where(spectrum.weights > 0, spectrum.weights * shifted.clamp(min=1e-300).log(), 0)
    return mean_of(spectrum.dimension * terms.sum(1))


class _Walk:
    """Lanczos vectors in float64, one more a step, and the tridiagonal matrix of H between them."""

    def __init__(self, curvature: Curvature, start: Tensor) -> None:
        self.curvature = curvature
        self._rows = torch.empty(FIRST_VECTORS, len(start), dtype=torch.float64, device=start.device)
        self._rows[0] = start / start.norm()
        self._count = 1
        self.alphas: list[float] = []
        self.betas: list[float] = []

    @property
    def basis(self) -> Tensor:
        """The Lanczos vectors so far (n, size)."""
        return self._rows[: self._count]

    def step(self) -> bool:
        """Take one more product; return False when the basis cannot grow, since H maps its span into itself."""
        basis, vector = self.basis, self.basis[-1]
        shaped = vector.reshape(self.curvature.shape).to(self.curvature.dtype)
        image = self.curvature.matvec(shaped).double().flatten()
        self.alphas.append(float(vector @ image))
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            image = image - basis.T @ (basis @ image)
        beta = float(image.norm())
        scale = max(abs(a) for a in self.alphas)
        limit = max(scale, beta) * torch.finfo(self.curvature.dtype).eps * 10
        if beta <= limit or len(basis) == len(vector):
            self.betas.append(0.0)
            return False
        self.betas.append(beta)
        if self._count == len(self._rows):  # doubled, so that vectors are copied once on average
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
        self._rows[self._count] = image / beta
        self._count += 1
        return True

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Approximate eigenvalues (n,), their vectors in the basis as columns (n, n), and residual norms (n,)."""
        inner = torch.tensor(self.betas[:-1], dtype=torch.float64)
        matrix = torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + inner.diag(1) + inner.diag(-1)
        values, coordinates = torch.linalg.eigh(matrix)
        device = self._rows.device
        return values.to(device), coordinates.to(device), (self.betas[-1] * coordinates[-1].abs()).to(device)
