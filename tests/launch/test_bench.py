import json
from pathlib import Path

import pytest

from pfc.launch.cli import main

SMALL = ["--classes", "300", "--dim", "16", "--batch", "8", "--steps", "2"]


def test_head_beside_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "head.json"
    assert main(["bench", "head", *SMALL, "--rate", "1.0", "--rate", "0.5", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["head", "dense", "pfc", "pfc"]
    figures = json.loads(file.read_text())
    assert [(figure["head"], figure["rate"]) for figure in figures] == [("dense", 1.0), ("pfc", 1.0), ("pfc", 0.5)]
    assert all(0 < figure["min_s"] <= figure["median_s"] <= figure["max_s"] for figure in figures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "7"], "--batch 7 does not divide into 2 ranks"),
        (["--precision", "fp8"], "--precision fp8: float32 or bf16"),
        (["--peer", "nowhere"], "--peer nowhere: no partial_fc_v2.py there"),
        (["--rate", "2"], "--rate 2.0: must lie in (0, 1]"),
    ],
)
def test_wrong_use(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "head", *options]) == 2
    assert message in capsys.readouterr().err
