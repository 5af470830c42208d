"""``pfc bench search`` at a tiny size."""

import json
from pathlib import Path

from pfc.launch.cli import main
from tests.launch.test_cli import assert_wrong_use


def test_every_line_has_a_time_and_a_ratio(tmp_path: Path, capsys):
    file = tmp_path / "search.json"
    sizes = ["--gallery", "3000", "--probes", "70", "--dim", "16", "--memory", "1"]
    assert main(["bench", "search", *sizes, "--json", str(file)]) == 0
    lines = json.loads(file.read_text())["lines"]
    assert [line["what"] for line in lines[:3]] == ["products alone", "ranks of the mates, best others", "nearest 10"]
    assert lines[0]["ratio"] == 1
    assert all(line["seconds"] > 0 and line["ratio"] > 0 for line in lines)
    assert "x products" in capsys.readouterr().out


def test_more_probes_than_rows_are_refused(capsys):
    assert_wrong_use(capsys, ["bench", "search", "--gallery", "5", "--probes", "6"], "a mate of its own")
