"""The error function of arrays, which NumPy lacks, by rational approximation."""

from __future__ import annotations

import math

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import Array, namespace


def erf_of(x: Array) -> Array:
    """erf of an array: a rational approximation in the array's precision."""
    if x.dtype == backend.float64:
        return _erf64(x)
    return _erf32(x.astype(np.float32, copy=False)).astype(x.dtype, copy=False)


def _erf32(x: Array) -> Array:
    # x P(x²) / Q(x²) on [−4, 4], beyond which erf is ±1 in float32: the minimax fit that Eigen and
    # XLA use.
    xp = namespace(x)
    x = xp.clip(x, -4.0, 4.0)
    return xp.clip(x * _horner(x * x, _ERF32_P) / _horner(x * x, _ERF32_Q), -1.0, 1.0)


def _erf64(x: Array) -> Array:
    # W. J. Cody, "Rational Chebyshev approximation for the error function", 1969: one fit around
    # 0, one for erfc = 1 − erf on [0.47, 4], and beyond that erfc is below 2e-8.
    xp = namespace(x)
    a = xp.abs(x)
    square = xp.minimum(a, 0.5) ** 2
    near = x * _horner(square, _NEAR_P) / _horner(square, _NEAR_Q)
    m = xp.clip(a, 0.46875, 4.0)
    middle = 1.0 - xp.exp(-m * m) * _horner(m, _MIDDLE_P) / _horner(m, _MIDDLE_Q)
    f = xp.clip(a, 4.0, 6.0)
    i = 1.0 / (f * f)
    tail = (1.0 / math.sqrt(math.pi) - i * _horner(i, _FAR_P) / _horner(i, _FAR_Q)) / f
    far = 1.0 - xp.exp(-f * f) * tail
    beyond = xp.copysign(xp.where(a <= 4.0, middle, far), x)
    return xp.where(xp.isnan(x), x, xp.where(a <= 0.46875, near, beyond))


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    """c₀ xⁿ + c₁ xⁿ⁻¹ + … + cₙ"""
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y *= x
        y += c
    return y


# fmt: off
_ERF32_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06,
            -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03,
            -1.60960333262415e-02)
_ERF32_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
            -7.37332916720468e-03, -1.42647390514189e-02)
_NEAR_P = (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
           3.77485237685302021e2, 3.20937758913846947e3)
_NEAR_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
           2.84423683343917062e3)
_MIDDLE_P = (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
             6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2,
             1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3)
_MIDDLE_Q = (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
             1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3,
             3.43936767414372164e3, 1.23033935480374942e3)
_FAR_P = (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1,
          1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4)
_FAR_Q = (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1,
          6.05183413124413191e-2, 2.33520497626869185e-3)
# fmt: on
