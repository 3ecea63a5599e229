from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import marginflow as mf
from marginflow.errors import InputError, RunError, StorageError
from marginflow.experiments import Curve, Panel
from marginflow.report import write_report
from marginflow.report._command import reproduction
from marginflow.report._svg import describe
from marginflow.report._theme import theme_named
from marginflow.runs import Run

Make = Callable[..., Run]
VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The page's elements; a tag that is not closed in its place is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs))
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, inside: str = "body") -> str:
        joined = "".join(data for stack, data in self.texts if inside in stack)
        return " ".join(joined.split())


def page_of(runs: list[Run], folder: Path, **options: Any) -> Page:
    return Page(write_report(runs, folder / "report.html", **options))


@pytest.fixture(scope="module")
def pair(both: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(both, tmp_path_factory.mktemp("pair"))


def test_the_numbers_are_on_the_page(pair: Page, both: list[Run]) -> None:
    text = pair.text()
    assert "Measured under FGSM, ε = 0.15, adversarial training (fgsm) ends with a larger" in text
    assert "γ̂m = 2.10 × 10⁻³ against γ̂m = −170 × 10⁻³" in text
    cells = " ".join(data for stack, data in pair.texts if {"td", "th"} & set(stack))
    for run in both:
        final = run.final
        assert f"{1000 * final['normalized_margin']:#.4g}".replace("-", "−") in cells
        assert f"{100 * final['test_adversarial_accuracy']:.1f}%" in cells
        assert f"{final['norm_product']:,.0f}" in cells
        assert f"{final['log_loss']:.3f}".replace("-", "−") in cells
        for norm in final["layer_norms"]:
            assert f"{norm:#.4g}" in cells
    for setting in ("digits:3,8", "mlp:32", "logistic", "float32", "2.13.0+cpu"):
        assert setting in cells


def test_the_page_needs_nothing_else(pair: Page) -> None:
    assert "<script" not in pair.source
    for tag, attributes in pair.elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base", "image"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "data", "action"}:
                assert (value or "").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", pair.source))
    assert "@import" not in pair.source
    assert "http" not in pair.source.replace("http-equiv", "", 1)
    assert "default-src 'none'" in pair.source, "whatever got into it, it loads nothing"


def test_references_inside_the_drawings_resolve_and_ids_are_unique(pair: Page) -> None:
    ids = Counter(a["id"] for _, a in pair.elements if "id" in a)
    assert set(ids.values()) == {1}
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]*)', pair.source))
    assert len(targets) > 20
    assert targets <= set(ids)
    labelled = {a["aria-labelledby"] for _, a in pair.elements if "aria-labelledby" in a}
    assert labelled <= set(ids)


