"""What the runs say, in one sentence with its numbers, and what has to be said beside it.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Sequence

from marginflow.monitor import overfitting_of
from marginflow.report._clock import (
    FLOW_DIGITS,
    at_start,
    is_ascent,
    is_flow,
    is_monitored,
    log_time_of,
    method_name,
    time_words,
)
from marginflow.report._flow_words import flow_caveats, followed, mixed_caveats, reached_goal
from marginflow.report._text import (
    attack_words,
    check_runs,
    epoch_of,
    format_count,
    format_margin,
    format_number,
    format_percent,
    margin_exponent,
    number,
    run_names,
    times_power_of_ten,
)
from marginflow.runs import Run


def statement(runs: Sequence[Run]) -> str:
    """One plain sentence with the final numbers of one run, or of several beside each other.

    Runs that were measured under different perturbations or on different data are told
    of one by one, and the sentence says that they do not compare.

    Args:
        runs: one run, or those that are compared.

    Raises:
        InputError: no runs.
        RunError: a run without measurements.
    """
    check_runs(runs)
    if len(runs) == 1:
        return _single_flow(runs[0]) if is_flow(runs[0]) else _single(runs[0])
    obstacle = _obstacle(runs)
    if obstacle:
        return _apart(runs, obstacle)
    if _is_adversarial_against_standard(runs):
        return _adversarial_against_standard(runs)
    return _ranked(runs)


def question(runs: Sequence[Run]) -> str:
    """The question that :func:`statement` answers."""
    if len(runs) == 1:
        kind = "smallest" if not_normalized(runs[0]) else "normalised"
        if unperturbed(runs[0]):
            return f"How large is the {kind} margin at the end, and how many examples are right?"
        return (
            f"How large is the {kind} margin under {measured_words(runs[0])} at the end, and "
            "how many perturbed examples are still right?"
        )
    if _obstacle(runs):
        return "What did each of these runs reach?"
    if _is_adversarial_against_standard(runs):
        return (
            "Does adversarial training end with a larger normalised margin than standard training?"
        )
    return "Which of these runs ends with the largest normalised margin?"


def default_title(runs: Sequence[Run]) -> str:
    """``fgsm: training against FGSM, ε = 0.1``, or the names of the runs that are compared."""
    names = run_names(runs)
    if len(runs) == 1:
        return f"{names[0]}: {training_words(runs[0])}"
    if len(runs) > 3:
        return f"{len(runs)} runs compared"
    return f"{', '.join(names[:-1])} and {names[-1]} compared"


def setting(runs: Sequence[Run]) -> str:
    """``n = 286, seed 0``, once for all runs where it is the same, else run by run.

    Runs that differ in nothing but their seeds are told as ``n = 286, seeds 0, 1, 2``.

    Where there is a flow, the precision is said too: ``n = 8, seed 0, float64``.
    """
    each = [
        f"n = {_examples(run)}"
        # Of a loop that is monitored nothing is known but what it says.
        + (
            ""
            if is_monitored(run) and run.config.get("seed") is None
            else f", seed {_known(run, 'seed')}"
        )
        for run in runs
    ]
    if any(map(is_flow, runs)):
        each = [f"{text}, {_known(run, 'dtype')}" for text, run in zip(each, runs, strict=True)]
    if len(set(each)) == 1:
        return each[0]
    seeds = sorted({_known(run, "seed") for run in runs}, key=lambda seed: (len(seed), seed))
    same = {
        text.replace(f"seed {_known(run, 'seed')}", "")
        for text, run in zip(each, runs, strict=True)
    }
    if len(same) == 1 and all(seed.isdigit() for seed in seeds):
        return each[0].replace(f"seed {_known(runs[0], 'seed')}", f"seeds {', '.join(seeds)}")
    return "; ".join(f"{name}: {text}" for name, text in zip(run_names(runs), each, strict=True))


def caveats(runs: Sequence[Run]) -> tuple[str, ...]:
    """What a reader has to know before comparing, or believing, the numbers; often nothing."""
    names = run_names(runs)
    notes = []
    if len({measured_words(run) for run in runs}) > 1:
        listed = _listed((name, measured_words(run)) for name, run in zip(names, runs, strict=True))
        notes.append(
            f"The runs are measured under different perturbations ({listed}): their margins, "
            "adversarial accuracies and losses do not compare."
        )
    if len({_data_key(run) for run in runs}) > 1:
        listed = _listed((name, _known(run, "data")) for name, run in zip(names, runs, strict=True))
        notes.append(f"The runs are trained and measured on different data ({listed}).")
    if len({str(run.config.get("model") or _known(run, "model_spec")) for run in runs}) > 1:
        listed = _listed(
            (name, _known(run, "model_spec")) for name, run in zip(names, runs, strict=True)
        )
        notes.append(
            f"The networks differ ({listed}): normalised margins compare within one architecture."
        )
    if len({_known(run, "loss") for run in runs}) > 1:
        listed = _listed((name, _known(run, "loss")) for name, run in zip(names, runs, strict=True))
        notes.append(f"The losses differ ({listed}): ln L compares within one loss.")
    lengths = [_epochs(run) for run in runs]
    if len(set(lengths)) > 1 and not any(map(is_flow, runs)):
        listed = _listed(zip(names, lengths, strict=True))
        notes.append(
            f"The runs end after different times ({listed}), and margins change with time: the figures "
            "compare them at the same epoch."
        )
    if len(runs) > 1 and any(map(is_flow, runs)):
        notes += mixed_caveats(names, runs)
    for name, run in zip(names, runs, strict=True):
        notes += _own_caveats(name, run)
    return tuple(notes)


def remarks(runs: Sequence[Run]) -> tuple[str, ...]:
    """How the flows among the runs were followed; nothing for training runs."""
    return tuple(
        f"{name}: {followed(run)}"
        for name, run in zip(run_names(runs), runs, strict=True)
        if is_flow(run)
    )


def is_standard(run: Run) -> bool:
    """Whether the run trained on unperturbed examples."""
    return run.config.get("attack") in (None, "none")


def training_words(run: Run) -> str:
    """``training against FGSM, ε = 0.1`` or ``standard training``, or the same of a flow or an ascent."""
    if is_flow(run):
        against = "without perturbation" if is_standard(run) else _named(run.config["attack"])
        return f"gradient flow {'' if is_standard(run) else 'against '}{against}"
    if is_ascent(run):
        goal = (
            "clean margins" if is_standard(run) else f"margins under {_named(run.config['attack'])}"
        )
        return f"maximising {goal} ({method_name(run)})"
    if is_monitored(run) and not declares_attack(run):
        return "a training loop of its own"
    if is_standard(run):
        return "standard training"
    return f"training against {_named(run.config.get('attack'))}"


def declares_attack(run: Run) -> bool:
    """Whether it is known what the run trained against."""
    return not is_monitored(run) or "attack" in (run.config.get("declared") or ())


def unperturbed(run: Run) -> bool:
    """Whether the margins of the run are those of unperturbed examples."""
    return run.config.get("measure_with") in (None, "none")


def measured_words(run: Run) -> str:
    """The perturbation of the measured margins, in words."""
    return "no perturbation" if unperturbed(run) else _named(run.config["measure_with"])


def _named(spec: object) -> str:
    """An attack within a sentence, where an adversary needs its article."""
    words = attack_words(spec)
    return f"the {words}" if words.startswith("exact ") else words


def _own_caveats(name: str, run: Run) -> list[str]:
    notes = flow_caveats(name, run) if is_flow(run) else []
    planned, reached = number(run.config, "epochs"), number(run.final, "epoch")
    if planned is not None and reached is not None and reached < planned:
        notes.append(
            f"{name} is not finished: {format_count(reached)} of {format_count(planned)} epochs."
        )
    best, converged = number(run.final, "best_epoch"), run.final.get("converged")
    if best is not None and best != reached:
        notes.append(
            f"{name} ends with the best weights that were measured, those after epoch "
            f"{format_count(best)}: its last measurement is theirs."
        )
    if reason := run.config.get("left_out"):
        notes.append(
            f"{name}: {reason}. Its margins are shown as they are: they grow with the weights, and do not "
            "compare with those of another network."
        )
    if alarm := overfitting_of(run.metrics):
        notes.append(
            f"{name} overfitted catastrophically to its one-step attack, as a sample of the examples "
            f"shows, at {alarm}."
        )
    if converged is False:
        notes.append(f"{name} ended before its duality gap was reached.")
    if dead := number(run.final, "dead_inputs"):
        notes.append(
            f"{name}: the gradient vanishes at {format_count(dead)} training examples, which the "
            "attack therefore leaves as they are."
        )
    if "objective=loss" in str(run.config.get("measure_with")):
        notes.append(
            f"{name} is measured by an attack on the loss, not on the margin: it is not scale "
            "invariant and grows weaker as the margins grow."
        )
    return notes


def _single(run: Run) -> str:
    margin = _margin(run, margin_exponent([number(run.final, "normalized_margin")]))
    kind = (
        "smallest margin, not normalised," if not_normalized(run) else "smallest normalised margin"
    )
    training = training_words(run)
    under = (
        "of the unperturbed training examples"
        if unperturbed(run)
        else "under that attack"
        if run.config.get("measure_with") == run.config.get("attack")
        else f"under {measured_words(run)}"
    )
    return (
        f"{training[0].upper()}{training[1:]} for {_epochs(run)} on {_known(run, 'data')} "
        f"({setting([run])}) ends with {margin} (the {kind} {under}) "
        f"and {_accuracies(run)} classified correctly."
    )


def _single_flow(run: Run) -> str:
    final = run.final
    exponent = margin_exponent([number(final, "normalized_margin")])
    under = "of the unperturbed training examples" if unperturbed(run) else "under that attack"
    smoothed = number(final, "smoothed_margin")
    if smoothed is not None and smoothed > 0:
        under += f"; ℓ/ρ = {_with_unit(smoothed, exponent, FLOW_DIGITS)}"
    where = "at its start, t = 0," if at_start(final) else f"followed to {time_words(final)}"
    ended = run.config.get("ended")
    verb = "stopped before its goal, with"
    if reached_goal(run):
        verb = "ends with"
    elif ended is None:
        verb = "is not finished; so far it has"
    elif ended == "not separated":
        verb = "ended without separating the data, with"
    return (
        f"The {training_words(run)}, {where} on {_known(run, 'data')} ({setting([run])}), {verb} "
        f"{_margin(run, exponent, FLOW_DIGITS)} (the smallest normalised margin {under}) and "
        f"{_accuracies(run)} classified correctly."
    )


def _is_adversarial_against_standard(runs: Sequence[Run]) -> bool:
    return (
        len(runs) == 2
        and [is_standard(run) for run in runs].count(True) == 1
        and not any(is_flow(run) or is_ascent(run) for run in runs)
    )


def _adversarial_against_standard(runs: Sequence[Run]) -> str:
    names = run_names(runs)
    first = 0 if is_standard(runs[1]) else 1
    adversarial, standard = runs[first], runs[1 - first]
    values = [number(run.final, "normalized_margin") for run in (adversarial, standard)]
    exponent = margin_exponent(values)
    a, s = values
    if a is None or s is None:
        verdict = "cannot be compared in its normalised margin with"
    elif a == s:
        verdict = "ends with the same normalised margin as"
    else:
        verdict = f"ends with a {'larger' if a > s else 'smaller'} normalised margin than"
    return (
        f"Measured under {measured_words(adversarial)}, adversarial training ({names[first]}) "
        f"{verdict} standard training ({names[1 - first]}): {_margin(adversarial, exponent)} against "
        f"{_margin(standard, exponent)}, with {_accuracies(adversarial, standard)} classified "
        f"correctly, {_durations(adversarial, standard)} on {_known(adversarial, 'data')} "
        f"({setting(runs)})."
    )


def _ranked(runs: Sequence[Run]) -> str:
    names = run_names(runs)
    values = [number(run.final, "normalized_margin") for run in runs]
    exponent = margin_exponent(values)
    order = [k for k, value in enumerate(values) if value is not None]
    order.sort(key=lambda k: -(values[k] or 0.0))
    where = f"on {_known(runs[0], 'data')} ({setting(runs)})"
    under = f"Measured under {measured_words(runs[0])} {where}"
    if len(order) < 2:
        return f"{under}, fewer than two of these {len(runs)} runs have a finite γ̂_m."
    timed = any(map(is_flow, runs))
    digits = FLOW_DIGITS if timed else 3
    best, worst = order[0], order[-1]
    largest, least = (_margin(runs[k], exponent, digits) for k in (best, worst))
    if values[best] == values[worst]:
        return f"{under}, all {len(order)} runs end with the same normalised margin, {largest}."
    if timed and largest == least:
        shared = f"the same normalised margin to {digits} digits, {largest}"
        return f"{under}, all {len(order)} runs end with {shared}."
    return (
        f"{under}, {names[best]} ends with the largest normalised margin of {len(order)} runs, "
        f"{largest} {_end(runs[best], timed)} with {_accuracies(runs[best])} classified correctly, "
        f"and {names[worst]} with the smallest, {least} {_end(runs[worst], timed)} with "
        f"{_accuracies(runs[worst])}."
    )


def _apart(runs: Sequence[Run], obstacle: str) -> str:
    timed = any(map(is_flow, runs))
    digits = FLOW_DIGITS if timed else 3
    exponent = margin_exponent([number(run.final, "normalized_margin") for run in runs])
    each = "; ".join(
        f"{name} ends with {_margin(run, exponent, digits)} under {measured_words(run)} on "
        f"{_known(run, 'data')} ({setting([run])}) {_end(run, timed)}, with {_accuracies(run)} "
        "classified correctly"
        for name, run in zip(run_names(runs), runs, strict=True)
    )
    return f"These runs are measured {obstacle}, so their margins do not compare: {each}."


def _obstacle(runs: Sequence[Run]) -> str:
    """Why the margins of the runs do not compare; empty if they do."""
    obstacles = []
    if len({measured_words(run) for run in runs}) > 1:
        obstacles.append("under different perturbations")
    if len({_data_key(run) for run in runs}) > 1:
        obstacles.append("on different data")
    return " and ".join(obstacles)


def _data_key(run: Run) -> str:
    """The data's hash; its name where the hash is not recorded."""
    return str(run.config.get("data_sha256") or run.config.get("data"))


