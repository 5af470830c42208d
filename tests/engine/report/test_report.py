import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.pairs.pairs import Pairs, write_pairs
from pfc.engine.report.write import write_report

SAME = np.arange(40) % 2 == 0
# Pair 0 is a positive that scores too low, pair 1 a negative that scores too high; all others are right.
COSINES = np.where(SAME, np.linspace(0.6, 0.9, 40), np.linspace(-0.2, 0.3, 40)).astype(np.float32)
COSINES[:2] = -0.0456, 0.7654


def grey(pair):
    """The pictures of pair i are two plain squares of grey 3·i and 255 - 3·i."""
    encoded = []
    for value in (3 * pair, 255 - 3 * pair):
        file = io.BytesIO()
        Image.new("L", (24, 24), value).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(step, accuracy, **more):
    return {
        "step": step,
        "set": "held <out>",
        "pairs": 40,
        "accuracy": accuracy,
        "accuracy_std": 0.0125,
        "accuracy_flip": accuracy,
        "accuracy_noflip": accuracy - 0.01,
        "auc": 0.98765,
        "eer": 0.0432,
        "threshold": 0.45,
        "tar_at_far_1e-1": 0.8,
        **more,
    }


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    (directory / "evaluation").mkdir(parents=True)
    pairs = tmp_path / "held <out>.bin"
    write_pairs(pairs, Pairs([image for pair in range(40) for image in grey(pair)], SAME, "held <out>"))
    config = {
        "run": {"name": "glyphs & more"},
        "data": {"train": str(tmp_path / "nowhere")},
        "backbone": {"name": "small", "embedding_dim": 64},
        "head": {"num_classes": 1234},
        "schedule": {"steps": 2000},
        "evaluation": {"pairs": [str(pairs)]},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = [
        {"step": step, "loss": 40 / step, "lr": 0.1, "images_per_second": 800.0, "elapsed_seconds": 0.1 * step}
        for step in range(20, 2001, 20)
    ]
    write_lines(directory / "metrics.jsonl", metrics)
    write_lines(directory / "evaluation.jsonl", [evaluation(0, 0.5123), evaluation(1000, 0.9), evaluation(2000, 0.95)])
    for step, cosine in ((0, np.linspace(0.99, 1, 40, dtype=np.float32)), (2000, COSINES)):
        np.savez(directory / "evaluation" / f"held <out>-{step:08d}.npz", cosine=cosine, same=SAME)
    return directory


def report(directory):
    path = write_report(directory)
    assert path == directory / "report.html"
    return path.read_text(encoding="utf-8")


def figure_titles(page):
    return re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="([^"]*)">', page)


def visible(page):
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_a_whole_run_has_everything(run):
    page = report(run)
    text = visible(page)
    for expected in (
        "glyphs &amp; more",
        "95.00 % accuracy on held &lt;out&gt;; untrained 51.23 %",
        "2,000 steps of 2,000",
        "1,234 training identities",
        "3:20 time",
        "800 images/s",
        "held &lt;out&gt; 2,000 95.00 % ± 1.25 95.00 % 94.00 % 0.9877 4.32 % 0.4500 80.00 %",
        "held &lt;out&gt;, untrained 0 51.23 %",
        "num_classes: 1234",
    ):
        assert expected in text
    assert figure_titles(page) == ["Loss", "Learning rate", "Evaluation", "Speed", "Cosines", "ROC"]


def test_the_page_needs_nothing_from_outside(run):
    page = report(run)
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "<script" not in page
    assert "url(" not in page


def test_figures_are_readable_svg_with_labelled_axes(run):
    first = re.search(r'data:image/svg\+xml;base64,([^"]+)', report(run))
    svg = base64.b64decode(first.group(1)).decode()
    assert svg.count("<svg") == 1
    assert "<!-- step -->" in svg  # matplotlib leaves the text of its drawn letters in a comment
    assert "<!-- loss of the global batch -->" in svg