def test_the_drawings_have_words_and_the_pages_colours(pair: Page) -> None:
    drawings = pair.all("svg")
    assert len(drawings) == 5 == len(pair.all("figure")) == len(pair.all("figcaption"))
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert "epoch" in (drawing["aria-label"] or "")
        assert set(drawing) == {"viewbox", "role", "aria-label"}
    assert "fgsm: from −20.00 at epoch 0 to 2.100 at epoch 1,000." in pair.source
    assert pair.text("figcaption").count("n = 286, seed 0.") == 5
    inside = "".join(re.findall(r"<svg.*?</svg>", pair.source, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", inside)
    used = set(re.findall(r"var\((--fig-[a-z0-9-]+)\)", inside))
    assert {"--fig-paper", "--fig-ink", "--fig-grid", "--fig-curve-0", "--fig-curve-1"} <= used
    styles = pair.text("style")
    for name in ("light", "dark"):
        for variable, color in theme_named(name).variables().items():
            assert f"--fig-{variable}: {color};" in styles


def test_structure(pair: Page) -> None:
    assert pair.source.startswith("<!DOCTYPE html>")
    assert pair.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in pair.all(
        "meta"
    )
    assert len(pair.all("h1")) == 1
    assert len(pair.all("h2")) == 9
    tables = pair.all("table")
    assert len(tables) == len(pair.all("caption")) == 6
    assert all(cell.get("scope") in ("col", "row") for cell in pair.all("th"))
    scrolling = [a for a in pair.all("div") if a.get("class") == "scroll"]
    assert len(scrolling) == 6
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolling)
    styles = pair.text("style")
    for query in ("@media print", "size: A4", "prefers-color-scheme: dark", "break-inside: avoid"):
        assert query in styles


def test_strings_from_files_are_text(make_run: Make, tmp_path: Path) -> None:
    # A folder cannot be called </script>, with its slash: in memory the model's name can.
    hostile = make_run(
        None,
        attack=EVIL,
        measure_with=f'"{EVIL}',
        data=f"npz:{EVIL}",
        model_spec=f"{EVIL}'\"&amp;",
        loss=EVIL,
        classes=[EVIL],
        seed=EVIL,
        versions={EVIL: EVIL},
        layers=[{"name": EVIL, "degree": 1}, {"name": "--><b>", "degree": 1}],
    )
    folder = make_run("<img src=x onerror=alert(1)>]]>&lt;")
    page = page_of([folder, hostile, make_run("third")], tmp_path, title=f"{EVIL} & co")
    assert "script" not in {tag for tag, _ in page.elements}
    assert "img" not in {tag for tag, _ in page.elements}
    assert "b" not in {tag for tag, _ in page.elements}
    assert "<script" not in page.source
    text = page.text()
    assert text.count(EVIL) > 15
    assert "<img src=x onerror=alert(1)>]]>&lt;" in text
    assert page.text("title") == page.text("h1") == f"{EVIL} & co"
    labels = " ".join(a["aria-label"] or "" for a in page.all("svg"))
    assert EVIL in labels


def test_the_same_runs_give_the_same_bytes(make_run: Make, tmp_path: Path) -> None:
    first = write_report([make_run()], tmp_path / "a.html").read_bytes()
    assert write_report([make_run()], tmp_path / "b.html").read_bytes() == first
    changed = make_run(margins=lambda epoch: 0.3)
    assert write_report([changed], tmp_path / "b.html").read_bytes() != first


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": (0,)},
        {"test": False},
        {"attack": "none"},
        {"layers": None, "versions": None, "classes": None, "model": None},
        {"epochs": tuple(range(30)), "margins": lambda epoch: 0.0},
    ],
)
def test_unusual_runs(make_run: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    page = page_of([make_run(**options)], tmp_path)
    assert len(page.all("svg")) >= 4
    assert "None" not in page.text()
    assert "nan" not in page.text().lower()


def test_nothing_finite_at_all(tmp_path: Path) -> None:
    run = Run({}, [{"step": 0, "epoch": 0, "normalized_margin": None, "log_loss": None}])
    page = page_of([run, run], tmp_path)
    assert page.all("svg") == []
    assert "fewer than two of these 2 runs have a finite γ̂m" in page.text()


def test_caveats_are_shown(make_run: Make, standard: Run, tmp_path: Path) -> None:
    page = page_of([make_run("other", attack="fgm:eps=1.5"), standard], tmp_path)
    assert "measured under different perturbations (other: ℓ2‑FGM, ε = 1.5;" in page.text("ul")


def test_refusals(make_run: Make, adversarial: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.html"):
        write_report([adversarial], tmp_path / "report.pdf")
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RunError, match="no measurements"):
        write_report([make_run(epochs=())], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_report([adversarial], tmp_path / "file" / "report.html")


def test_the_folder_is_made_and_the_path_returned(adversarial: Run, tmp_path: Path) -> None:
    path = write_report([adversarial], str(tmp_path / "new" / "page.html"))
    assert path == tmp_path / "new" / "page.html"
    assert path.is_file()


def options_of(parts: list[str]) -> dict[str, str]:
    words = shlex.split(" ".join(parts))
    assert words[:2] == ["marginflow", "train"]
    names, values = words[2::2], words[3::2]
    assert all(name.startswith("--") for name in names)
    return {name[2:].replace("-", "_"): v for name, v in zip(names, values, strict=True)}


def test_the_command_line_says_what_the_configuration_says(make_run: Make, tmp_path: Path) -> None:
    run = make_run("my run; rm -rf $HOME", data="npz:my data's.npz", lr=0.1 + 0.2, device="cuda")
    parts, remark = reproduction(run)
    assert remark == ""
    options = options_of(parts)
    assert options == {
        "data": "npz:my data's.npz",
        "model": "mlp:32",
        "attack": "fgsm:eps=0.15",
        "measure_with": "fgsm:eps=0.15",
        "loss": "logistic",
        "lr": "0.30000000000000004",
        "batch_size": "32",
        "epochs": "1000",
        "momentum": "0.0",
        "derivative": "detached",
        "seed": "0",
        "dtype": "float32",
        "device": "cuda",
        "threads": "2",
        "out": "runs/my run; rm -rf $HOME",
    }
    shown = page_of([run], tmp_path).text("pre")
    verify, train = shown.split("marginflow ")[1:]
    assert shlex.split(verify) == ["verify", "runs/my run; rm -rf $HOME"]
    assert options_of([f"marginflow {train}"]) == options


def test_the_command_line_trains_the_same_run_again() -> None:
    asked = {"attack": "pgd-linf:eps=16/255,steps=2", "lr": 0.3, "batch_size": 7, "momentum": 0.5}
    run = mf.train("mlp:4", "separable:n=20,d=5,margin=0.1", epochs=12, seed=3, **asked)  # type: ignore[arg-type]
    options: dict[str, Any] = options_of(reproduction(run)[0])
    for name in ("batch_size", "epochs", "seed"):
        options[name] = int(options[name])
    for name in ("lr", "momentum"):
        options[name] = float(options[name])
    again = mf.train(options.pop("model"), options.pop("data"), **options)
    assert again.metrics == run.metrics


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model": None, "model_spec": "Net"}, "network (Net) was built in Python"),
        ({"model_spec": "Network"}, "network (Network) was built in Python"),
        ({"data": "custom"}, "data were given in Python"),
        ({"attack": "finite-set(5 perturbations, eps=0.1)"}, "finite set of perturbations"),
        ({"data": None}, "configuration lacks data"),
    ],
)
def test_what_no_command_line_can_train_again(
    make_run: Make, config: dict[str, Any], reason: str
) -> None:
    run = make_run()
    run.config.update(config)
    parts, remark = reproduction(run)
    assert parts == []
    assert reason in remark


