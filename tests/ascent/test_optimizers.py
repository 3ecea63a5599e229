"""One contract for torch's optimisers and ours; then what is ours alone.

The cases follow torch's own suite (test/test_optim.py, torch.testing._internal.common_optimizers).
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from marginflow.ascent import RelativeSGD, SphereSGD
from marginflow.errors import InputError, ModelError

Make = Callable[..., Optimizer]


def told(params: Any, **options: Any) -> RelativeSGD:
    """RelativeSGD that weighs batches: it has a state then."""
    return RelativeSGD(params, **options)


FAMILY: dict[str, Make] = {
    "torch.SGD": lambda params, **o: torch.optim.SGD(params, **{"momentum": 0.9} | o),
    "torch.Adam": torch.optim.Adam,
    "SphereSGD": SphereSGD,
    "RelativeSGD": told,
}
OURS = ["SphereSGD", "RelativeSGD"]


@pytest.fixture(params=FAMILY)
def make(request: pytest.FixtureRequest) -> Make:
    return FAMILY[request.param]


@pytest.fixture(params=OURS)
def ours(request: pytest.FixtureRequest) -> Make:
    return FAMILY[request.param]


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 1, bias=False))
    return model.to(dtype)


X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.where(X[:, 0] + 0.3 * X[:, 1] > 0, 1.0, -1.0)


def closure_of(model: nn.Module, optimizer: Optimizer, step: int = 0) -> Callable[[], Tensor]:
    rows = slice(8 * (step % 3), 8 * (step % 3) + 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = X[rows].to(next(model.parameters()).dtype)
        loss = nn.functional.softplus(-Y[rows] * model(x).squeeze(1)).mean()
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.step(closure_of(model, optimizer, step))
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("carry", [copy.deepcopy, through_disk], ids=["memory", "disk"])
def test_a_restored_training_repeats_the_bits(make: Make, carry: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    train(model, optimizer, range(7))
    saved = carry(optimizer.state_dict())
    again = network(seed=9)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    restored = make(again.parameters(), lr=0.7)
    restored.load_state_dict(saved)
    assert same(train(model, optimizer, range(7, 20)), train(again, restored, range(7, 20)))
    assert restored.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(make: Make, carry: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    train(model, optimizer, range(4))
    twin, twin_optimizer = carry((model, optimizer))
    assert same(train(model, optimizer, range(4, 9)), train(twin, twin_optimizer, range(4, 9)))


def test_a_training_is_deterministic(make: Make) -> None:
    runs = []
    for _ in range(2):
        model = network()
        runs.append(train(model, make(model.parameters(), lr=0.05), range(10)))
    assert same(*runs)


def test_it_learns(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    before = closure_of(model, optimizer)().item()
    train(model, optimizer, range(60))
    # On the spheres the norms stay, and with them most of the loss.
    assert closure_of(model, optimizer)().item() < 0.9 * before


def test_groups_have_their_own_rate(make: Make) -> None:
    model = network()
    first, last = model.parameters()
    optimizer = make([{"params": [first], "lr": 0.0}, {"params": last}], lr=0.05)
    before = weights(model)
    after = train(model, optimizer, range(3))
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=0)
    assert not torch.allclose(after[1], before[1], rtol=1e-3)


def test_a_group_can_be_added(make: Make) -> None:
    model = network()
    first, last = model.parameters()
    optimizer = make([first], lr=0.05)
    before = weights(model)
    assert torch.equal(train(model, optimizer, range(2))[1], before[1])
    optimizer.add_param_group({"params": [last], "lr": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    assert not torch.equal(train(model, optimizer, range(2))[1], before[1])
    assert len(through_disk(optimizer.state_dict())["param_groups"]) == 2


def test_named_parameters(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters(), lr=0.05)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    plain = network()
    bare = make(plain.parameters(), lr=0.05)
    assert same(train(model, optimizer, range(3)), train(plain, bare, range(3)))


def test_zero_grad(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    closure_of(model, optimizer)()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = weights(model)
    optimizer.step()
    assert same(weights(model), before)


def test_a_gradient_of_zero_is_no_error(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = weights(model)
    optimizer.step()
    for now, then in zip(weights(model), before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-6, atol=0)


def test_the_closure_is_called_once_with_gradients_enabled(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    inner, calls = closure_of(model, optimizer), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return inner()

    with torch.no_grad():
        value = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    expected = nn.functional.softplus(-Y[:8] * network()(X[:8]).squeeze(1)).mean()
    assert torch.equal(torch.as_tensor(value), expected)
    assert optimizer.step() is None


def test_gradients_are_left_as_they_are(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    closure_of(model, optimizer)()
    before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    assert same([p.grad for p in model.parameters()], before)  # type: ignore[misc]


def test_parameters_without_a_gradient_stay(make: Make) -> None:
    model = network()
    first, _ = model.parameters()
    first.requires_grad_(False)
    optimizer = make(model.parameters(), lr=0.05)
    before = weights(model)
    after = train(model, optimizer, range(3))
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [3]
        ),
    ],
    ids=["cosine", "exponential", "lambda", "sequential"],
)
def test_schedulers(make: Make, schedule: Callable[[Optimizer], Any]) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    ours, theirs = schedule(optimizer), schedule(reference)
    rates = []
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        reference.step()
        ours.step()
        theirs.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[-1] == reference.param_groups[0]["lr"]
    assert len(set(rates)) == 6


def test_a_rate_of_zero_keeps_the_weights(make: Make) -> None:
    model = network()
    before = weights(model)
    after = train(model, make(model.parameters(), lr=0.0), range(3))
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_hooks_around_a_step(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    seen: list[str] = []
    pre = optimizer.register_step_pre_hook(lambda o, a, k: seen.append("before"))
    post = optimizer.register_step_post_hook(lambda o, a, k: seen.append("after"))
    train(model, optimizer, range(1))
    pre.remove()
    post.remove()
    train(model, optimizer, range(1))
    assert seen == ["before", "after"]


def test_hooks_of_the_state(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    train(model, optimizer, range(1))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


def test_loaded_state_takes_the_dtype_of_the_parameters(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    wide = network(dtype=torch.float64)
    restored = make(wide.parameters(), lr=0.05)
    restored.load_state_dict(optimizer.state_dict())
    for parameter in wide.parameters():
        kept = [v for k, v in restored.state[parameter].items() if k != "step"]
        tensors = [v for v in kept if isinstance(v, Tensor)]
        assert all((t.dtype, t.device) == (torch.float64, parameter.device) for t in tensors)
    train(wide, restored, range(3, 6))


def test_the_state_of_other_groups_is_refused(make: Make) -> None:
    first, last = network().parameters()
    saved = make([first, last], lr=0.05).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make([{"params": [first]}, {"params": [last]}], lr=0.05).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size"):
        make([first], lr=0.05).load_state_dict(saved)


def test_parameters_that_are_not_contiguous(make: Make) -> None:
    results = []
    for arrange in (lambda t: t, lambda t: t.t().contiguous().t()):
        model = network()
        for module in (model[0], model[2]):
            module.weight = nn.Parameter(arrange(module.weight.detach()))
        results.append(train(model, make(model.parameters(), lr=0.05), range(5)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_after_clipping_gradients(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    before = weights(model)
    closure_of(model, optimizer)()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert all(bool(torch.isfinite(w).all()) for w in weights(model))
    assert not same(weights(model), before)


def test_the_repr_names_the_options(make: Make) -> None:
    assert "lr: 0.05" in repr(make(network().parameters(), lr=0.05))


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.zeros(2, requires_grad=True), TypeError, "iterable of Tensors or dicts"),
        ([{"params": {torch.zeros(2)}}], TypeError, "ordered collections"),
        ([3], TypeError, "only optimize Tensors"),
        ([torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    ],
    ids=["none", "tensor", "set", "number", "non-leaf"],
)
def test_refused_parameters(make: Make, params: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(params, lr=0.05)


def test_duplicate_parameters(make: Make) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make([p, p], lr=0.05)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p]}, {"params": [p]}], lr=0.05)


def test_a_negative_rate(make: Make) -> None:
    with pytest.raises(ValueError, match=r"learning rate|lr: expected"):
        make(network().parameters(), lr=-0.1)


# What is ours alone.


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, True])
def test_a_rate_that_is_no_number(ours: Make, value: object) -> None:
    with pytest.raises(InputError, match="lr: expected"):
        ours(network().parameters(), lr=value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, "momentum: expected a number below 1"),
        ({"momentum": -0.1}, "momentum: expected a number of at least 0"),
        ({"layer": 1}, "layer: expected True or False"),
        ({"layer": True, "free": True}, "got both"),
    ],
)
def test_options_of_the_spheres(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SphereSGD(network().parameters(), **options)
    optimizer = SphereSGD([next(network().parameters())])
    with pytest.raises(InputError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "ln"}, "unknown loss 'ln'"),
        ({"beta": 1.0}, "beta: expected a number below 1"),
        ({"cap": 0.5}, "cap: expected a number of at least 1"),
    ],
)
def test_options_of_the_relative_steps(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        RelativeSGD(network().parameters(), **options)


def test_unknown_and_differing_options_of_a_group(ours: Make) -> None:
    first, last = network().parameters()
    with pytest.raises(InputError, match="unknown option 'weight_decay'"):
        ours([{"params": [first], "weight_decay": 0.1}])
    with pytest.raises(InputError, match="there is one loss"):
        RelativeSGD([{"params": [first]}, {"params": [last], "beta": 0.5}])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float16])
def test_other_dtypes(ours: Make, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="expected parameters of float32 or float64"):
        ours([nn.Parameter(torch.ones(3, dtype=dtype))])


def test_sparse_gradients(ours: Make) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = ours(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="expected a dense gradient"):
        optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(ours: Make, value: float) -> None:
    model = network()
    optimizer = ours(model.parameters())
    closure_of(model, optimizer)()
    model[2].weight.grad[0, 2] = value
    before = weights(model)
    with pytest.raises(InputError, match="not finite"):
        optimizer.step()
    assert same(weights(model), before)


def test_a_zero_layer_is_named() -> None:
    model = network()
    optimizer = SphereSGD(model.named_parameters())
    closure_of(model, optimizer)()
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.raises(ModelError, match=r"layer '2\.weight' is 0"):
        optimizer.step()


def test_the_spheres_keep_the_norms_and_need_no_scale() -> None:
    """The same turns for L and ln L, and for a network whose layers are scaled by powers of two."""
    results = []
    for factor, of_log in ((1.0, False), (1.0, True), (4.0, False)):
        model = network(dtype=torch.float64)
        with torch.no_grad():
            model[0].weight *= factor
            model[2].weight /= factor
        optimizer = SphereSGD(model.parameters(), lr=0.05)
        norms = [float(w.norm()) for w in weights(model)]
        for step in range(20):
            optimizer.zero_grad()
            rows = slice(8 * (step % 3), 8 * (step % 3) + 8)
            loss = nn.functional.softplus(-Y[rows] * model(X[rows].double()).squeeze(1)).mean()
            (loss.log() if of_log else loss).backward()
            optimizer.step()
        assert [float(w.norm()) for w in weights(model)] == pytest.approx(norms, rel=1e-14)
        results.append([weights(model)[0] / factor, weights(model)[1] * factor])
    for a, b in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert same(results[0], results[2])


def test_a_layer_of_weight_and_bias() -> None:
    """layer=True: the norm of both together stays, that of each does not."""
    layer = nn.Linear(6, 1).double()
    optimizer = SphereSGD([{"params": layer.parameters(), "layer": True}], lr=0.1)
    together = torch.cat([layer.weight.detach().ravel(), layer.bias.detach()]).norm()
    alone = float(layer.weight.detach().norm())
    train(layer, optimizer, range(5))
    now = torch.cat([layer.weight.detach().ravel(), layer.bias.detach()]).norm()
    assert float(now) == pytest.approx(float(together), rel=1e-14)
    assert abs(float(layer.weight.detach().norm()) / alone - 1) > 1e-4


def test_free_parameters_take_normalised_steps() -> None:
    """v ← μv + G/‖G‖, W ← W − lr·v, over all free parameters; a bias that starts at 0 moves too."""
    layer = nn.Linear(6, 1).double()
    nn.init.zeros_(layer.bias)
    other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SphereSGD(
        [{"params": [layer.weight]}, {"params": [layer.bias, other], "free": True}], lr=0.1
    )
    velocity, place = np.zeros(3), np.zeros(3)
    for step in range(4):
        closure_of(layer, optimizer, step)()
        other.grad = torch.tensor([1e-30 * step, 2.0], dtype=torch.float64)
        gradient = np.array([float(layer.bias.grad), *other.grad.tolist()])  # type: ignore[arg-type]
        velocity = 0.9 * velocity + gradient / np.linalg.norm(gradient)
        place = place - 0.1 * velocity
        optimizer.step()
    moved = [float(layer.bias.detach()), *other.detach().tolist()]
    np.testing.assert_allclose(moved, place, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["plain", "log"])
def test_telling_the_loss_takes_the_bias_out(loss: str) -> None:
    """Batches (1, 0) and (0, 3) with loss e^{−⟨w, x⟩}: the max-margin direction is (3, 1)/√10."""
    points = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    lost = []
    for tell in (True, False):
        w = nn.Parameter(torch.tensor([0.5, 0.45], dtype=torch.float64))
        optimizer = RelativeSGD([w], lr=0.02, loss=loss)  # type: ignore[arg-type]
        decay = lr_scheduler.ExponentialLR(optimizer, (1 / 40) ** (1 / 600))
        for step in range(600):
            optimizer.zero_grad()
            value = -(points[step % 2] @ w)
            value = value if loss == "log" else value.exp()
            value.backward()
            optimizer.step(loss=value if tell else None)
            decay.step()
        best = 3 / math.sqrt(10)
        lost.append(best - float((points @ w.detach()).min() / w.detach().norm()))
    assert abs(lost[0]) < 0.05
    assert lost[1] > 0.2


def test_a_plain_loss_of_zero() -> None:
    model = network()
    optimizer = RelativeSGD(model.parameters())
    closure_of(model, optimizer)()
    with pytest.raises(InputError, match="expected a loss above 0, got 0"):
        optimizer.step(loss=0.0)
    with pytest.raises(InputError, match="expected the finite ln of a loss"):
        optimizer.step(loss=math.inf)
