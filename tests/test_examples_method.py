"""The experiments on the paper's claims: their frame, their mathematics, each at a tiny size."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.grid import nearest_codes

pytest.importorskip("sklearn")  # the digits
pytest.importorskip("matplotlib")
from examples.method import __main__ as cli
from examples.method import adaround, objectives, pages, schemes, taylor, workload
from examples.method.catalogue import EXPERIMENTS
from examples.method.experiment import Claim, Experiment, Table, Text, Values, claims_table
from examples.method.hessian import Expansion, expansion, gram, local
from examples.method.qubo import Qubo, cross_entropy_method, search, stochastic
from examples.method.workload import Images, Layer, Scorer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


# The frame


def _claim(*effects: float, expected: float) -> Claim:
    text = Text("a", "甲")
    return Claim(text, text, text, effects, expected)


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ((0.5, 0.5, 0.5), "reproduced"),
        ((0.5, 0.5, 0.49), "weaker"),  # the mean is below half of the paper's
        ((2.0, 2.0, -0.1), "weaker"),  # one seed does not show it
        ((0.1, -0.1, 0.1), "not seen here"),  # within its standard error
        ((-1.0, -1.0, -1.0), "not seen here"),
        ((0.0, 0.0, 0.0), "not seen here"),
        ((float("nan"),), "not seen here"),
    ],
)
def test_verdict(effects: tuple[float, ...], verdict: str) -> None:
    assert _claim(*effects, expected=1.0).verdict == verdict


ROWS = [(Text("up \\1", "上"), "1.5"), ("x", 2.0)]
TABLE = Table("two", "Two", (Text("method", "方法"), "loss"), ROWS)


def test_markdown() -> None:
    assert pages.markdown(TABLE, "en") == (
        "| method | loss |\n| :-- | --: |\n| up \\1 | 1.5 |\n| x | 2 |\n"
    )
    mixed = Table("m", "M", ("a", "b"), [("x", "100 draws"), ("y", "all draws")])
    assert "| :-- | :-- |" in pages.markdown(mixed, "en")  # words, though one begins with a number
    assert pages.markdown(TABLE, "zh").startswith("| 方法 | loss |\n| :-- | --: |\n| 上 | 1.5 |\n")


def test_only_the_marked_lines_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = "# A\n\n<!-- table: one -->\n| kept |\n<!-- /table -->\n\n<!-- table: two -->\n"
    after = "<!-- /table -->\n\n| no table of ours |\n<!-- /table -->\nEnd, without a newline"
    (tmp_path / "method.md").write_text(f"{before}| old |\n| older |\n{after}")
    pages.write([TABLE, dataclasses.replace(TABLE, name="three")], tmp_path)
    text = (tmp_path / "method.md").read_text()
    assert text == before + pages.markdown(TABLE, "en") + after
    pages.write([TABLE], tmp_path)
    assert (tmp_path / "method.md").read_text() == text
    said = capsys.readouterr().err
    assert "has no marker for the table three" in said
    assert "method.zh.md does not exist" in said
    assert not (tmp_path / "method.zh.md").exists()


def test_no_marker_without_an_end() -> None:
    text = "<!-- table: two -->\n<!-- table: one -->\n<!-- /table -->\n"
    assert pages.replaced(text, "two", "") is None
    assert pages.replaced(text, "on", "") is None


def _toy(value: float) -> Experiment:
    return Experiment(
        "toy",
        Text("table 0", "表 0"),
        lambda quick: {"value": value, "quick": quick},
        lambda values: [Table("toy", "Toy", ("a",), [(str(values["value"]),)])],
        lambda values: [_claim(values["value"], expected=1.0)],
        lambda figure, values: figure.subplots().plot([0, values["value"]]) and None,
    )


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents with markers, and the toy as the only experiment."""
    (tmp_path / "docs").mkdir()
    marked = "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("toy", "claims"))
    for name in pages.PAGES.values():
        (tmp_path / "docs" / name).write_text(marked)
    monkeypatch.setattr(pages, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cli, "EXPERIMENTS", {"toy": _toy(1.25)})
    return tmp_path


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_quick_writes_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(folders)
    cli.main(["--quick"])
    assert _files(folders) == before
    assert "1.25" in capsys.readouterr().out