def shown_pairs(page):
    """{group: [(number of the pair, told by its first picture, cosine, verdict)]}"""
    groups = {}
    for title, body in re.findall(r"<h3>(.*?)</h3>(.*?)</div>", page, flags=re.DOTALL):
        groups[title] = []
        for picture, cosine, verdict in re.findall(
            r'<img src="data:image/jpeg;base64,([^"]+)" alt="image 1.*?cosine (-?[\d.]+)\s*<span class="(\w+)"',
            body,
            flags=re.DOTALL,
        ):
            pixel = Image.open(io.BytesIO(base64.b64decode(picture))).getpixel((12, 12))
            groups[title].append((round(pixel[0] / 3), float(cosine), verdict))
    return groups


def test_the_hardest_and_typical_pairs_are_shown_with_their_own_pictures(run):
    groups = shown_pairs(report(run))
    alike = groups["Different identities, most alike to the network"]
    unlike = groups["Same identity, least alike to the network"]
    assert alike[0] == (1, 0.765, "wrong")
    assert unlike[0] == (0, -0.046, "wrong")
    assert [verdict for _, _, verdict in alike[1:] + unlike[1:]] == ["right"] * 10
    assert [pair for pair, _, _ in unlike[1:]] == [2, 4, 6, 8, 10]
    for title, same in (("Same identity, typical", 1), ("Different identities, typical", 0)):
        median = np.median([c for c, kind in zip(COSINES[2:], SAME[2:], strict=True) if kind == same])
        assert len(groups[title]) == 6
        assert all(abs(cosine - median) < 0.08 and verdict == "right" for _, cosine, verdict in groups[title])


def test_a_run_that_has_only_begun_has_a_report(run):
    shutil.rmtree(run / "evaluation")
    (run / "metrics.jsonl").unlink()
    (run / "evaluation.jsonl").unlink()
    page = report(run)
    assert "Nothing has been logged yet." in page
    assert "Nothing has been evaluated yet." in page
    assert "num_classes: 1234" in page


def test_torn_lines_null_losses_and_repeated_steps_do_no_harm(run):
    with (run / "metrics.jsonl").open("a") as file:
        for line in ({"step": 2000, "loss": 7.5, "lr": 0.2}, {"step": 2020, "loss": None, "lr": 0.1}):
            file.write(json.dumps(line) + "\n")
        file.write('{"step": 2040, "lo')
    with (run / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(2000, 0.97)) + "\n" + '{"step": 3000, "se')
    text = visible(report(run))
    assert "97.00 % accuracy on" in text
    assert "95.00 %" not in text
    assert "2,020 steps" in text
    assert "not finite loss" in text


def test_a_step_that_was_evaluated_again_after_a_restart_counts_once(run):
    write_lines(run / "evaluation.jsonl", [evaluation(0, 0.51), evaluation(0, 0.52)])
    text = visible(report(run))
    assert "52.00 % ± 1.25" in text
    assert "51.00 % ±" not in text


def test_all_losses_null(run):
    write_lines(run / "metrics.jsonl", [{"step": step, "loss": None, "lr": 0.1} for step in (1, 2)])
    assert figure_titles(report(run))[0] == "Learning rate"


def test_pairs_or_scores_that_are_gone_are_left_out(run):
    next(run.parent.glob("*.bin")).unlink()
    page = report(run)
    assert "Pictures are left out" in page
    assert figure_titles(page)[-2:] == ["Cosines", "ROC"]
    shutil.rmtree(run / "evaluation")
    assert figure_titles(report(run)) == ["Loss", "Learning rate", "Evaluation", "Speed"]


def test_an_earlier_report_is_replaced_and_nothing_else_is_left(run):
    (run / "report.html").write_text("old")
    before = sorted(run.iterdir())
    assert report(run) != "old"
    assert sorted(run.iterdir()) == before


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run directory: there is no config\.yaml"):
        write_report(tmp_path)
