"""``pfc doctor`` really tries things, and says what to do."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch

from pfc.benchmarks.head import memory
from pfc.launch import doctor
from pfc.launch.cli import main
from pfc.launch.doctor import Check
from pfc.partial_fc.kernels import native, products


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    return {check.name: check for check in doctor.examine()}


def test_it_looks_at_everything(checks: dict[str, Check]):
    names = {
        "pfc",
        "Python",
        "PyTorch",
        "NCCL",
        "cores",
        "memory",
        "bf16 on CPU",
        "disk here",
        "DALI",
        "Triton",
        "gloo",
    }
    assert names <= set(checks)
    assert any(name.startswith(("GPU", "driver")) for name in checks)


def test_decoding_and_communication_work_where_tests_run(checks: dict[str, Check]):
    assert checks["DALI"].status == "ok", checks["DALI"]
    assert "decodes JPEG" in checks["DALI"].found
    assert checks["gloo"].status == "ok", checks["gloo"]
    assert doctor.is_fit(list(checks.values()))


def test_whatever_is_not_ok_comes_with_advice(checks: dict[str, Check]):
    assert all(check.advice for check in checks.values() if check.status != "ok")


@pytest.mark.parametrize("json_too", [False, True])
def test_something_essential_missing_exits_with_1(monkeypatch, capsys: pytest.CaptureFixture[str], json_too: bool):
    missing = Check("DALI", "missing", "not [installed]", "pip install 'pfc[cuda13]'", essential=True)
    monkeypatch.setattr(doctor, "examine", lambda: [Check("pfc", "ok", "0.1.0"), missing])
    assert main(["doctor", *(["--json"] if json_too else [])]) == 1
    out = capsys.readouterr().out
    assert "not [installed]" in out
    assert "pip install 'pfc[cuda13]'" in out
    if json_too:
        assert json.loads(out)["ok"] is False


def test_a_warning_alone_exits_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "examine", lambda: [Check("GPU", "warning", "none", "fine")])
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_trial_that_fails_tells_its_last_line():
    check = doctor._trial("DALI", "no-such-probe", "2.4.0", "reinstall it", essential=True)
    assert (check.status, check.essential, check.advice) == ("missing", True, "reinstall it")
    assert "KeyError" in check.found


def test_a_package_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_package_version", lambda _: None)
    assert doctor._dali().status == "missing"
    assert "pip install 'pfc[cuda1" in doctor._dali().advice
    assert not doctor.is_fit([doctor._dali()])
    assert doctor._triton().status == "warning"


def test_both_dalis_at_once_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_package_version", lambda _: "2.4.0")
    check = doctor._dali()
    assert check.status == "warning"
    assert "pip uninstall nvidia-dali-cuda130 nvidia-dali-cuda120" in check.advice


@pytest.mark.parametrize(("rounds", "told"), [(True, "in bfloat16"), (False, "in float32 all the same")])
def test_bf16_on_a_cpu_is_measured(rounds: bool, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda device: rounds)
    assert f"the head's are made {told}" in doctor._bf16_on_cpu().found


def test_compiled_passes_that_were_turned_off_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PFC_COMPILED", "0")
    monkeypatch.setattr(native, "passes", native.passes.__wrapped__)
    assert native.passes() is None
    assert "PFC_COMPILED" in doctor._compiled_passes().found


def test_gpus_are_named_with_what_they_can_do(monkeypatch: pytest.MonkeyPatch):
    cards = {0: ("NVIDIA T4", 15, 7, 5), 1: ("NVIDIA H100", 79, 9, 0)}

    def properties(device: int) -> SimpleNamespace:
        name, gib, major, minor = cards[device]
        return SimpleNamespace(name=name, total_memory=gib * doctor.GIB, major=major, minor=minor)

    for name in ("get_device_properties", "mem_get_info"):  # real functions of one device
        inspect.signature(getattr(torch.cuda, name)).bind(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * (device + 1), 9000))
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    driver, old, new = doctor._devices()
    assert (driver.status, driver.found) == ("ok", "580.1")
    assert (old.status, old.found) == ("warning", "NVIDIA T4, 15 GiB, compute 7.5")
    assert (new.status, new.found) == ("ok", "NVIDIA H100, 79 GiB, compute 9.0")
    assert memory.bytes_free() == 3000
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert doctor._nccl().status == "missing"
