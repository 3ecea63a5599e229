"""``mf.gradient_flow`` as users meet it: goals, ends, notes, runs on disk, bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flow_problems import DATA, finite_set
from torch import nn

import marginflow as mf
from marginflow.errors import InputError, ModelError, NotHomogeneousError, RunError
from marginflow.flow import DENSE_LIMIT
from marginflow.runs import RunDirectory

SMALL = "separable:n=6,d=3,margin=0.4,seed=2"
EASY: dict[str, Any] = {"attack": "exact-linear:p=2,eps=0.05", "seed": 1}


def test_goals() -> None:
    by_time = mf.gradient_flow("deep-linear:4", SMALL, log_time=8.0, **EASY)
    by_norm = mf.gradient_flow("deep-linear:4", SMALL, log_norm=by_time.log_norm, **EASY)
    by_loss = mf.gradient_flow(
        "deep-linear:4", SMALL, loss_below=math.exp(by_time.log_loss), **EASY
    )
    assert (by_time.reason, by_norm.reason, by_loss.reason) == (
        "log_time",
        "log_norm",
        "loss_below",
    )
    for flow in (by_time, by_norm, by_loss):
        assert flow.reached
        assert flow.advice == ""
        assert flow.log_time == pytest.approx(8.0, rel=1e-6)
        assert flow.final["log_time"] == flow.log_time
        assert flow.final["log_norm"] == flow.log_norm
        assert flow.final["log_loss"] == pytest.approx(flow.log_loss, rel=1e-14)
        assert flow.final["log_tl"] == pytest.approx(flow.log_time + flow.log_loss, abs=1e-12)
    assert by_time.log_time >= 8.0


def test_the_first_goal_counts_and_a_goal_behind_ends_at_once() -> None:
    flow = mf.gradient_flow("deep-linear:4", SMALL, log_time=1000.0, loss_below=0.01, **EASY)
    assert flow.reason == "loss_below"
    assert flow.log_loss == pytest.approx(math.log(0.01), abs=1e-7)
    at_once = mf.gradient_flow("deep-linear:4", SMALL, log_norm=-5.0, **EASY)
    assert at_once.reason == "log_norm"
    assert at_once.steps == 0
    assert at_once.log_time == -math.inf


def test_points_of_measurement() -> None:
    flow = mf.gradient_flow("deep-linear:4", SMALL, log_time=10.0, **EASY)
    times = [r["log_time"] for r in flow.metrics]
    expected = [-3, -2, -1, 0, 1, *(10 ** (k / 10) for k in range(1, 11))]
    assert times[0] is None
    np.testing.assert_allclose(times[1:], expected, atol=1e-6)
    steps = [r["step"] for r in flow.metrics]
    assert steps == sorted(set(steps))
    assert set(flow.run.trajectory()) == set(steps)
    chosen = mf.gradient_flow("deep-linear:4", SMALL, log_time=9.0, schedule=[5, 2.5], **EASY)
    assert [round(r["log_time"] or -9, 6) for r in chosen.metrics] == [-9, 2.5, 5.0, 9.0]


def test_the_result_stays_in_the_model_and_float32_is_converted_once() -> None:
    model = mf.models.deep_linear(3, 4, 1, seed=0)
    flow = mf.gradient_flow(model, SMALL, log_time=5.0)
    assert flow.model is model
    assert next(model.parameters()).dtype == torch.float64
    assert sum("float32" in note for note in flow.notes) == 1
    data = mf.load(SMALL)
    margins = mf.adversarial_margins(model, data.x, data.y)
    assert margins.normalized_min == pytest.approx(flow.final["normalized_margin"], rel=1e-12)
    already = mf.gradient_flow(mf.models.deep_linear(3, 4, 1, seed=0).double(), SMALL, log_time=5.0)
    assert not any("float32" in note for note in already.notes)


def test_a_flow_that_separates_nothing_is_a_value_with_advice() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    data = mf.Dataset(x, torch.tensor([1, -1, 1]))
    flow = mf.gradient_flow("deep-linear:3", data, log_time=1e4)
    assert flow.reason == "not separated"
    assert not flow.reached
    assert not flow.separated
    assert "not separated after ln t" in flow.advice
    assert "wider" in flow.advice
    assert flow.run.config["ended"] == "not separated"
    assert flow.advice in str(flow)


def test_eps_beyond_the_margin_is_not_separated() -> None:
    flow = mf.gradient_flow("deep-linear:4", SMALL, attack="exact-linear:p=2,eps=0.5", log_time=1e3)
    assert flow.reason == "not separated"
    assert "smaller ε" in flow.advice


def test_too_much_work() -> None:
    flow = mf.gradient_flow("deep-linear:4", SMALL, log_time=1e5, max_evaluations=300, **EASY)
    assert flow.reason == "work"
    assert "max_evaluations" in flow.advice
    assert flow.evaluations < 400


def test_kinks_are_descended_along_the_shortest_combination() -> None:
    """ReLU with an exact adversary: ℓ/ρ never falls, the flow slides, and says so."""
    flow = mf.gradient_flow("mlp:8", SMALL, attack=finite_set(3), log_time=8.0, seed=0)
    assert flow.reason == "log_time"
    assert "gradient jumps" in flow.notes[0]
    assert "steps from the start" in flow.notes[0]
    assert flow.separated_steps > 20
    assert flow.falls == 0
    assert flow.final["falls_by_total"] == 0


def test_where_the_loss_jumps_falls_are_counted() -> None:
    """ReLU + FGSM: Assumption 2 fails, and ℓ/ρ falls on a good share of the steps."""
    flow = mf.gradient_flow("mlp:16", DATA, attack="fgsm:eps=0.05", log_time=20.0, seed=0)
    assert flow.reason == "log_time"
    assert "ln L itself jumps" in flow.notes[0]
    assert flow.sliding
    assert flow.falls > 0.05 * flow.separated_steps
    separated = [r for r in flow.metrics if r["separated_steps"]]
    assert separated[-1]["smoothed_margin"] > separated[0]["smoothed_margin"], "net growth"


def test_a_stiff_flow_that_stalls_hands_over_and_takes_back() -> None:
    """Squared ReLU + FGM, total: kinks early on, smooth later."""
    flow = mf.gradient_flow(
        "mlp:16,activation=squared-relu",
        "separable:n=20,d=10,margin=0.22,seed=0",
        attack="fgm:eps=0.05",
        log_time=20.0,
        seed=0,
    )
    methods = [note.split()[0] for note in flow.notes]
    assert methods == ["stiff", "steps", "stiff"]
    assert "stalled" in flow.notes[1]
    assert flow.sliding
    assert flow.falls == 0
    assert flow.final["method"] == "stiff"


def test_many_weights_go_by_an_explicit_integrator() -> None:
    width = DENSE_LIMIT // 4 + 1  # a Jacobian of a rank half as large as N, still too many numbers
    flow = mf.gradient_flow(f"deep-linear:{width}", SMALL, log_time=6.0)
    assert flow.notes[0].startswith("runge-kutta from the start")
    assert "too many for a dense Jacobian" in flow.notes[0]
    assert flow.jacobians == 0
    asked = mf.gradient_flow("deep-linear:4", SMALL, log_time=6.0, method="steps")
    assert "as asked" in asked.notes[0]
    stiff = mf.gradient_flow("deep-linear:4", SMALL, log_time=6.0)
    assert asked.final["norm_product"] == pytest.approx(stiff.final["norm_product"], rel=1e-3)


def test_a_jacobian_of_low_rank_is_formed_for_more_weights() -> None:
    data = "separable:n=20,d=60,margin=0.3,seed=1"
    options: dict[str, Any] = {"log_time": 8.0, "schedule": [8.0], "seed": 0}
    flow = mf.gradient_flow("deep-linear:60", data, **options)
    assert flow.notes == ("stiff from the start: no jump was found, 3660 weights",)
    assert flow.jacobians > 10
    explicit = mf.gradient_flow("deep-linear:60", data, method="runge-kutta", rtol=1e-7, **options)
    assert flow.final["norm_product"] == pytest.approx(explicit.final["norm_product"], rel=1e-5)
    assert flow.log_norm == pytest.approx(explicit.log_norm, rel=1e-5)


def test_resuming_gives_the_bits_of_an_uninterrupted_flow(tmp_path: Path) -> None:
    for name, spec, attack, far in [
        ("stiff", "deep-linear:4", "exact-linear:p=2,eps=0.05", 12.0),
        ("steps", "mlp:8", "fgsm:eps=0.05", 5.0),
    ]:
        whole, cut = tmp_path / f"{name}-whole", tmp_path / f"{name}-cut"
        options: dict[str, Any] = {"attack": attack, "seed": 2}
        full = mf.gradient_flow(spec, SMALL, log_time=far, out=whole, **options)
        mf.gradient_flow(spec, SMALL, log_time=10 ** (5 / 10), out=cut, **options)
        resumed = mf.gradient_flow(spec, SMALL, log_time=far, out=cut, resume=True, **options)
        assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
        for a, b in zip(full.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert mf.load_run(cut).config["log_time"] == far
        again = mf.gradient_flow(spec, SMALL, log_time=far, out=cut, resume=True, **options)
        assert again.steps == full.steps
        assert again.factorizations == full.factorizations
        assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


def test_an_interrupted_flow_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from marginflow.workflow import _flow, _flow_job

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    mf.gradient_flow("deep-linear:4", SMALL, log_time=8.0, out=whole, **EASY)
    event = threading.Event()

    class Interrupt:
        def __enter__(self) -> threading.Event:
            return event

        def __exit__(self, *_: object) -> None:
            return None

    count = 0
    measure = _flow_job.Job._measure

    def measure_and_interrupt(job: Any) -> None:
        nonlocal count
        measure(job)
        count += 1
        if count == 9:
            event.set()

    with monkeypatch.context() as patch:
        patch.setattr(_flow, "deferred_interrupt", Interrupt)
        patch.setattr(_flow_job.Job, "_measure", measure_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            mf.gradient_flow("deep-linear:4", SMALL, log_time=8.0, out=cut, **EASY)
    assert len(mf.load_run(cut).metrics) == 9
    mf.gradient_flow("deep-linear:4", SMALL, log_time=8.0, out=cut, resume=True, **EASY)
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


def test_a_run_on_disk(tmp_path: Path) -> None:
    flow = mf.gradient_flow("deep-linear:4", SMALL, log_time=10.0, out=tmp_path / "run", **EASY)
    run = mf.load_run(tmp_path / "run")
    assert run.config["kind"] == "flow"
    assert run.config["ended"] == "log_time"
    assert run.config["dtype"] == "float64"
    assert run.metrics == flow.metrics
    assert json.loads((tmp_path / "run" / "run.json").read_text())["layers"]
    model = run.load_model()
    for a, b in zip(model.parameters(), flow.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert RunDirectory(tmp_path / "run").latest_checkpoint() is not None


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.dropout(x, 0.5))


def _net(between: nn.Module, bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), between, nn.Linear(4, 1, bias=bias))


def _zero() -> nn.Module:
    model = mf.models.deep_linear(3, 4, 1, seed=0)
    with torch.no_grad():
        next(model.parameters()).zero_()
    return model


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": _net(nn.ReLU(), bias=True)}, NotHomogeneousError, "bias"),
    ({"model": _net(nn.Tanh())}, NotHomogeneousError, "Tanh"),
    ({"model": Noisy()}, ModelError, "random"),
    ({"model": _net(nn.Dropout())}, ModelError, "random"),
    ({"model": _zero()}, ModelError, "is 0"),
    ({"attack": "fgm:eps=0.05,objective=loss"}, InputError, "scale invariant"),
    ({"log_time": math.nan}, InputError, "log_time"),
    ({"loss_below": 0.0}, InputError, "loss_below"),
    ({"loss_below": 2.0}, InputError, "loss_below"),
    ({"rtol": 0.5}, InputError, "rtol"),
    ({"rtol": -1.0}, InputError, "rtol"),
    ({"method": "euler"}, InputError, "method"),
    ({"derivative": "partial"}, InputError, "derivative"),
    ({"loss": "hinge"}, InputError, "loss"),
    ({"max_evaluations": 0}, InputError, "max_evaluations"),
    ({"seed": -1}, InputError, "seed"),
    ({"resume": True}, InputError, "out"),
    ({"schedule": ["a"]}, InputError, "schedule"),
    ({"model": "deep-linear:4000", "method": "stiff"}, InputError, "Jacobian"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "word"), BAD)
def test_bad_input(
    change: dict[str, Any], error: type[Exception], word: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": "deep-linear:4", "data": SMALL, "log_time": 5.0} | change
    if not options.get("resume"):
        options["out"] = tmp_path / "run"
    with pytest.raises(error, match=word):
        mf.gradient_flow(options.pop("model"), options.pop("data"), **options)
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_resuming_under_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    mf.gradient_flow("deep-linear:4", SMALL, log_time=5.0, out=out, **EASY)
    with pytest.raises(RunError, match="already holds a run"):
        mf.gradient_flow("deep-linear:4", SMALL, log_time=5.0, out=out, **EASY)
    with pytest.raises(RunError, match="derivative"):
        mf.gradient_flow(
            "deep-linear:4",
            SMALL,
            log_time=9.0,
            derivative="detached",
            out=out,
            resume=True,
            **EASY,
        )
    mf.train("deep-linear:4", SMALL, epochs=1, out=tmp_path / "training")
    with pytest.raises(RunError, match="not a flow"):
        mf.gradient_flow("deep-linear:4", SMALL, out=tmp_path / "training", resume=True)


def test_several_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.eye(3, dtype=torch.float64)
    x = torch.cat(
        [c + 0.2 * torch.randn(5, 3, generator=generator, dtype=torch.float64) for c in centers]
    )
    data = mf.Dataset(x, torch.arange(3).repeat_interleave(5))
    flow = mf.gradient_flow("deep-linear:5", data, attack="fgm:eps=0.1", log_time=20.0)
    assert flow.run.config["loss"] == "cross-entropy"
    assert flow.reason == "log_time"
    assert flow.final["adversarial_accuracy"] == 1
    assert flow.final["margin"] / flow.log_time == pytest.approx(1, abs=0.25)


def test_linear_algebra_keeps_to_one_thread() -> None:
    """Scipy's, too, which is imported during the flow: its threads and torch's are in each other's way."""
    code = (
        "import threadpoolctl, marginflow as mf\n"
        "from marginflow.flow import Field\n"
        "seen, jacobian = set(), Field.jacobian\n"
        "def spy(self, w):\n"
        "    libraries = threadpoolctl.threadpool_info()\n"
        "    seen.update(b['num_threads'] for b in libraries if b['user_api'] == 'blas')\n"
        "    return jacobian(self, w)\n"
        "Field.jacobian = spy\n"
        "mf.gradient_flow('deep-linear:2', 'separable:n=4,d=2', log_time=0.5)\n"
        "print(seen)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    )
    assert done.stdout.strip() == "{1}"
