"""k-means of weighted vectors: k-means++, then Lloyd's steps, none of which raises the cost."""

import torch
from torch import Tensor

AT_ONCE = 1 << 22  # distances in memory together


def weighted_means(vectors: Tensor, masses: Tensor, count: int, steps: int, seed: int = 0) -> Tensor:
    """Return `count` centroids (count, v) that lower Σ masses · (vector - its centroid)²; both inputs are (n, v).

    Each of at most `steps` steps takes every vector to the nearest centroid and every centroid to the weighted mean of
    its vectors, entry by entry; a centroid whose vectors have no mass stays. The result depends only on the inputs and
    `seed`. Source: Lloyd, 1982; k-means++ (Arthur and Vassilvitskii, 2007).
    """
    centroids = _start(vectors, masses, count, seed)
    before: Tensor | None = None
    weighted = masses * vectors
    for _ in range(steps):
        nearest = nearest_vectors(vectors, centroids, masses)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        total, moment = torch.zeros_like(centroids), torch.zeros_like(centroids)
        total.index_add_(0, nearest, masses)
        moment.index_add_(0, nearest, weighted)
        centroids = torch.where(total > 0, moment / torch.where(total > 0, total, 1), centroids)
    return centroids


def nearest_vectors(vectors: Tensor, centroids: Tensor, masses: Tensor | None = None) -> Tensor:
    """Return the index (n,) of the centroid (k, v) of least Σ masses · (vector - centroid)² for each vector (n, v)."""
    found, squares = [], centroids.square()
    size = max(AT_ONCE // len(centroids), 1)
    parts = (torch.split(each, size) for each in (vectors, vectors if masses is None else masses))
    for part, mass in zip(*parts, strict=True):
        if masses is None:
            distances = torch.addmm(squares.sum(1), part, centroids.T, alpha=-2)
        else:
            distances = torch.addmm(mass @ squares.T, mass * part, centroids.T, alpha=-2)
        found.append(distances.argmin(1))
    return torch.cat(found)


def _start(vectors: Tensor, masses: Tensor, count: int, seed: int) -> Tensor:
    """Return vectors drawn in turn, each with a chance proportional to its cost under those drawn before."""
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(vectors.device)
    costs = masses.sum(1).double()
    centroids = torch.empty(count, vectors.shape[1]).to(vectors)
    for number in range(count):
        sums = costs.cumsum(0)
        place = torch.searchsorted(sums, draws[number] * sums[-1], right=True).clamp(max=len(vectors) - 1)
        centroids[number] = vectors[place]
        new = (masses * (vectors - vectors[place]).square()).sum(1).double()
        costs = new if number == 0 else torch.minimum(costs, new)
    return centroids