def test_the_page_says_so_too(make_run: Make, tmp_path: Path) -> None:
    page = page_of([make_run(epochs=(0,), data="custom")], tmp_path)
    assert page.all("pre") == []
    assert "The data were given in Python: train it again with mf.train." in page.text()


def test_a_schedule_of_ones_own_is_mentioned(make_run: Make) -> None:
    parts, remark = reproduction(make_run(schedule=[1, 5]))
    assert parts
    assert "Measured at chosen epochs" in remark


def test_panels_in_words() -> None:
    panel = Panel(
        "Title",
        "epoch",
        "y",
        [
            Curve("a", [0, 1, 2], [None, 0.5, 2.0]),
            Curve("", [0, 1], [1.0, 1.5], dashed=True),
            Curve("point", [7], [3.0]),
            Curve("gone", [0], [None]),
        ],
    )
    assert describe(panel) == (
        "Title. Line chart of y against epoch. a: from 0.5000 at epoch 1 to 2.000 at epoch 2. "
        "a, dashed: from 1.000 at epoch 0 to 1.500 at epoch 1. point: 3.000 at epoch 7."
    )


def test_a_real_run_from_disk(tmp_path: Path) -> None:
    common: dict[str, Any] = {"measure_with": "fgm:eps=0.02", "epochs": 25, "lr": 0.2}
    for name, attack in (("adversarial", "fgm:eps=0.02"), ("standard", None)):
        data = "separable:n=20,d=5,margin=0.1"
        mf.train("mlp:4", data, attack=attack, out=tmp_path / name, **common)
    runs = [mf.load_run(tmp_path / name) for name in ("adversarial", "standard")]
    page = page_of(runs, tmp_path)
    assert "adversarial training (adversarial) ends with" in page.text()
    assert runs[0].config["versions"]["torch"] in page.text()
    assert len(page.all("svg")) >= 4
