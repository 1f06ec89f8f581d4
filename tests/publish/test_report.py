"""The page of a run, as HTML."""

import json
import re
import shutil
from html import unescape

import html5lib
import pytest

from helpers.report_runs import HOSTILE, NAMES, ensemble_run, selection_run
from hf_ensemble import RunDirectory, write_report
from hf_ensemble.cli.main import main
from hf_ensemble.errors import ConfigurationError, RecordError
from hf_ensemble.runs import Boosting, BoostingStep, EvaluatedRows, ExampleRows, TrainedAdapter, run_results
from hf_ensemble.select import Grouping

HTML = "{http://www.w3.org/1999/xhtml}"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return ensemble_run(tmp_path_factory.mktemp("report") / "toy")


@pytest.fixture(scope="module")
def page(ensemble):
    return write_report(ensemble.path).read_text()


def tree_of(text):
    """The parsed page; no error that a browser would have to repair."""
    return html5lib.HTMLParser(strict=True).parse(text)


def text_of(node):
    return " ".join("".join(node.itertext()).split())


def tables(tree):
    """Cells of every table, by the caption that it is labelled by."""
    names = {node.get("id"): text_of(node) for node in tree.iter(f"{HTML}p") if node.get("id")}
    found = {}
    for table in tree.iter(f"{HTML}table"):
        rows = [[text_of(cell) for cell in row] for row in table.iter(f"{HTML}tr")]
        found[names[table.get("aria-labelledby")]] = rows
    return found


def test_the_page_says_what_the_records_say(ensemble, page):
    results, grouping = run_results(ensemble), ensemble.read(Grouping)
    tree = tree_of(page)
    assert results.verdict in text_of(next(node for node in tree.iter(f"{HTML}p") if node.get("class") == "verdict"))
    found = tables(tree)
    rows = {row[0]: row for row in found["Loss, in nats per token; lower is better"]}
    assert rows["task"] == [
        "task",
        "adapter",
        "base model",
        "one adapter for all",
        "ensemble",
        "difference to one adapter for all",
    ]
    for task in NAMES:
        assert rows[task][1] == grouping.group_of(task)
        for cell, system in zip(rows[task][2:], ("base", "baseline", "ensemble")):
            low, high = results.intervals[system].tasks[task]["loss"]
            assert cell == f"{results.scores[system][task].loss:.3f} {low:.3f} to {high:.3f}"
        assert rows[task][5].startswith(f"{results.intervals['ensemble'].differences[task]['loss'].value:+.3f} ")
    assert rows["mean"][4].startswith(f"{results.mean_loss['ensemble']:.3f} ")
    affinity = {row[0]: row[1:] for row in found["Affinity in nats"]}
    assert affinity["sums"][1] == f"{grouping.affinity[0][1]:.3f}" and affinity["sums"][0] == ""
    predicted = {row[0]: row for row in found["Losses"]}
    assert predicted["words"][1:3] == ["1.700", f"{results.scores['ensemble']['words'].loss:.3f}"]
    weights = {row[0]: row[1:] for row in found["Weight of each adapter in the sum, by task"]}
    assert weights["sums"] == ["0.60", "0.40"] and weights["diffs"] == ["1.00", ""]
    mixtures = next(rows for name, rows in found.items() if name.startswith("How often a row"))
    assert ["noise", "0.25", "1.00"] in mixtures
    curve = next(rows for name, rows in found.items() if name.startswith("What further adapters"))
    assert curve[2] == ["2", "2.00", "1.600", "1.685", "-0.350 -0.400 to -0.300"]
    harm = {row[0]: row for row in found["Each task left out"]}
    assert harm["noise"][1:] == ["-0.0100 ± 0.0040", "5 of 5"]
    stages = {row[0]: row[1:] for row in found["Stages"]}
    assert stages["gradients"] == ["12.5", "1.00 G", "100", "0 B"] and stages["baseline"][:2] == ["25.0", "2.00 G"]
    assert stages["together"][0] == "262.5"
    assert "noise is predicted to hurt all others" in results.verdict


