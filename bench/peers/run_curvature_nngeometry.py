"""NNGeometry's part of the curvature benchmark."""

from __future__ import annotations

from importlib.metadata import version

import torch
from curvature_common import Meter, run
from curvature_models import Problem
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM
from nngeometry.object import PMatEKFAC, PMatKFAC, PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Products with K-FAC and EK-FAC of the empirical Fisher.

    "regression" sums the squared gradients of each output: with a sample's loss as the only output that is the
    empirical Fisher. A convolution's factors are scaled the other way round than Hesse's, so products are compared; its
    EK-FAC takes whole samples' eigenvalues with expanded factors, which Hesse refuses, and is left out.
    """
    layers = LayerCollection.from_model(problem.model)
    loader = DataLoader(TensorDataset(*problem.whole()), batch_size=8)

    def losses(inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(problem.model(inputs), labels, reduction="none")[:, None]

    torch.set_default_dtype(torch.float64)
    meter.begin()
    settings = {"variant": "regression", "function": losses, "layer_collection": layers}
    kfac = FIM(problem.model, loader, PMatKFAC, **settings)
    ekfac = FIM(problem.model, loader, PMatEKFAC, **settings)
    ekfac.update_diag(loader)
    vector = PVector(layers, vector_repr=problem.vectors(1)[0])
    found = {}
    for words, product in (("K-FAC", kfac.mv(vector).to_dict()), ("EK-FAC", ekfac.mv(vector).to_dict())):
        for layer, (weight, *_) in product.items():
            if words == "K-FAC" or weight.ndim == 2:
                found[f"{words} expand, product/{layer.rpartition('.')[0] or layer}"] = weight.flatten(1)
    return found


if __name__ == "__main__":
    run(version("nngeometry"), {"agreement": agreement})