def test_output_is_elsewhere(folders: Path) -> None:
    before = _files(folders)
    cli.main(["--quick", "--output", str(folders / "own")])
    assert set(_files(folders)) - set(before) == {"own/toy.json", "own/method_toy.svg"}
    assert before.items() <= _files(folders).items()


def test_full_run_and_tables(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.main(["toy"])
    document = json.loads((folders / "results" / "toy.json").read_text())
    assert document["results"] == {"value": 1.25, "quick": False}
    assert document["machine"]["torch_threads"] == 1
    assert "commit" in document["machine"]
    assert document["command"] == "python -m examples.method toy"
    first = _files(folders)
    assert b"1.25" in first["docs/method.md"] and b"1.25" in first["docs/method.zh.md"]
    assert "已重现".encode() in first["docs/method.zh.md"]
    monkeypatch.setattr(cli, "EXPERIMENTS", {"toy": _toy(9.0)})  # which must not be measured
    cli.main(["--tables"])
    assert _files(folders) == first  # the picture too


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy", "nothing"], "no experiment nothing: there are toy"),
        (["--tables", "--quick"], "--tables measures nothing"),
        (["--tables"], "has no results of any experiment"),
        (["--tables", "toy"], "has no results of toy"),
        (["--output", "{folder}/docs/method.md"], "File exists"),
        (["--output", "{folder}/docs/method.md/own"], "Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    arguments: list[str],
    said: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        cli.main([argument.format(folder=folders) for argument in arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_name_given_twice_is_measured_once(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["--quick", "toy", "toy"])
    assert capsys.readouterr().out.count("Toy") == 1


@pytest.mark.parametrize(("language", "name"), pages.PAGES.items())
def test_documents_show_the_results(language: pages.Language, name: str) -> None:
    """Each stored result's tables stand in the documents as they follow from it, and all claims."""
    text = (pages.DOCS / name).read_text()
    tables: list[Table] = []
    claims: list[tuple[Experiment, Claim]] = []
    for experiment in EXPERIMENTS.values():
        values = cli.read(cli.RESULTS / f"{experiment.name}.json")
        assert values is not None, f"there are no results of {experiment.name}"
        tables += experiment.tables(values)
        claims += [(experiment, claim) for claim in experiment.claims(values)]
    for table in (*tables, claims_table(claims)):
        assert pages.replaced(text, table.name, pages.markdown(table, language)) == text


# The mathematics


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.relu(self.conv(x)).flatten(1))
        return y


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer(Small().double().requires_grad_(False), "conv")


@pytest.fixture
def data() -> Images:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 2, 3, 3, generator=generator, dtype=torch.float64)
    return Images(images, torch.randint(5, (20,), generator=generator))


@pytest.fixture
def task(layer: Layer, data: Images) -> Expansion:
    return expansion(layer, data)


def _loss(layer: Layer, data: Images, weight: Tensor) -> Tensor:
    return F.cross_entropy(layer.logits(weight.view_as(layer.weight), data.images), data.labels)


def test_hessian_is_that_of_autograd(layer: Layer, data: Images, task: Expansion) -> None:
    flat = layer.weight.flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(layer, data, flat), flat)
    torch.testing.assert_close(task.gradient, gradient)
    hessian = torch.autograd.functional.hessian(lambda w: _loss(layer, data, w), flat)
    torch.testing.assert_close(task.hessian, hessian)


def test_forms_are_the_changes_of_loss_and_outputs(
    layer: Layer, data: Images, task: Expansion
) -> None:
    change = 1e-4 * torch.randn(layer.weight.shape, dtype=torch.float64)
    flat = change.view(1, -1)
    up, down, same = (_loss(layer, data, layer.weight + k * change) for k in (1, -1, 0))
    expected = float(task.quadratic(flat))
    assert float(up + down - 2 * same) / 2 == pytest.approx(expected, rel=1e-4)
    assert float(up - down) / 2 == pytest.approx(float(flat @ task.gradient), rel=1e-4)

    outputs = F.conv2d(data.images, change.view_as(layer.matrix.weight), padding=1)
    found = float(local(gram(layer, data.images), flat))
    assert found == pytest.approx(float(outputs.square().sum()) / len(outputs))


def test_parts_of_the_quadratic_form(layer: Layer, task: Expansion) -> None:
    rows, cols = layer.weight.shape
    one_weight = torch.zeros(1, rows * cols, dtype=torch.float64)
    one_weight[0, cols + 3] = 0.1
    one_row = torch.zeros(rows, cols, dtype=torch.float64)
    one_row[2] = torch.linspace(-1, 1, cols)
    full, within, alone = task.quadratic, task.within_rows, task.diagonal
    torch.testing.assert_close(alone(one_weight), full(one_weight))
    torch.testing.assert_close(within(one_row.view(1, -1), rows), full(one_row.view(1, -1)))
    assert not torch.isclose(alone(one_row.view(1, -1)), full(one_row.view(1, -1)), rtol=0.1)
    parts = torch.stack([row[None] * (torch.arange(rows) == i)[:, None] for i, row in
                         enumerate(torch.randn(rows, cols, dtype=torch.float64))])  # fmt: skip
    total = within(parts.sum(0).view(1, -1), rows)
    torch.testing.assert_close(total, full(parts.flatten(1)).sum()[None])


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def qubo(weight: Tensor) -> Qubo:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Qubo.of(weight, _grid(weight), x.T @ x)


def _grid(weight: Tensor):
    layer = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        layer.weight.copy_(weight)
    return Layer(layer, "").grid(2)


def _least(qubo: Qubo) -> Tensor:
    rows, n = qubo.down.shape
    every = torch.tensor(list(itertools.product((False, True), repeat=n)))
    return qubo.values(every[:, None].expand(-1, rows, n)).amin(0)


def test_solvers_find_the_least(qubo: Qubo, weight: Tensor) -> None:
    start = qubo.nearest(weight, _grid(weight))
    least, at_start = _least(qubo), qubo.values(start)
    assert (least < at_start).any()
    found = search(qubo, stochastic(qubo, start, 8, 0), 300, 0)
    torch.testing.assert_close(qubo.values(found), least)
    drawn = cross_entropy_method(qubo, 0, samples=300)
    assert (qubo.values(drawn) <= at_start).all()
    torch.testing.assert_close(qubo.values(drawn).sum(), least.sum(), rtol=0.05, atol=0.0)


def test_codes_of_a_qubo(qubo: Qubo, weight: Tensor) -> None:
    grid = _grid(weight)
    start = qubo.nearest(weight, grid)
    assert torch.equal(qubo.codes(start), nearest_codes(weight, grid))
    assert (qubo.above == qubo.below).any()  # beyond the grid's ends there is no choice
    error = grid.scale * qubo.codes(start) - weight
    expected = ((error.double() @ qubo.gram) * error).sum(1)
    torch.testing.assert_close(qubo.values(start), expected)


def test_a_single_row_joins_all_weights(layer: Layer, task: Expansion) -> None:
    grid = Layer(layer.model.float(), "conv").grid(3)
    one = layer.weight.float().view(1, -1)
    qubo = Qubo.of(one, grid, task.hessian)
    start = qubo.nearest(one, grid)
    found = search(qubo, stochastic(qubo, start, 4, 0), 500, 0)
    change = grid.scale * qubo.codes(found) - one
    torch.testing.assert_close(2 * task.quadratic(change), qubo.values(found), rtol=1e-4, atol=0.0)
    assert qubo.values(found) < 0.8 * qubo.values(start)


# Each experiment


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaround, "PAPER", dataclasses.replace(adaround.PAPER, steps=60))
    monkeypatch.setattr(workload, "CALIBRATION_IMAGES", 128)


