"""What every optimiser shares: parameter groups, their state, and the walk over the parameters.

An optimiser is a subclass with one method, `_update`, which reads like its formula. Everything else
is here: which parameters with which options, what is kept between steps, how that is saved, and how
an update runs fast on arrays that are larger than the cache.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from tinygrad_llm.autograd import mark_written
from tinygrad_llm.backend import Array, device_of, float32, is_array, namespace, to_device
from tinygrad_llm.optim.clip import norms
from tinygrad_llm.optim.groups import Params, as_groups, describe, names_and_parameters
from tinygrad_llm.tensor import Tensor

# Elements at a time: the five or six pieces of 256 KiB that an update reads and writes a dozen
# times stay in a core's second-level cache.
BLOCK = 65536

# What a group may hold beside the optimiser's own options.
_LABELS = frozenset({"params", "param_names", "name", "initial_lr"})


class Optimizer:
    """θ ← θ − update(∂L/∂θ), for every parameter θ that has a gradient.

    ```python
    optimizer = AdamW(model.parameters(), lr=3e-4)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    ```

    The interface is PyTorch's. `params` is an iterable of Tensors, of (name, Tensor) pairs, or of
    dicts `{"params": …, "lr": …}`: parameter groups, each with options of its own where it names
    them and the optimiser's where it does not. `param_groups` is that list; whoever changes
    `param_groups[0]["lr"]` changes the next step.

    float16 and bfloat16 parameters are updated through a float32 copy, `state[p]["master"]`, since
    an update is often smaller than the distance to their next value. The copy is the truth: load
    weights into the model before the first step, not between two.

    Raises:
        TypeError: `params` is one Tensor, or holds something else than Tensors.
        ValueError: no parameter; a parameter twice; one that is not a leaf with requires_grad; an
            option that does not exist or is out of its range.
    """

    # The names of what is kept per parameter, all or none of which are there.
    state_keys: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._scratch: dict[np.dtype, tuple[np.ndarray, ...]] = {}
        for group in as_groups(params):
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimise these parameters too; options that the dict leaves out are the defaults."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(
                "a parameter group is a dict with the key 'params', got "
                f"{describe(param_group)}: write {{'params': [p, …], 'lr': …}}"
            )
        self._refuse_unknown(param_group)
        taken = {id(p) for p in self._parameters()}
        names, parameters = names_and_parameters(param_group["params"], taken)
        if self.param_groups and bool(names) != ("param_names" in self.param_groups[0]):
            raise ValueError(
                "either all parameters come with names or none: use named_parameters() or "
                "parameters() for every group"
            )
        group = {"params": parameters, **self.defaults, **_without(param_group, "params")}
        if names:
            group["param_names"] = names
        self._check(group)
        self.param_groups.append(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """p.grad ← None, or ← 0 with `set_to_none=False`, for every parameter.

        None frees the memory, and a parameter that the next loss does not reach is then skipped
        by `step()`; with zeros it still feels momentum and weight decay.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if set_to_none or p.grad is None:
                    p.grad = None
                else:
                    p.grad = Tensor(namespace(p.data).zeros_like(p.data))

    def step(self, factor: float = 1.0) -> None:
        """One update of every parameter that has a gradient; where `grad` is None, none.

        With a factor, that times the gradient takes the gradient's place, multiplied in float32 at
        least: a gradient in float16 was scaled up to be no zero, and is none when scaled back.
        """
        for group in self.param_groups:
            self._step_group(group["params"], group, float(factor))

    def step_clipped(
        self,
        max_norm: float = math.inf,
        factor: float = 1.0,
        loss: Array | None = None,
        wait: bool = False,
    ) -> Any:
        """norm = ‖factor · g‖; a step with factor · g · min(1, max_norm / (norm + 10⁻⁶)); the norm

        `clip_grad_norm_` and `step` in one, for parameters of this optimiser only. Nothing is
        changed where the norm is NaN or infinite, or a number of `loss` is; the gradients are only
        read. Where kernels do it (see `dispatch`), the norm is an array (1,) on the GPU, clipped by
        there, and the host has waited for nothing; else it is a Python float.

        Args:
            max_norm: the largest norm allowed; math.inf clips nothing.
            factor: as 1 over a loss scale; see `step`.
            loss: an array of one number that must be finite for the step, too.
            wait: return a float in any case, known before the step, so that no count goes on where
                there is none. For who trains on after a step that was left out, as float16 does;
                the counts, which the host keeps, else take it for a step.
        """
        reached = [p.grad.data for p in self._parameters() if p.grad is not None]
        norm = abs(float(factor)) * math.hypot(*norms(reached))
        if math.isfinite(norm) and (loss is None or math.isfinite(float(loss))):
            self.step(float(factor) * min(1.0, float(max_norm) / (norm + 1e-6)))
        return norm

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any], factor: float) -> None:
        for p in parameters:
            if p.grad is not None:
                self._advance(p, p.grad.data, group, factor)

    def _advance(self, p: Tensor, g: Array, group: dict[str, Any], factor: float) -> None:
        theta, state = p.data, self._state_of(p, g)
        if factor != 1.0:
            g = (g.astype(float32) if _is_half(g) else g) * factor
        if _is_half(theta):
            self._update(state["master"], g, state, group)
            theta[...] = state["master"]
        else:
            self._update(theta, g, state, group)
        mark_written(theta, by=type(self).__name__)

    def _state_of(self, p: Tensor, g: Array) -> dict[str, Any]:
        """What is kept of p; with a master where p is half. ValueError for another shape of g."""
        if g.shape != p.data.shape:
            raise ValueError(
                f"a parameter of shape {p.data.shape} has a gradient of shape {g.shape}: "
                "was its .grad set by hand?"
            )
        state = self.state.get(p)
        if state is None:
            state = self.state[p] = {}
        if _is_half(p.data) and "master" not in state:
            state["master"] = p.data.astype(float32)
        return state

    def _update(
        self, weights: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The formula: changes `weights` and `state` in place; `gradient` is only read."""
        raise NotImplementedError(f"{type(self).__name__} does not define _update()")

    def _check(self, options: dict[str, Any]) -> None:
        """Raise where an option of a group is out of its range; make Python floats of numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not define _check()")

    def _blocks(
        self, weights: Array, gradient: Array, *moments: Array
    ) -> Iterator[tuple[Array, ...]]:
        """(θ, g, a, b, *moments), one piece at a time; a and b are work arrays of the same size.

        The pieces of `weights` and `moments` are views: writing into them is the update. g comes
        in the dtype of θ. On a GPU, or where θ is not contiguous, there is one piece: all of it.
        """
        xp, dtype = namespace(weights), weights.dtype
        if xp is not np or False in [x.flags.c_contiguous for x in (weights, *moments)]:
            g = gradient.astype(dtype, copy=False)
            yield weights, g, xp.empty_like(weights), xp.empty_like(weights), *moments
            return
        a, b, cast = self._work_arrays(dtype)
        flat = [x.reshape(-1) for x in (weights, np.ascontiguousarray(gradient), *moments)]
        for start in range(0, weights.size, BLOCK):
            theta, g, *rest = [x[start : start + BLOCK] for x in flat]
            n = theta.size
            if g.dtype != dtype:
                cast[:n] = g
                g = cast[:n]
            yield theta, g, a[:n], b[:n], *rest

    def _work_arrays(self, dtype: np.dtype) -> tuple[np.ndarray, ...]:
        if dtype not in self._scratch:
            self._scratch[dtype] = tuple(np.empty(BLOCK, dtype) for _ in range(3))
        return self._scratch[dtype]

    # --- saving and resuming ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """{"state": {0: {"step": 7, "exp_avg": array, …}, …}, "param_groups": [{…, "params": [0]}]}

        PyTorch's layout: parameters are numbered through all groups, in order; a parameter that
        was never updated has no entry in "state". The arrays are the optimiser's own, not copies:
        write them out, or copy them, before the next step.
        """
        numbers_of = {id(p): i for i, p in enumerate(self._parameters())}
        groups = []
        for group in self.param_groups:
            indices = [numbers_of[id(p)] for p in group["params"]]
            groups.append({**_without(group, "params"), "params": indices})
        state = {numbers_of[id(p)]: dict(kept) for p, kept in self.state.items() if kept}
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict()` was taken: the next steps are the same bit for bit.

        The optimiser must have the same groups with the same numbers of parameters, in the same
        order. Options come from `state_dict`, arrays are copied to the parameters' device. Nothing
        is changed when anything does not fit.

        Raises:
            ValueError: lists what does not fit.
        """
        parameters = self._parameters()
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                "expected a dict with 'state' and 'param_groups' as state_dict() makes it, got "
                f"one with {', '.join(map(repr, state_dict))}"
            )
        groups = state_dict["param_groups"]
        state = {int(i): _without_none(kept) for i, kept in state_dict["state"].items()}
        misfits = self._group_misfits(groups) or self._state_misfits(parameters, state)
        if misfits:
            raise ValueError(
                f"this state does not fit this {type(self).__name__}: " + "; ".join(misfits)
            )
        merged = [
            {**current, **saved, "params": current["params"]}
            for current, saved in zip(self.param_groups, groups, strict=True)
        ]
        for group in merged:
            self._check(group)
        self.param_groups[:] = merged
        self.state = {parameters[i]: _adopt(kept, parameters[i]) for i, kept in state.items()}

    def _group_misfits(self, groups: list[dict[str, Any]]) -> list[str]:
        if len(groups) != len(self.param_groups):
            return [f"it has {len(groups)} parameter groups, expected {len(self.param_groups)}"]
        misfits = []
        for i, (group, saved) in enumerate(zip(self.param_groups, groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                misfits.append(
                    f"group {i} has {len(saved['params'])} parameters, "
                    f"expected {len(group['params'])}"
                )
            else:
                misfits += _other_names(i, saved.get("param_names"), group.get("param_names"))
            unknown = sorted(saved.keys() - self.defaults.keys() - _LABELS)
            if unknown:
                misfits.append(f"group {i} has unknown options {', '.join(unknown)}")
        return misfits

    def _state_misfits(
        self, parameters: list[Tensor], state: dict[int, dict[str, Any]]
    ) -> list[str]:
        misfits = []
        for i, kept in state.items():
            if not 0 <= i < len(parameters):
                misfits.append(f"it has a parameter {i}, expected at most {len(parameters) - 1}")
                continue
            p = parameters[i]
            known = self.state_keys | {"master"} if _is_half(p.data) else self.state_keys
            unknown = sorted(kept.keys() - known)
            missing = sorted(self.state_keys - kept.keys()) if self.state_keys & kept.keys() else []
            misfits += [f"parameter {i} ({p.dtype}) has an unexpected '{key}'" for key in unknown]
            misfits += [f"parameter {i} has no '{key}'" for key in missing]
            misfits += [
                f"'{key}' of parameter {i} has shape {np.shape(value)}, expected {p.shape}"
                for key, value in kept.items()
                if key in known and np.shape(value) != (() if key == "step" else p.shape)
            ]
        return misfits

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _refuse_unknown(self, param_group: dict[str, Any]) -> None:
        for key in param_group:
            if key not in self.defaults and key not in _LABELS:
                near = difflib.get_close_matches(str(key), self.defaults, n=1)
                hint = (
                    f"did you mean '{near[0]}'?" if near else f"it has {', '.join(self.defaults)}"
                )
                raise ValueError(f"{type(self).__name__} has no option '{key}': {hint}")

    def __repr__(self) -> str:
        lines = []
        for i, group in enumerate(self.param_groups):
            options = ", ".join(
                f"{key}={value!r}" for key, value in group.items() if key not in _NOT_SHOWN
            )
            size = sum(p.size for p in group["params"])
            lines.append(f"  {i}: {len(group['params'])} arrays, {size:,} numbers; {options}")
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


_NOT_SHOWN = ("params", "param_names")


# --- small tools ----------------------------------------------------------------------------------


def _is_half(array: Array) -> bool:
    """float16 and bfloat16."""
    return array.dtype.itemsize < 4


def _other_names(i: int, saved: list[str] | None, names: list[str] | None) -> list[str]:
    """Parameters of equal shapes in another order would be resumed with each other's moments."""
    pairs = zip(saved, names, strict=True) if saved and names else ()
    return [f"group {i} has '{got}', expected '{name}'" for got, name in pairs if got != name]


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if k != key}


def _without_none(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kept.items() if v is not None}


def _adopt(kept: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Copies of the arrays on p's device, in the dtype that the update works in."""
    dtype = float32 if _is_half(p.data) else p.dtype
    adopted: dict[str, Any] = {}
    for key, value in kept.items():
        if key == "step":
            adopted[key] = int(value)
        else:
            array = value if is_array(value) else np.asarray(value)
            adopted[key] = to_device(array, device_of(p.data)).astype(dtype, order="C", copy=True)
    return adopted