def test_rows_are_shown_with_their_text(ensemble, page):
    examples = tree_of(page).find(".//*[@id='examples']")
    shown = ensemble.read(ExampleRows).tasks["words"]
    assert 1 <= len(shown.lowest) <= 4 and shown.lowest[0].score == shown.quantiles[0]
    for row in (*shown.lowest, *shown.highest):
        shown_row = f"{row.score * 1e6:+.2f} Question {row.example_id} of words? Answer: 4 {row.example_id}"
        assert shown_row in text_of(examples)


def test_the_page_needs_nothing_else_and_allows_nothing_else(page):
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page) and "@import" not in page
    # Addresses that are names of formats are not asked for.
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert page.count("<script>") == 1 and len(page) < 400_000
    assert "/home/me" not in page


def test_names_and_rows_are_text_whatever_they_hold(tmp_path):
    for run in (ensemble_run(tmp_path / "<i>run", HOSTILE), selection_run(tmp_path / "s", HOSTILE)):
        page = write_report(run.path).read_text()
        tree = tree_of(page)
        tags = {node.tag.removeprefix(HTML) for node in tree.iter() if isinstance(node.tag, str)}
        assert not tags & {"img", "b", "i"} and page.count("<script>") == page.count("</script>") == 1
        everything = text_of(tree)
        for name in HOSTILE:
            assert " ".join(name.split()) in everything
        # Nothing in a name is a template either.
        assert "{{ 7 * 7 }}" in everything
        attributes = [name for node in tree.iter() for name in getattr(node, "attrib", {})]
        assert not any(name.startswith("on") for name in attributes)
        # Ids are those of parts of the page, once each.
        ids = [node.get("id") for node in tree.iter() if isinstance(node.tag, str) and node.get("id")]
        assert len(ids) == len(set(ids))


def test_pictures_are_named_and_follow_the_theme(page):
    pictures = re.findall(r"<svg [^>]*>", page)
    assert len(pictures) >= 5 and all('role="img"' in one and "aria-label=" in one for one in pictures)
    drawn = page[page.index("<main>") :]
    used = set(re.findall(r"var\((--[\w-]+)\)", drawn))
    light, _, dark = page[page.index("<style>") : page.index("</style>")].partition("prefers-color-scheme: dark")
    assert {"--blue", "--ink"} <= used
    for name in used:
        assert f"{name}:" in light.replace(" ", "") and f"{name}:" in dark.replace(" ", ""), name
    assert not re.search(r"#(?:0072b2|d55e00|000000|ffffff)\b", drawn)
    # Text stays text.
    assert re.search(r"<text[^>]*>[^<]*sums</text>", drawn)


def test_selections(tmp_path):
    tree = tree_of(write_report(selection_run(tmp_path / "run").path).read_text())
    found = tables(tree)
    steps = found["Steps"]
    assert steps[2] == ["diffs", "2", "1.100 0.900 to 1.300", "words"]
    head, *rows = found["Tasks"]
    assert head[:2] == ["task", "trained on"]
    assert {row[0]: row[1] for row in rows} == {
        "sums": "target",
        **dict.fromkeys(("diffs", "words"), "yes"),
        **dict.fromkeys(("verbs", "colours", "noise"), "no"),
    }
    assert ["alone", "1.400"] in found["Simpler choices"]
    assert "Affinity in nats" not in found and "diffs and words help sums" in text_of(tree)


def test_what_was_not_recorded_is_left_out(tmp_path):
    run = ensemble_run(tmp_path / "run", NAMES[:3])
    for path in ("estimate", "training"):
        shutil.rmtree(run.path / path)
    for kind in (EvaluatedRows, ExampleRows):
        run.where(kind).unlink()
    found = tables(tree_of(write_report(run.path, tmp_path / "page.html").read_text()))
    # Below four tasks affinities say no more than the losses.
    assert "Affinity in nats" not in found and "Each task left out" not in found and "Trainings" not in found
    assert {row[0] for row in found["Loss, in nats per token; lower is better"]} == {"task", *NAMES[:3], "mean"}


