"""The steps of ascent as optimisers for anybody's training loop.

Source: marginflow; the margin is that of Section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from marginflow._checks import choice, real
from marginflow.ascent._steps import RunningSize, relative_step, sphere_step, unit
from marginflow.errors import InputError


class _Ascent(Optimizer):
    """What both optimisers do with groups, gradients and closures."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked first.

        Args:
            param_group: as for any optimiser of torch.

        Raises:
            InputError: an unknown option, a number out of range, parameters that are not
                float32 or float64.
        """
        if isinstance(param_group, dict):  # torch has its own words for what is none
            known = {"params", "param_names", "initial_lr", *self.defaults}
            for name in param_group:
                if name not in known:
                    raise InputError(
                        f"unknown option {name!r} of a parameter group "
                        f"(valid: {', '.join(sorted(self.defaults))})"
                    )
            self._check({**self.defaults, **param_group})
            if isinstance(param_group["params"], Iterator):
                param_group["params"] = list(param_group["params"])
            _check_dtypes(param_group["params"])
        super().add_param_group(param_group)

    def _check(self, options: dict[str, Any]) -> None:
        real("lr", options["lr"], least=0.0)

    def _with_gradient(self, group: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter and gradient of those in the group that have one."""
        names = group.get("param_names") or [
            f"{i} of shape {tuple(p.shape)}" for i, p in enumerate(group["params"])
        ]
        found = []
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise InputError(
                    f"parameter {name}: expected a dense gradient, got a sparse one; "
                    "build the module with sparse=False"
                )
            found.append((name, parameter, parameter.grad))
        return found