def _shown(experiment: Experiment, values: Values, folder: Path) -> list[Claim]:
    """All that follows from the values; a picture is the same twice."""
    from examples.method import pictures

    values = json.loads(json.dumps(values))
    for table in experiment.tables(values):
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert pages.markdown(table, "en") != pages.markdown(table, "zh")
    for name in ("a.svg", "b.svg"):
        pictures.save(experiment, values, folder / name)
    assert (folder / "a.svg").read_bytes() == (folder / "b.svg").read_bytes()
    return experiment.claims(values)


def test_schemes(tmp_path: Path) -> None:
    run = schemes.run("separable", 3, 0, draws=4, shifts=0, epochs=3)
    scores = run["scores"]
    assert list(scores) == ["full", "nearest", "ceil", "floor", "paper", "fast", "balanced", "best",
                            "stochastic", "stochastic best"]  # fmt: skip
    assert scores["full"]["error"] == 0 < scores["balanced"]["error"] < scores["nearest"]["error"]
    assert scores["paper"]["error"] < scores["nearest"]["error"]
    assert min(scores[name]["error"] for name in ("ceil", "floor")) > scores["nearest"]["error"]
    assert len(set(run["stochastic_losses"])) == 4
    assert scores["stochastic best"]["accuracy"] == max(run["stochastic_accuracies"])
    claims = _shown(schemes.EXPERIMENT, {"draws": 4, "runs": [run]}, tmp_path)
    lost, above, _, _ = claims
    expected = max(scores[name]["accuracy"] for name in ("ceil", "floor"))
    assert lost.effects == [pytest.approx(1 - expected / scores["nearest"]["accuracy"])]
    assert above.effects[0] in (0, 0.25, 0.5, 0.75, 1)


