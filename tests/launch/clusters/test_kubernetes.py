"""The Kubernetes manifests, held against the models of Kubeflow's and Kubernetes' interfaces, and against the image."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from pfc.engine.config import load_config
from pfc.launch import train
from tests.launch.clusters.test_docker import environment, instructions

MANIFESTS = Path(__file__).parents[3] / "launch" / "kubernetes"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text(encoding="utf-8")))


@pytest.fixture
def job() -> dict[str, Any]:
    (job,) = manifests("trainjob.yaml")
    return job


@pytest.fixture
def pod(job: dict[str, Any]) -> dict[str, Any]:
    """What the job makes of its runtime's pod: the only job and container of torch-distributed are called ``node``."""
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["name"] == container["name"] == "node"
    return pod


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    return pod["containers"][0]


def test_the_job_has_the_fields_of_a_train_job_and_no_others(job: dict[str, Any]):
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["kind"] == "TrainJob"
    known = TrainerV1alpha1TrainJob.from_dict(job)
    assert known is not None
    assert known.to_dict() == job  # fields that it does not know would be missing


def test_the_runtime_is_the_one_that_sets_torchrun_up(job: dict[str, Any], container: dict[str, Any]):
    assert job["spec"]["runtimeRef"]["kind"] == "ClusterTrainingRuntime"
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    # Kubeflow refuses a patch that sets variables of this container, and torchrun's own in the trainer.
    assert "env" not in container
    assert not [entry for entry in job["spec"]["trainer"].get("env", []) if entry["name"].startswith("PET_")]


def test_kubernetes_takes_the_pod_and_the_volumes(job: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]):
    trainer = job["spec"]["trainer"]
    whole = container | {
        "image": trainer["image"],
        "command": trainer["command"],
        "args": trainer["args"],
        "resources": trainer["resourcesPerNode"],
    }
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod | {"containers": [whole]}}
    for manifest in (made, *manifests("volumes.yaml")):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_every_mount_is_of_a_volume_and_every_claim_is_made(pod: dict[str, Any], container: dict[str, Any]):
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claimed = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    made = manifests("volumes.yaml")
    assert {claim["claimName"] for claim in claimed} == {claim["metadata"]["name"] for claim in made}
    assert all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in made)  # by the pods of several nodes


def test_the_run_is_written_to_its_claim_and_the_data_is_only_read(
    job: dict[str, Any],
    pod: dict[str, Any],
    container: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    trainer = job["spec"]["trainer"]
    assert trainer["command"][-2:] == ["-m", "pfc.launch.train"]
    monkeypatch.setattr("sys.argv", ["train", *trainer["args"]])
    arguments = train._parse_arguments()
    assert arguments.resume == "auto"

    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert Path(arguments.config).parent == Path(mounts["configs"]["mountPath"])
    (tmp_path / "config.yaml").write_text("{data: {train: set}, schedule: {steps: 1}}")
    config = load_config(tmp_path / "config.yaml", arguments.overrides)
    assert config.run.dir == mounts["runs"]["mountPath"]
    assert not mounts["runs"].get("readOnly")
    assert str(config.data.train).startswith(mounts["data"]["mountPath"] + "/")
    assert mounts["data"]["readOnly"]
    assert volumes["data"]["persistentVolumeClaim"]["readOnly"]


def test_shared_memory_is_memory_and_counted(job: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]):
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (shared,) = [volume for volume in pod["volumes"] if volume["name"] == mounts["/dev/shm"]]
    assert shared["emptyDir"]["medium"] == "Memory"
    limit = job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"]
    assert int(shared["emptyDir"]["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi")) / 4


def test_the_pod_runs_as_the_image_s_plain_user(pod: dict[str, Any], container: dict[str, Any]):
    (user,) = [value for name, value in instructions() if name == "USER"]
    security = pod["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert security["runAsNonRoot"]
    assert security["fsGroup"] == security["runAsGroup"]  # so that it may write the runs' volume
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    # The image writes nothing but its home, which is mounted.
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert environment()["HOME"] in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_a_stopped_pod_has_the_time_that_its_ranks_have(pod: dict[str, Any]):
    assert pod["terminationGracePeriodSeconds"] > int(environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
