"""The margins m_i(W) of one network as functions of its trainable weights, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from marginflow._checks import choice, instance, whole
from marginflow.attacks import FGSM, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.distributed import RowsGenerator, current
from marginflow.errors import InputError, ModelError
from marginflow.homogeneity import Homogeneity, measure_homogeneity, power
from marginflow.kkt._kinks import Kinks
from marginflow.kkt._ties import TIE, tied_perturbations
from marginflow.losses import Loss, check_examples, margins_of

# A row with k units at a kink has 2^k pieces. Beyond this many they are formed as they are needed.
_PROBES = 32
_MOST_KINKS = 8
# Gram matrices square derivatives of margins, ‖W‖^{K−1}: beyond this exponent of ‖W‖^{2K} W is scaled.
_FAR = 300
# Flips of a piece's sides towards the one of the steepest descent; kinks in one layer need one.
_FLIPS = 20


@dataclass(frozen=True, eq=False)
class Rows:
    """Margins taken as smooth functions of W: one row an example, several where it has ties.

    A margin is the smallest of its *pieces*, ``f[y] − f[j]`` at ``x + δ`` for each rival class j
    and each δ of a finite set; and a ReLU whose input is 0 has a piece on either side. Where pieces tie,
    Clarke's subdifferential of the margin is the convex hull of their gradients, so each of them
    is a row of its own.

    Attributes:
        examples: (r,) the examples' indices in the data.
        clean: (r, …) x_i.
        perturbed: (r, …) x_i + δ_i.
        labels: (r,).
        rivals: (r,) the class j of the piece, −1 for a network with one output.
        values: (r,) the pieces at W.
        sides: (r, k, 2) the units at a kink, and 1 or 0 for the side; −1 where there are fewer than k.
    """

    examples: Tensor
    clean: Tensor
    perturbed: Tensor
    labels: Tensor
    rivals: Tensor
    values: Tensor
    sides: Tensor

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, index: Tensor | slice) -> Rows:
        """The rows at ``index``."""
        return Rows(*(column[index] for column in self._columns()))

    def parts(self, size: int) -> Iterator[tuple[slice, Rows]]:
        """Consecutive rows, ``size`` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield part, self.take(part)

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """All rows of the parts, in their order."""
        return Rows(
            *(torch.cat(columns) for columns in zip(*map(Rows._columns, parts), strict=True))
        )

    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the data finds.

    Attributes:
        margins: m_i of the problem's copy, (n,), on the CPU: in units of :attr:`Problem.margin_unit`.
        nearest: one row for each of the smallest margins, in ascending order.
        gradient: ``g = Σ_i w_i ∂m_i/∂W`` over all examples, flat, with the weights w.
        weights: ``w_i = |ℓ′(m_i)| / max_j |ℓ′(m_j)|``, (n,), on the CPU; 0 for examples left out.
    """

    margins: Tensor
    nearest: Rows
    gradient: Tensor
    weights: Tensor


class Problem:
    """``m_i(W)`` and its derivatives by the trainable weights W, on a float64 copy of the network.

    Args:
        model: the network; a copy of it is put into evaluation mode, it itself stays as it is.
        x, y: examples and labels.
        attack: δ, or None.
        derivative: ``total`` differentiates through δ(W), ``detached`` holds it fixed.
        homogeneity: the measured layers, if at hand.
        seed: of a random start.
        batch_size: examples per pass.
        curvature: whether second derivatives will be taken: those of an exact inner maximum do run
            through δ.

    Attributes:
        parameters: the trainable parameters, in the model's order; vectors of weights are flat
            and follow it. Where ``‖W‖^{2K}`` is outside 1e-90 … 1e90 they are W divided by the power of
            two :attr:`unit`, to a norm in [1, 2): that rounds nothing, and a KKT point is one of a
            direction.
        unit: what the copy's weights are to be multiplied by; 1 for nearly every network.
        through: whether derivatives must run through δ. They need not where δ is an exact inner
            maximum (Danskin) or piecewise constant (signs): there detached and total agree.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        attack: Attack | None,
        *,
        derivative: Derivative,
        homogeneity: Homogeneity | None,
        seed: int,
        batch_size: int,
        curvature: bool = False,
    ) -> None:
        choice("derivative", derivative, ("detached", "total"))
        self.batch_size = whole("batch_size", batch_size, least=1)
        self.seed = whole("seed", seed, least=0)
        instance("model", model, nn.Module, "a torch.nn.Module")
        check_examples(x, y)
        if attack is not None and not attack.scale_invariant:
            raise InputError(
                "Theorem 5 is about scale-invariant perturbations, and objective='loss' gives others: "
                "expected an attack with objective='margin'"
            )
        self.model = copy.deepcopy(model).double().eval()
        self.homogeneity = homogeneity or measure_homogeneity(self.model, x)
        self.parameters = tuple(p for p in self.model.parameters() if p.requires_grad)
        self.unit = self._scaled_by()
        self.kinks = Kinks(self.model)
        self._units = 0
        self.x, self.y, self.attack = x, y, attack
        # The dual vector of ℓ1 and ℓ∞ is made of signs.
        signs = attack is not None and (
            attack.piecewise_constant or (attack.exact and attack.p in (1.0, math.inf))
        )
        made_of_signs = signs and not isinstance(attack, FiniteSet)
        self.through = (
            derivative == "total"
            and attack is not None
            and attack.eps > 0
            and not (signs or isinstance(attack, FiniteSet))
            and (curvature or not attack.exact)
        )
        self.signs = made_of_signs and attack is not None and attack.eps > 0
        self.jumps = attack is not None and attack.eps > 0 and not attack.exact
        # A random start is drawn example by example where δ is differentiated, so no call of an
        # activation meets all units at once.
        random = attack is not None and attack.random
        self.has_units = bool(self.kinks.modules) and not (self.through and random)
        norms = self.homogeneity.norms(self.model).tolist()
        for layer, norm in zip(self.homogeneity.layers, norms, strict=True):
            if not 0 < norm < float("inf"):
                raise ModelError(
                    f"the layer {layer.name!r} has the norm {norm:g}, so no margin is positive; expected "
                    "a trained network"
                )

        if not 1e-290 <= self.homogeneity.norm_product(self.model) <= 1e290:
            raise ModelError(
                "the layers differ by so much that their product leaves the range of float64; scale each "
                "layer to about the same norm, which changes no normalised margin"
            )

    def _scaled_by(self) -> float:
        """Divide the copy's weights by a power of two, where ‖W‖ is far from 1; that power."""
        norm = self.homogeneity.total_norm(self.model)
        exponent = math.frexp(norm)[1] - 1 if 0 < norm < math.inf else 0
        if 2 * self.homogeneity.order * abs(exponent) <= _FAR:
            return 1.0
        with torch.no_grad():
            for p in self.parameters:
                p.mul_(2.0**-exponent)
        return 2.0**exponent

    @property
    def margin_unit(self) -> float:
        """``unit^K``: what the copy's margins are to be multiplied by; infinite where it overflows."""
        return power(self.unit, self.order)

    @property
    def order(self) -> float:
        """``K = Σ c_k`` over the trainable layers."""
        return self.homogeneity.order

    @property
    def weights(self) -> Tensor:
        """W, flat."""
        return flat([p.detach() for p in self.parameters])

    def put(self, weights: Tensor) -> None:
        """Give the network the flat vector W of weights."""
        sizes = [p.numel() for p in self.parameters]
        with torch.no_grad():
            for p, part in zip(self.parameters, torch.split(weights, sizes), strict=True):
                p.copy_(part.view_as(p))

    def survey(self, keep: int, loss: Loss, *, fitted_only: bool = False) -> Survey:
        """All margins, the ``keep`` smallest as rows, and the gradient of the loss of the margins.

        With ``fitted_only`` examples without a positive margin have the weight 0, and no row.
        """
        like, n, team = self.parameters[0], len(self.y), current()
        generator = torch.Generator().manual_seed(self.seed)
        gradient = torch.zeros_like(self.weights)
        reference = -torch.inf
        # One place for all results: small ones kept between the passes would keep the heap apart.
        margins, slopes = torch.empty(2, n, dtype=like.dtype)
        nearest: Rows | None = None
        for start in range(0, n, self.batch_size):
            part = slice(start, start + self.batch_size)
            x, y = self.x[part].detach().to(like), self.y[part].to(like.device)
            examples, size = torch.arange(start, start + len(y)), len(y)
            rows, counts, source = slice(0, size), True, generator
            if team is not None:
                rows, counts = team.rows(size), team.counts(size)
                source = RowsGenerator.of(generator, rows, size)
                x, y, examples = x[rows], y[rows], examples[rows]
            z = x + self._delta(x, y, examples, source)
            generator.set_state(source.get_state())
            outputs = self.model(z)
            m = margins_of(outputs, y)
            whole = m.detach() if team is None else team.gather(m.detach(), size)
            if not bool(torch.isfinite(whole).all()):
                raise ModelError("the margins are not finite; check the weights and the data")
            # A running maximum as reference: one pass, and nothing over- or underflows.
            log_slopes = loss.log_slopes(whole * self.margin_unit)
            left_out = (whole <= 0) & fitted_only
            log_slopes = log_slopes.masked_fill(left_out, -torch.inf)
            margins[part], slopes[part] = whole.cpu(), log_slopes.cpu()
            if bool(left_out.all()):
                continue
            greater = max(reference, float(log_slopes.max()))
            gradient *= torch.exp(gradient.new_tensor(reference - greater))
            reference = greater
            left_out, log_slopes = left_out[rows] | (not counts), log_slopes[rows]
            if not bool(left_out.all()):
                gradient += self._gradient((torch.exp(log_slopes - reference) * m).sum())
            rivals = _rivals(outputs.detach(), y)
            sides = torch.empty((len(y), 0, 2), dtype=torch.int64, device=like.device)
            found = Rows(examples.to(like.device), x, z.detach(), y, rivals, m.detach(), sides)
            found = found.take(~left_out)
            nearest = found if nearest is None else Rows.joined([nearest, found])
            nearest = nearest.take(torch.argsort(nearest.values, stable=True)[:keep])
        if team is not None and nearest is not None:
            (gradient,) = team.total([gradient])
            nearest = Rows(*(team.collect(column) for column in nearest._columns()))
            nearest = nearest.take(torch.argsort(nearest.examples))
            nearest = nearest.take(torch.argsort(nearest.values, stable=True)[:keep])
        if nearest is None:
            raise InputError(
                f"none of the {n} margins is positive, so there is no example to certify; train until "
                "some adversarial margins are positive, or reduce eps"
            )
        weights = torch.exp(slopes - reference)
        return Survey(margins, nearest, gradient, weights)

    def pieces(self, rows: Rows, ceiling: Tensor, *, kinks: bool = True) -> Rows:
        """The pieces of the rows' margins that are at most ``ceiling`` (r,), example by example.

        Known are the rival classes at the same δ, the elements of a finite set, and the kinks of
        ``nn.ReLU`` and ``nn.LeakyReLU`` in dense layers where δ is not differentiated. The rival of an
        attack that chooses δ by it (several classes, exact) is known at that δ only.
        """
        found, origins = [], []
        for perturbed, held in self._perturbations(rows, kinks):
            with torch.no_grad():
                outputs = torch.cat(
                    [self.model(z) for z in torch.split(perturbed, self.batch_size)]
                )
            if outputs.ndim == 1 or outputs.shape[1] == 1:
                values = (outputs.reshape(-1) * rows.labels).unsqueeze(1)
            else:
                own = rows.labels.unsqueeze(1)
                values = (outputs.gather(1, own) - outputs).scatter(1, own, torch.inf)
            low = (values <= ceiling.unsqueeze(1)) & torch.isfinite(values) & held.unsqueeze(1)
            if self.signs:
                # Where the other sign makes the margin jump, it is no piece but another branch.
                least = values.amin(dim=1, keepdim=True)
                low &= least >= rows.values.unsqueeze(1) * (1 - TIE)
            origin, rival = torch.nonzero(low, as_tuple=True)
            if values.shape[1] == 1:
                rival = torch.full_like(rival, -1)
            piece = rows.take(origin)
            at = values[origin, rival.clamp(min=0)]
            found.append(replace(piece, perturbed=perturbed[origin], rivals=rival, values=at))
            origins.append(origin)
        pieces = Rows.joined(found).take(torch.argsort(torch.cat(origins), stable=True))
        return self._sides(pieces) if kinks else pieces

    def margins(self, rows: Rows) -> Tensor:
        """The rows' pieces as functions of W that autograd differentiates, (r,)."""
        with ExitStack() as stack:
            if rows.sides.shape[1]:
                stack.enter_context(self.kinks.observed(*self._masks(rows)))
            return self._pieces(rows)

    def _pieces(self, rows: Rows) -> Tensor:
        inputs = rows.perturbed
        if self.through:
            inputs = rows.clean + self._delta(rows.clean, rows.labels, rows.examples, None)
        outputs: Tensor = self.model(inputs)
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            return outputs.reshape(-1) * rows.labels
        both = outputs.gather(1, torch.stack([rows.labels, rows.rivals], dim=1))
        return both[:, 0] - both[:, 1]

    def perturbed(self, rows: Rows) -> Tensor:
        """``x + δ(W)`` with δ formed anew, (r, …)."""
        return (rows.clean + self._delta(rows.clean, rows.labels, rows.examples, None)).detach()

    def combination(self, rows: Rows, multipliers: Tensor) -> Tensor:
        """``Σ_i λ_i ∂m_i/∂W``, flat, by one backward pass."""
        total = torch.zeros_like(self.weights)
        used = torch.nonzero(multipliers).squeeze(1)
        multipliers, rows = multipliers[used].to(total), rows.take(used.to(total.device))
        team = current()
        if team is not None:
            own = team.rows(len(rows)) if team.counts(len(rows)) else slice(0, 0)
            multipliers, rows = multipliers[own], rows.take(own)
        for part, some in rows.parts(self.batch_size):
            total += self._gradient((multipliers[part] * self.margins(some)).sum())
        return total if team is None else team.total([total])[0]

    def slopes(self, rows: Rows, direction: Tensor) -> Tensor:
        """``⟨∂m_i/∂W, direction⟩``, (r,), on the CPU.

        As the derivative of ``⟨Σ_i v_i ∂m_i, direction⟩`` by v, which needs nothing of a network
        but that it can be differentiated twice.
        """
        sizes = [p.numel() for p in self.parameters]
        slopes = []
        team, r = current(), len(rows)
        if team is not None:
            rows = rows.take(team.rows(r))
        for _, some in rows.parts(self.batch_size):
            margins = self.margins(some)
            v = torch.zeros_like(margins, requires_grad=True)
            gradients = torch.autograd.grad(
                margins, self.parameters, v, create_graph=True, materialize_grads=True
            )
            parts = zip(gradients, torch.split(direction, sizes), strict=True)
            along = torch.stack([g.reshape(-1) @ d for g, d in parts]).sum()
            slopes.append(torch.autograd.grad(along, v)[0].cpu())
        return torch.cat(slopes) if team is None else team.gather(torch.cat(slopes), r)

    def gradients(self, rows: Rows) -> Tensor:
        """``∂m_i/∂W`` of each row, (r, number of weights), one backward pass each."""
        found = torch.empty((len(rows), len(self.weights)), dtype=torch.float64)
        found = found.to(self.parameters[0].device)
        for i in range(len(rows)):
            found[i] = self._gradient(self.margins(rows.take(slice(i, i + 1))).sum())
        return found

    def _gradient(self, value: Tensor) -> Tensor:
        return flat(list(torch.autograd.grad(value, self.parameters, materialize_grads=True)))

    def _delta(
        self, x: Tensor, y: Tensor, examples: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        if self.attack is None:
            return torch.zeros_like(x)
        derivative: Derivative = "total" if self.through else "detached"
        if not (self.through and self.attack.random):
            return self.attack(self.model, x, y, derivative=derivative, generator=generator).delta
        # δ will be formed again for some of these examples: its start hangs on the example alone.
        deltas = []
        for i, index in enumerate(examples.tolist()):
            # PyTorch's generator looks at 32 bits of a seed only: they must hang on both numbers.
            mixed = np.random.SeedSequence([self.seed, index]).generate_state(1)
            own = torch.Generator().manual_seed(int(mixed[0]))
            one = slice(i, i + 1)
            deltas.append(
                self.attack(self.model, x[one], y[one], derivative=derivative, generator=own).delta
            )
        return torch.cat(deltas)

    def _sides(self, rows: Rows) -> Rows:
        """The rows with a row for each way to take the sides of the units that are at a kink."""
        if not self.has_units:
            return rows
        at_kink = []
        typical = self._typical(rows)
        for _, some in rows.parts(self.batch_size):
            with self.kinks.observed() as plain, torch.no_grad():
                self.model(some.perturbed)
            if not plain.before:
                return rows
            met = plain
            if self.through:
                with self.kinks.observed() as met:
                    self.margins(some)
            # Where δ is formed, a unit at its kink is a jump of δ(W), which has no subdifferential.
            earlier = len(met.before) - len(plain.before)
            near = [torch.zeros_like(u, dtype=torch.bool) for u in met.before[:earlier]]
            for u, usual in zip(met.before[earlier:], typical, strict=True):
                largest = u.abs().amax(dim=1, keepdim=True)
                near.append(u.abs() <= TIE * torch.minimum(largest, usual))
            at_kink.append(torch.cat(near, dim=1))
        kinks = torch.cat(at_kink)
        self._units = kinks.shape[1]
        if not bool(kinks.any()):
            return rows
        # A unit that nothing above listens to (a dead one) has no second piece.
        weight = self._signals(rows, kinks)
        kinks &= weight > TIE * weight.amax(dim=1, keepdim=True)
        units = [torch.nonzero(row).squeeze(1).tolist() for row in kinks]
        if not any(units):
            return rows
        most = max(map(len, units))
        origins, sides = [], []
        for i, own in enumerate(units):
            crowded = len(own) > _MOST_KINKS
            choices = zip(*[(0, 1)] * len(own), strict=True) if crowded else None
            for taken in choices or product((0, 1), repeat=len(own)):
                origins.append(i)
                pairs = [list(pair) for pair in zip(own, taken, strict=True)]
                sides.append(pairs + [[-1, -1]] * (most - len(own)))
        pieces = replace(
            rows.take(torch.tensor(origins, device=rows.labels.device)),
            sides=torch.tensor(sides, device=rows.labels.device),
        )
        values = [self.margins(some).detach() for _, some in pieces.parts(self.batch_size)]
        return replace(pieces, values=torch.cat(values))

    def _typical(self, rows: Rows) -> list[Tensor]:
        """How large each unit's input is on noise of the examples' size, (units,) each.

        A unit whose weights have all but died out is small everywhere, and at no kink for that.
        """
        some = rows.perturbed[:_PROBES]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(some.shape, generator=generator, dtype=torch.float64).to(some)
        with self.kinks.observed() as met, torch.no_grad():
            self.model(noise * some.square().mean().sqrt())
        return [u.abs().amax(dim=0) for u in met.before]

    def crowded(self, rows: Rows) -> Tensor:
        """Which rows have more units at a kink than all sides were formed of, (r,)."""
        return (rows.sides[:, :, 0] >= 0).sum(dim=1) > _MOST_KINKS

    def steeper(self, rows: Rows, direction: Tensor) -> Rows:
        """Of each row the sides with the greatest ``⟨∂p/∂W, direction⟩``.

        With a share σ_j of either slope at each kink this number is affine in each σ_j alone, and in
        all of them together where no unit feeds another one. Then the signs of its derivatives tell
        the best sides at once. Of units in several layers all are flipped that should be, or else
        the best one, until none helps: a local maximum.

        Args:
            rows: pieces at kinks.
            direction: of W, flat.

        Returns:
            the rows at those sides.
        """
        found = []
        for _, some in rows.parts(self.batch_size):
            slopes, gains = self._gains(some, direction)
            for _ in range(_FLIPS):
                helps = gains > TIE * gains.abs().amax(dim=1, keepdim=True)
                if not bool(helps.any()):
                    break
                every = _flipped(some, helps)
                steeper, next_gains = self._gains(every, direction)
                best = torch.zeros_like(helps).scatter_(1, gains.argmax(dim=1, keepdim=True), True)
                # As good as one flip at least; and where units feed others maybe not even that.
                worse = steeper < slopes + torch.where(helps, gains, 0.0).amax(dim=1)
                if bool(worse.any()):
                    every = _flipped(some, torch.where(worse.unsqueeze(1), helps & best, helps))
                    steeper, next_gains = self._gains(every, direction)
                some, slopes, gains = every, steeper, next_gains
            found.append(some)
        return Rows.joined(found)

    def _gains(self, rows: Rows, direction: Tensor) -> tuple[Tensor, Tensor]:
        """``h = ⟨∂p/∂W, direction⟩``, (r,), and what flipping each unit at a kink adds to it, (r, k)."""
        sides, fixed = self._masks(rows)
        shares = sides.to(direction).requires_grad_()
        with self.kinks.observed(shares, fixed):
            margins = self._pieces(rows)
        v = torch.ones_like(margins, requires_grad=True)
        gradients = torch.autograd.grad(
            margins, self.parameters, v, create_graph=True, materialize_grads=True
        )
        parts = torch.split(direction, [p.numel() for p in self.parameters])
        along = torch.stack(
            [g.reshape(-1) @ d for g, d in zip(gradients, parts, strict=True)]
        ).sum()
        slopes, by_share = torch.autograd.grad(along, (v, shares))
        units, taken = rows.sides.unbind(dim=2)
        gains = by_share.gather(1, units.clamp(min=0)) * (1 - 2 * taken)
        return slopes, gains.masked_fill(units < 0, 0.0)

    def _signals(self, rows: Rows, kinks: Tensor) -> Tensor:
        """``|∂m_i/∂σ|`` of the units, with those at a kink on one side or on the other, the larger."""
        largest = torch.zeros(kinks.shape, dtype=torch.float64, device=kinks.device)
        for part, some in rows.parts(self.batch_size):
            for side in (torch.zeros_like(kinks[part]), torch.ones_like(kinks[part])):
                with self.kinks.observed(side, kinks[part]) as met:
                    total = self.margins(some).sum()
                found = torch.autograd.grad(total, met.after, materialize_grads=True)
                largest[part] = torch.maximum(largest[part], torch.cat(found, dim=1).abs())
        return largest

    def _masks(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The sides and the units that they are prescribed for, (r, all units) bool."""
        shape = (len(rows), self._units)
        sides = torch.zeros(shape, dtype=torch.bool, device=rows.labels.device)
        fixed = torch.zeros_like(sides)
        row, k = torch.nonzero(rows.sides[:, :, 0] >= 0, as_tuple=True)
        unit, side = rows.sides[row, k].unbind(dim=1)
        sides[row, unit] = side == 1
        fixed[row, unit] = True
        return sides, fixed

    def _perturbations(self, rows: Rows, ties: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Perturbed examples that may attain the margins, (r, …), and the rows they are meant for."""
        everything = torch.ones(len(rows), dtype=torch.bool, device=rows.labels.device)
        if isinstance(self.attack, FiniteSet):
            for delta in self.attack.deltas:
                alone = FiniteSet(delta.unsqueeze(0), p=self.attack.p, bounds=self.attack.bounds)
                yield rows.clean + alone(self.model, rows.clean, rows.labels).delta, everything
        elif ties and self.signs and isinstance(self.attack, FGSM | ExactLinear):
            yield from tied_perturbations(
                self.attack, rows.clean, rows.perturbed, self._input_gradients(rows)
            )
        else:
            yield rows.perturbed, everything

    def _input_gradients(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """``∇_x m`` at the clean examples, (r, …), and its derivative along some direction of W."""
        found, moved = [], []
        generator = torch.Generator().manual_seed(0)
        direction = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p) for p in self.parameters
        ]
        for _, some in rows.parts(self.batch_size):
            z = some.clean.detach().clone().requires_grad_()
            m = margins_of(self.model(z), some.labels)
            (g,) = torch.autograd.grad(m.sum(), z, create_graph=True)
            v = torch.zeros_like(g, requires_grad=True)
            slopes = torch.autograd.grad(
                g, self.parameters, v, create_graph=True, materialize_grads=True
            )
            along = torch.stack([(s * d).sum() for s, d in zip(slopes, direction, strict=True)])
            found.append(g.detach())
            moved.append(torch.autograd.grad(along.sum(), v, materialize_grads=True)[0])
        return torch.cat(found), torch.cat(moved)


def flat(tensors: list[Tensor]) -> Tensor:
    """The tensors as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def _flipped(rows: Rows, flips: Tensor) -> Rows:
    """The rows on the other side of some of their kinks, (r, k) bool."""
    units, taken = rows.sides.unbind(dim=2)
    return replace(rows, sides=torch.stack([units, torch.where(flips, 1 - taken, taken)], dim=2))


def _rivals(outputs: Tensor, y: Tensor) -> Tensor:
    """The greatest other class of each example, −1 where there is one output."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return torch.full_like(y, -1, dtype=torch.int64)
    return outputs.scatter(1, y.unsqueeze(1), -torch.inf).argmax(dim=1)