class SphereSGD(_Ascent):
    """Normalised descent with momentum on the product of the layers' spheres.

    Every layer keeps its norm, and a step turns the layers by an angle that does not depend on the
    size of the gradient::

        T_k = r_k (G_k − ⟨G_k, Ŵ_k⟩ Ŵ_k),  v_k ← P_k(μ v_k + T_k / sqrt(Σ_j ‖T_j‖²)),
        Ŵ_k ← (Ŵ_k − lr·v_k)/‖Ŵ_k − lr·v_k‖,  W_k = r_k Ŵ_k

    with ``r_k = ‖W_k‖`` and the projection P_k along Ŵ_k. The sum runs over the layers of all groups.
    For a homogeneous network, scaling the layers changes nothing but the size of its output: minimise
    a loss with a temperature that rises, such as ``ln mean softplus(−τ y f)``, and lower lr meanwhile
    with one of torch's schedulers. L and ln L give the same steps, but only ln L does not
    underflow.

    Each parameter is a layer of its own. Options of a group, besides ``lr`` and ``momentum``:

    - ``layer=True``: its parameters scale together, as weight and bias of the first layer do.
    - ``free=True``: its parameters have no norm to keep (biases, batch normalisation): for them
      ``v ← μ v + G/‖G‖, W ← W − lr·v``, ‖G‖ over all free parameters.

    Args:
        params: parameters, named parameters or groups, as for any torch optimiser. float32 or float64.
        lr: the angle of a step in radians, before momentum.
        momentum: μ in [0, 1); 0.9 makes steps up to 10 times as long.
        layer: whether all parameters of a group scale together.
        free: whether the parameters have no norm to keep.

    Raises:
        InputError: a number out of range, an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0.9,
        *,
        layer: bool = False,
        free: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "layer": layer, "free": free})

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        if real("momentum", options["momentum"], least=0.0) >= 1:
            raise InputError(f"momentum: expected a number below 1, got {options['momentum']!r}")
        for name in ("layer", "free"):
            if not isinstance(options[name], bool):
                raise InputError(f"{name}: expected True or False, got {options[name]!r}")
        if options["layer"] and options["free"]:
            raise InputError("expected layer=True or free=True, got both: what is free has no norm")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step along the gradients in ``.grad``; parameters without one stay.

        Args:
            closure: evaluates the loss, backpropagates it and returns it.

        Returns:
            what the closure returned, such as ln L; None without one.

        Raises:
            ModelError: a layer is 0.
            InputError: a gradient or weight is NaN or infinite, or sparse. No weight has moved.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        names: list[str] = []
        layers: list[list[Tensor]] = []
        gradients: list[list[Tensor]] = []
        angles: list[float] = []
        momenta: list[float] = []
        free: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            found = self._with_gradient(group)
            if group["free"]:
                free += [(p, g, group) for _, p, g in found]
                continue
            for members in [found] if group["layer"] and found else [[one] for one in found]:
                names.append(members[0][0])
                layers.append([p for _, p, _ in members])
                gradients.append([g for _, _, g in members])
                angles.append(group["lr"])
                momenta.append(group["momentum"])
        directions = unit([g for _, g, _ in free])  # refused before anything moves
        norms = [self.state[layer[0]].get("norm", 0.0) for layer in layers]
        velocities = [[self._velocity(p) for p in layer] for layer in layers]
        sphere_step(
            layers,
            gradients,
            velocities,
            angle=angles,
            momentum=momenta,
            norms=norms,
            names=names,
        )
        for layer, norm in zip(layers, norms, strict=True):
            self.state[layer[0]]["norm"] = norm
        for (parameter, _, group), direction in zip(free, directions, strict=True):
            velocity = self._velocity(parameter).mul_(group["momentum"]).add_(direction)
            parameter.sub_(velocity, alpha=group["lr"])
        return value

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity


class RelativeSGD(_Ascent):
    """Steps of a given length relative to the norm: ``W ← W − lr·‖W‖·G/‖G‖``, norms over all groups.

    As the weights of a homogeneous network grow, so do its margins, and the gradient of the
    loss dies; these steps do not. On the whole data set this is normalised gradient descent.

    On mini-batches, steps of one length for all lead to a biased direction. Tell the optimiser the
    batch's loss, by a closure or as ``step(loss=…)``, and each batch counts as it does in the gradient
    of the whole loss, ``‖∇L_B‖/n̄`` times, n̄ a running mean of these sizes (see
    :class:`~marginflow.ascent.RunningSize`). Without the loss all batches count alike.

    Args:
        params: parameters, named parameters or groups, as for any torch optimiser. float32 or float64.
        lr: length of a step relative to the norm of all weights.
        loss: what is backpropagated and told: ``"plain"`` L, or ``"log"`` ln L, which does not underflow.
        beta: memory of the running mean, in [0, 1).
        cap: the most that a batch can count, a factor of at least 1.

    Raises:
        InputError: a number out of range, an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        loss: Literal["plain", "log"] = "plain",
        beta: float = 0.95,
        cap: float = 4.0,
    ) -> None:
        choice("loss", loss, ("plain", "log"))
        if real("beta", beta, least=0.0) >= 1:
            raise InputError(f"beta: expected a number below 1, got {beta!r}")
        real("cap", cap, least=1.0)
        super().__init__(params, {"lr": lr, "loss": loss, "beta": beta, "cap": cap})

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        for name in ("loss", "beta", "cap"):
            if options[name] != self.defaults[name]:
                raise InputError(
                    f"{name}: expected {self.defaults[name]!r} as in the other groups, "
                    f"got {options[name]!r}: there is one loss"
                )

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: None = None) -> float: ...
    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None
    ) -> float | None:
        """Take a step along the gradients in ``.grad``; parameters without one stay.

        Args:
            closure: evaluates the batch's loss, backpropagates it and returns it.
            loss: the batch's loss L, a scalar, where there is no closure.

        Returns:
            what the closure returned, L or ln L; None without one.

        Raises:
            ModelError: all weights are 0.
            InputError: a gradient, a weight or the loss is not finite, a plain loss not above 0,
                a sparse gradient. No weight has moved.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        told = loss if value is None else value
        settings = self.param_groups[0]
        of_log = settings["loss"] == "log"
        running, log_loss = None, 0.0
        home = self.state[settings["params"][0]]
        if told is not None:
            log_loss = float(told.detach() if isinstance(told, Tensor) else told)
            if not of_log:
                if not log_loss > 0:
                    raise InputError(
                        f"expected a loss above 0, got {log_loss}: where it underflows, "
                        'backpropagate ln L and use loss="log"'
                    )
                log_loss = math.log(log_loss)
            running = RunningSize(settings["beta"], settings["cap"], home.get("log_mean"))
        found = [
            (p, g, group) for group in self.param_groups for _, p, g in self._with_gradient(group)
        ]
        relative_step(
            [p for p, _, _ in found],
            [g for _, g, _ in found],
            step=[group["lr"] for _, _, group in found],
            running=running,
            log_loss=log_loss,
            of_log=of_log,
        )
        if running is not None and running.log_mean is not None:
            home["log_mean"] = running.log_mean
        return value


def _check_dtypes(params: Tensor | Iterable[Tensor | tuple[str, Tensor]]) -> None:
    for item in [params] if isinstance(params, Tensor) else params:
        tensor = item[1] if isinstance(item, tuple) else item
        if isinstance(tensor, Tensor) and tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"expected parameters of float32 or float64, got {tensor.dtype}; "
                "keep the weights in float32 and use autocast for the rest"
            )
