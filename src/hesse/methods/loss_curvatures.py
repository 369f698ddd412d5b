"""Curvatures of a loss as a function of parameters, by the name that a method gives."""

from collections.abc import Callable

from hesse.curvature import Curvature, GaussNewton, Hessian, Objective
from hesse.registry import Registry

LOSS_CURVATURES: Registry[Callable[[Objective], Curvature]] = Registry("curvature of a loss")
LOSS_CURVATURES.register("gauss_newton", lambda objective: GaussNewton(objective=objective))
LOSS_CURVATURES.register("hessian", lambda objective: Hessian(objective=objective))