def test_further_systems_stand_beside_the_ensemble(tmp_path):
    run = ensemble_run(tmp_path / "run", further={"per_task": 1.7, "random_groups": 1.8})
    page = write_report(run.path).read_text()
    results = run_results(run)
    rows = {row[0]: row for row in tables(tree_of(page))["Loss, in nats per token; lower is better"]}
    assert rows["task"][4:7] == ["ensemble", "one adapter per task", "random groups"]
    difference = results.intervals["ensemble"].differences["sums"]["loss"].value
    assert rows["sums"][7].startswith(f"{difference:+.3f} ")
    assert results.intervals["per_task"].mean_difference["loss"].value == pytest.approx(-0.2, abs=0.03)
    assert results.verdict.startswith("Two adapters lower the loss on 6 of 6 tasks")
    assert str(results).splitlines()[3].split()[:2] == ["task", "base"] and "one adapter per task" in str(results)


def test_many_tasks(tmp_path):
    names = [f"task_{number}" for number in range(90)]
    page = write_report(ensemble_run(tmp_path / "run", names).path).read_text()
    assert "Affinity in nats" not in page and len(page) < 2_000_000
    assert len(tables(tree_of(page))["Loss, in nats per token; lower is better"]) == 92


def test_a_folder_without_a_run_and_damaged_records(tmp_path, ensemble, capsys):
    with pytest.raises(ConfigurationError, match=r"run that was trained and evaluated, found none.*Check the path"):
        write_report(tmp_path)
    assert main(["report", "--run", str(tmp_path)]) == 1 and "found none" in capsys.readouterr().err
    shutil.copytree(ensemble.path, tmp_path / "run")
    file = RunDirectory(tmp_path / "run").where(Grouping)
    file.write_text(file.read_text().replace("group_0", "group_9"))
    with pytest.raises(RecordError, match="was altered"):
        write_report(tmp_path / "run")


def test_the_command_writes_the_page(ensemble, tmp_path, capsys):
    assert main(["report", str(ensemble.path), "--output", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_configuration_is_folded_and_whole(ensemble, page):
    details = next(node for node in tree_of(page).iter(f"{HTML}pre"))
    configuration = json.loads(unescape("".join(details.itertext())))
    assert configuration["choices"] == {"num_groups": 2} and configuration["configuration"]["model"] == {"name": "tiny"}


def test_a_training_without_logs_has_no_curve(tmp_path):
    run = selection_run(tmp_path / "run")
    trained = run.trained_adapter("adapter")
    bare = {key: getattr(trained, key) for key in ("name", "mixture", "seed", "theta0")}
    run.write_trained_adapter(TrainedAdapter(**bare, status="done"))
    assert "Loss of each training" not in write_report(run.path).read_text()


def test_weights_are_those_with_the_kept_steps_of_boosting(tmp_path):
    run = ensemble_run(tmp_path / "run")
    losses = {"validation_loss": 1.7, "validation_loss_after": 1.6, "training_loss": 1.8, "training_loss_after": 1.6}
    step = BoostingStep(
        "boost_0", "group_1", NAMES[3:], "surrogate", True, 0.5, gain=0.1, standard_error=0.02, **losses
    )
    run.write(Boosting([step]))
    head, *rows = tables(tree_of(write_report(run.path).read_text()))["Weight of each adapter in the sum, by task"]
    assert head == ["task", "group_0", "group_1", "boost_0", "start"]
    found = {row[0]: row[1:] for row in rows}
    assert found["sums"] == ["0.60", "0.40", "", ""] and found["verbs"] == ["", "1.00", "0.50", "-0.50"]
