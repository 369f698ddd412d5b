"""H: what it is and its products. Plain tensors in, plain tensors out."""

from hesse.curvature.base import Curvature
from hesse.curvature.diagonal import Diagonal
from hesse.curvature.gram import Gram
from hesse.curvature.identity import Identity
from hesse.curvature.kronecker import Kronecker

__all__ = ["Curvature", "Diagonal", "Gram", "Identity", "Kronecker"]
