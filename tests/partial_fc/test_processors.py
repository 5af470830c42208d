"""The head's exactness on other processors than this one: the libraries are told to use fewer abilities.

    python -m tests.partial_fc.test_processors [pytest's arguments]

runs all of the head's tests, or those that the arguments select, under every setting; the test here a few of both.
"""

import itertools
import os
import subprocess
import sys

import pytest

# Which instructions oneDNN may use (bf16 products); which torch's own loops and the compiled passes, where "default",
# the oldest, also has MKL add float32 products in the order of any processor; whether there are compiled passes at all.
VALUES = {
    "ONEDNN_MAX_CPU_ISA": ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX"],
    "ATEN_CPU_CAPABILITY": ["default", "avx2"],
    "PFC_COMPILED": ["1", "0"],
}
FEW = [
    ("AVX2", "avx2", "1"),
    ("AVX512_CORE", "default", "0"),
    ("AVX512_CORE_BF16", "default", "1"),
    ("AVX512_CORE_AMX", "avx2", "0"),
]
"""Every value of every setting at least once."""
FILES = ["tests/partial_fc/test_head.py", "tests/partial_fc/test_head_numbers.py", "tests/partial_fc/test_native.py"]
SELECTED = "test_loss_and and float32 and 1] and (arcface or p2sgrad) or stay_close or keeps_its_digits and 9001"
OF_COMPILED = " or torchs_passes and momentum"
"""Of compiled passes beside torch's: where there are none, torch's alone would be compared with themselves."""


def run(setting: tuple[str, ...], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, as ``setting`` says."""
    chosen = dict(zip(VALUES, setting, strict=True))
    if chosen["ATEN_CPU_CAPABILITY"] == "default":
        chosen["MKL_CBWR"] = "COMPATIBLE"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=os.environ | chosen, capture_output=True, text=True)


@pytest.mark.parametrize("setting", FEW, ids="-".join)
def test_the_head_is_exact_under(setting: tuple[str, ...]) -> None:
    done = run(setting, [*FILES, "-k", SELECTED + (OF_COMPILED if setting[-1] == "1" else "")])
    assert done.returncode == 0, done.stdout[-2000:]


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["tests/partial_fc", "--ignore", __file__]
    failed = 0
    for one in itertools.product(*VALUES.values()):
        outcome = run(one, chosen)
        failed += outcome.returncode != 0
        print(" ".join(one), outcome.stdout.strip().split("\n")[-1], flush=True)
        if outcome.returncode:
            print(outcome.stdout[-3000:])
    sys.exit(failed > 0)
