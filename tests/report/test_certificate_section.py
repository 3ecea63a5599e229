"""The report's section about certificates, on runs that were certified."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import marginflow as mf
from marginflow.kkt import RunCertificate, certify_run
from marginflow.report import write_report
from marginflow.report._certificate import CertificateSection, certificate_section
from marginflow.runs import Run

EPS = 0.1
DATA = "digits:3,8,n=60"


class Images(HTMLParser):
    """The images of a page, and whether every tag but theirs is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures, one on vectors; both certified as far as they are fitted."""
    root = tmp_path_factory.mktemp("runs")
    attack = f"fgsm:eps={EPS}"
    options: dict[str, Any] = {"attack": attack, "lr": 0.1, "epochs": 2}
    mf.train("mlp:6", DATA, out=root / "digits", **options)
    mf.train("mlp:6", "separable:n=12,d=16", out=root / "vectors", **options)
    for name, tau in (("digits", 50.0), ("vectors", 1.0)):
        certify_run(root / name, tau=tau, fitted_only=True).save(root / name)
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> RunCertificate:
    return certify_run(folder / "digits", tau=50.0, fitted_only=True)


def section(*runs: Run) -> CertificateSection:
    made, damaged = certificate_section(runs)
    assert not damaged
    assert made is not None
    return made


def page(runs: list[Run], out: Path) -> str:
    return write_report(runs, out / "page.html").read_text(encoding="utf-8")


def test_without_a_certificate_there_is_no_section(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder / "digits", bare, ignore=shutil.ignore_patterns("certificate*"))
    assert certificate_section([mf.load_run(bare)]) == (None, [])
    source = page([mf.load_run(bare)], tmp_path)
    assert "KKT" not in source
    assert ".support" not in source
    kept = mf.load_run(bare)
    assert certificate_section([Run(kept.config, kept.metrics)]) == (None, [])


def test_the_sentence_the_table_and_the_curve_say_the_same(
    folder: Path, found: RunCertificate
) -> None:
    c = found.certificate
    made = section(mf.load_run(folder / "digits"))
    (sentence,) = made.sentences
    assert sentence.startswith(f"The network is {c.verdict}")
    assert f"the {len(c.support)} of {len(c.fitted)} examples" in sentence
    assert "at most 51 times the smallest" in sentence
    (shown,) = re.findall(r"r = ([\d.]+)", sentence)
    assert float(shown) == pytest.approx(c.residual, abs=1e-4)
    rows = {row[0]: row[1] for row in made.table.rows}
    assert float(rows["r, best multipliers on the support"]) == pytest.approx(c.residual, abs=1e-6)
    assert float(rows["r, paper’s multipliers (130)"]) == pytest.approx(c.residuals.paper, abs=1e-6)
    assert rows["examples in the support"] == str(len(c.support))
    assert rows["perturbation"] == "FGSM, ε = 0.1"
    (curve,) = made.curves.panel.curves
    assert list(curve.x) == c.curve.taus.tolist()
    assert list(curve.y) == c.curve.residuals.tolist()
    assert made.curves.panel.xscale == "symlog"
    assert c.left_out > 0
    assert f"{c.left_out} of {len(c.margins)} examples have no positive margin" in made.notes[0]


def test_the_pictures_are_the_inputs(folder: Path, found: RunCertificate) -> None:
    c = found.certificate
    (support,) = made = section(mf.load_run(folder / "digits")).supports
    assert len(made) == 1
    places = found.shown[: len(support.pairs)].tolist()
    assert len(places) == min(24, int((c.multipliers > 0).sum())) > 1
    clean = [found.data.x[int(c.support[k])].double() for k in places]
    perturbed = [c.adversarial_examples[k] for k in places]
    low = min(float(v.min()) for v in perturbed)
    high = max(float(v.max()) for v in perturbed)
    assert low < 0 < 1 < high, "a grey scale of the data's range would hide perturbations"
    for k, pair in enumerate(support.pairs):
        for source, values in ((pair.clean, clean[k]), (pair.perturbed, perturbed[k])):
            head, _, code = source.partition(",")
            assert head == "data:image/png;base64"
            grey = imread(io.BytesIO(base64.b64decode(code)), format="png")[:, :, 0]
            expected = ((values.reshape(8, 8) - low) / (high - low)).numpy()
            assert np.abs(grey - expected).max() <= 0.501 / 255
        index = int(c.support[places[k]])
        label = found.data.classes[max(0, int(found.data.y[index]))]
        assert pair.words == f"no. {index}, label {label}"
        assert float(pair.margin) == pytest.approx(float(c.margins[index]), rel=6e-3)
        assert float(pair.multiplier.split(" ")[0]) > 0


def test_the_page_has_them_with_words_and_nothing_from_elsewhere(
    folder: Path, tmp_path: Path
) -> None:
    run = mf.load_run(folder / "digits")
    source = page([run], tmp_path)
    parsed = Images(source)
    pairs = section(run).supports[0].pairs
    assert [image["alt"] for image in parsed.images] == [
        text for pair in pairs for text in (f"{pair.words}, as given", f"{pair.words}, perturbed")
    ]
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in parsed.images)
    assert "script" not in parsed.tags
    assert "http" not in source.replace("http-equiv", "", 1)
    assert '<h2 id="certificate">How far from a KKT point?</h2>' in source
    assert "image-rendering: pixelated" in source
    ids = re.findall(r'\sid="([^"]*)"', source)
    assert len(ids) == len(set(ids))
    assert source == page([run], tmp_path), "the same run gives the same bytes"


def test_what_is_no_picture_is_listed(folder: Path) -> None:
    run = mf.load_run(folder / "vectors")
    c = certify_run(run, tau=1.0, fitted_only=True).certificate
    (support,) = section(run).supports
    assert not support.pairs
    listed = [int(i) for i in re.findall(r"\d+", support.words.partition("): ")[2])]
    order = sorted(range(len(c.support)), key=lambda k: -float(c.multipliers[k]))
    assert listed == [int(c.support[k]) for k in order if c.multipliers[k] > 0]


def test_several_runs_have_one_line_each(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder / "digits", bare, ignore=shutil.ignore_patterns("certificate*"))
    runs = [mf.load_run(bare), mf.load_run(folder / "digits"), mf.load_run(folder / "vectors")]
    made = section(*runs)
    assert [curve.label for curve in made.curves.panel.curves] == ["digits", "vectors"]
    # The colours are those that the runs have everywhere else on the page.
    assert [curve.color for curve in made.curves.panel.curves] == [1, 2]
    assert made.table.colors == {1: 1, 2: 2}
    assert [s.partition(" is ")[0] for s in made.sentences] == ["digits", "vectors"]
    assert list(made.table.header) == ["certificate", "digits", "vectors"]
    assert [support.name for support in made.supports] == ["digits", "vectors"]
    assert "Support of digits" in page(runs, tmp_path)


def altered(folder: Path, out: Path, **changes: Any) -> Run:
    run = out / "run"
    shutil.copytree(folder / "digits", run, dirs_exist_ok=True)
    content = json.loads((run / "certificate.json").read_text())
    (run / "certificate.json").write_text(json.dumps(content | changes))
    return mf.load_run(run)


def test_a_certificate_that_the_run_has_left_behind(folder: Path, tmp_path: Path) -> None:
    made = section(altered(folder, tmp_path, step=1, truncated=True, split="test", left_out=0))
    assert [note.partition(": ")[2][:22] for note in made.notes] == [
        "more examples are allo",
        "certified on the test ",
        "certified at step 1; t",
    ]


def test_a_certificate_without_its_inputs(folder: Path, tmp_path: Path) -> None:
    run = altered(folder, tmp_path)
    shutil.rmtree(tmp_path / "run" / "certificate")
    (support,) = section(run).supports
    assert not support.pairs
    assert "inputs are not there" in support.words


@pytest.mark.parametrize(
    "changes",
    [{"curve": None}, {"curve": {}}, {"support": []}, {"classes": []}, {"residuals": 3}],
)
def test_a_page_says_which_certificate_is_damaged_and_goes_without(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    run = altered(folder, tmp_path, **changes)
    whole = mf.load_run(folder / "digits")
    made, (said,) = certificate_section([whole, run])
    assert made is not None
    assert len(made.sentences) == 1
    assert "certificate.json is damaged" in said
    assert said.endswith("make it again with marginflow certify.")
    page = write_report([run], tmp_path / "a.html").read_text()
    assert "its certificate is left out" in page
    assert "How far from a KKT point?" not in page


def test_the_kkt_point_beside_the_network_has_its_sentence(folder: Path, tmp_path: Path) -> None:
    nearest = {"residual": 2e-16, "margin": 0.17, "margin_before": 0.136, "gain": 0.25}
    nearest |= {"angle": 0.0625, "converged": True}
    (sentence,) = section(altered(folder, tmp_path, nearest=nearest)).sentences
    assert sentence.endswith(
        "The KKT point beside it, found to r = 2.000 × 10⁻¹⁶, is 0.06250 rad away, with γ̂_m = 0.17 in "
        "place of 0.136: 25.0% left to gain."
    )
    far = nearest | {"converged": False, "residual": 0.25, "gain": 3.5}
    (sentence,) = section(altered(folder, tmp_path, nearest=far)).sentences
    assert sentence.endswith(
        "A KKT point beside it was not reached; the search ended at r = 0.2500, 0.06250 rad away, with "
        "γ̂_m = 0.17 in place of 0.136: at least a factor of 4.5 left to gain."
    )
    for damaged in (3, {}, nearest | {"angle": None}, nearest | {"margin": "much"}):
        made, said = certificate_section([altered(folder, tmp_path, nearest=damaged)])
        assert made is None
        assert "certificate.json is damaged" in said[0]


def test_strings_from_the_file_are_escaped(folder: Path, tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    run = altered(
        folder, tmp_path, verdict=evil, attack=evil, loss=evil, split=evil, classes=[evil, evil]
    )
    source = page([run], tmp_path)
    assert evil not in source
    assert all(str(i["src"]).startswith("data:") for i in Images(source).images)


def test_residuals_near_zero_are_drawn_on_a_logarithmic_axis(folder: Path, tmp_path: Path) -> None:
    curve = {"taus": [0.0, None], "residuals": [1e-7, 1e-9], "supports": [2, 3]}
    made = section(altered(folder, tmp_path, curve=curve, residual=1e-7, tau=None))
    assert (made.curves.panel.xscale, made.curves.panel.yscale) == ("linear", "log")
    assert list(made.curves.panel.curves[0].x) == [0.0]
    assert "whose margin" not in made.sentences[0]
    page([mf.load_run(tmp_path / "run")], tmp_path)