def test_taylor(tmp_path: Path) -> None:
    run = taylor.run(4, 0, draws=12, epochs=3)
    points = run["points"]
    assert {len(values) for values in points.values()} == {12}
    assert run["correlations"]["gradient"]["spearman_loss"] > 0.6
    assert all(run["nearest"]["diagonal"] < value for value in points["diagonal"])
    ratios = [q / loss for q, loss in zip(points["gradient"], points["loss"], strict=True)]
    assert 0.5 < sorted(ratios)[6] < 2  # the expansion has the loss's size, not only its order
    run["bits"] = taylor.CLAIMED
    values = {"draws": 12, "network": "separable", "runs": [run]}
    monotone, _ = _shown(taylor.EXPERIMENT, values, tmp_path)
    assert monotone.effects == [-run["correlations"]["quadratic"]["spearman_accuracy"]]


def test_correlations() -> None:
    x = torch.arange(5.0)
    found = taylor.correlations(x, x**3, -x)
    assert found["spearman_loss"] == pytest.approx(1)
    assert 0.8 < found["pearson_loss"] < 0.99
    assert found["spearman_accuracy"] == pytest.approx(-1)


def test_objectives(tmp_path: Path) -> None:
    problem = objectives.Problem("conv", 3, samples=100, starts=4, steps=300)
    run = objectives.run(problem, 0, shifts=0, epochs=3)
    methods = run["methods"]
    assert list(methods) == list(objectives.METHODS)
    nearest = methods.pop("nearest")
    for name, found in methods.items():
        objective = "task" if name.startswith("task") else "local"
        assert found[objective] < 0.9 * nearest[objective]
    # No row has a better choice of two codes than our search finds, nor the relaxation's.
    others = [found["local"] for name, found in methods.items() if name != "local search"]
    assert methods["local search"]["local"] <= min(others) * (1 + 1e-6)
    assert methods["task both"]["task"] <= methods["task cem"]["task"]
    run["methods"]["nearest"] = nearest
    values = {"network": "separable", "problems": [dataclasses.asdict(problem)], "runs": [run]}
    _shown(objectives.EXPERIMENT, values, tmp_path)


def test_scorer(layer: Layer, data: Images) -> None:
    score: Scorer = layer.scorer(data)
    kept = score(layer.weight)
    assert kept.error == 0 and kept.loss == pytest.approx(float(_loss(layer, data, layer.weight)))
    other = score(-layer.weight)
    assert other.error > 0.1 and other.loss != kept.loss
    assert torch.equal(layer.matrix.weight_matrix(), layer.weight)  # the model stays as it is