def _margin(run: Run, exponent: int, digits: int = 3) -> str:
    value = number(run.final, "normalized_margin")
    if not_normalized(run):
        return f"min m = {format_number(number(run.final, 'margin'))}"
    return "no finite γ̂_m" if value is None else f"γ̂_m = {_with_unit(value, exponent, digits)}"


def not_normalized(run: Run) -> bool:
    """Whether the network has no normalised margins, so that they were not measured."""
    return bool(run.config.get("left_out"))


def _with_unit(value: float, exponent: int, digits: int) -> str:
    unit = times_power_of_ten(exponent) if exponent else ""
    return f"{format_margin(value, exponent, digits)}{unit}"


def _accuracies(*runs: Run) -> str:
    """``100% against 23.8% of the perturbed training examples (91.5% against 26.8% of the test …)``."""
    kind, measured = ("", "clean") if unperturbed(runs[0]) else ("perturbed ", "adversarial")
    keys = (f"{measured}_accuracy", f"test_{measured}_accuracy")
    train, test = (
        " against ".join(format_percent(number(run.final, key)) for run in runs) for key in keys
    )
    words = f"{train} of the {kind}training examples"
    if all(number(run.final, keys[1]) is None for run in runs):
        return words
    return f"{words} ({test} of the test examples)"


def _durations(first: Run, second: Run) -> str:
    a, b = _epochs(first), _epochs(second)
    return f"after {a}" if a == b else f"after {a} and {b}"


def _epochs(run: Run) -> str:
    count = epoch_of(run.final)
    word = "steps" if number(run.final, "epoch") is None else "epochs"
    return f"{format_count(count)} {word[:-1] if count == 1 else word}"


def _end(run: Run, timed: bool) -> str:
    """``after 1,000 epochs`` or ``at ln t = 100``; beside a flow, a training run says both."""
    if is_flow(run):
        return f"at {time_words(run.final)}"
    known = timed and log_time_of(run.final) is not None
    return f"after {_epochs(run)}" + (f" ({time_words(run.final)})" if known else "")


def _examples(run: Run) -> str:
    return format_count(number(run.config, "examples"))


def _known(run: Run, key: str) -> str:
    value = run.config.get(key)
    return "unknown" if value is None else str(value)


def _listed(pairs: object) -> str:
    return "; ".join(f"{name}: {text}" for name, text in pairs)  # type: ignore[attr-defined]
