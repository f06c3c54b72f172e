"""What stands in cluster/ is what Ray, Kubernetes and KubeRay accept, and it runs jobs/nightly.yaml."""

from __future__ import annotations

import copy
import itertools
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import yaml
from jsonschema import ValidationError as SchemaError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from ltx_batch.job import load_job

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = ("ray-up", "ray-up-hosts")
KUBERNETES = "1.37"
RAY_DRAIN_S = 30  # RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, ray/_private/ray_constants.py


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Auth(_Strict):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(_Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Annotated[int, Field(gt=0)]


class HeadGroup(_Strict):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(gt=0)]


class RayCluster(_Strict):
    rayVersion: str
    authOptions: Auth
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(_Strict):
    """The fields of KubeRay 1.6's RayJobSpec that we use (ray-operator/apis/ray/v1/rayjob_types.go)."""

    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    entrypoint: str
    runtimeEnvYAML: str
    backoffLimit: Annotated[int, Field(ge=0)]
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    rayClusterSpec: RayCluster


class RayJob(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: RayJobSpec


def _text(name: str) -> str:
    return (CLUSTER / name).read_text()


def _ray_job() -> dict[str, Any]:
    return yaml.safe_load(_text("kubernetes/rayjob.yaml"))


def _cron_documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(_text("kubernetes/cronjob.yaml"))}


def _groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def _as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", **template.get("metadata", {})},
        "spec": template["spec"],
    }


def _check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _check_ray_up(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"constraints.txt does not pin {package}"
    return found[1]


def test_ray_job_is_a_ray_job() -> None:
    RayJob.model_validate(_ray_job())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backoffLimit: 2", "backofLimit: 2"),
        ("submissionMode: K8sJobMode", "submissionMode: K8SJobMode"),
        ('num-cpus: "0"', "num-cpus: 0"),
        ("maxReplicas: 8", "maxReplica: 8"),
        ("mode: token", "mode: tokens"),
        ("ray.io/v1", "ray.io/v1alpha2"),
    ],
)
def test_typo_in_the_ray_job_is_caught(old: str, new: str) -> None:
    text = _text("kubernetes/rayjob.yaml")
    assert old in text
    with pytest.raises(ValidationError):
        RayJob.model_validate(yaml.safe_load(text.replace(old, new)))


@pytest.mark.parametrize("group", ["head", "gpu-spot"])
def test_pod_templates_are_pods(group: str) -> None:
    _check_kubernetes(_as_pod(_groups(_ray_job())[group]["template"]))


@pytest.mark.parametrize("group", ["head", "gpu-spot"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("resources:", "resource:"),
        ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 1m"),
        ("mountPath:", "path:"),
    ],
)
def test_typo_in_a_pod_template_is_caught(group: str, old: str, new: str) -> None:
    text = _text("kubernetes/rayjob.yaml")
    assert old in text
    pod = _as_pod(_groups(yaml.safe_load(text.replace(old, new)))[group]["template"])
    with pytest.raises(kubernetes_validate.ValidationError):
        _check_kubernetes(pod)


def test_ray_job_runs_from_the_image_and_from_zero() -> None:
    job = _ray_job()["spec"]
    workdir = re.search(r"^WORKDIR (\S+)$", _text("Containerfile"), re.MULTILINE)
    assert workdir is not None
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"working_dir": workdir[1]}
    head, workers = _groups({"spec": job}).values()
    assert head["rayStartParams"]["num-cpus"] == "0", "actors stay off the driver's machine"
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0), "no GPU is paid for before the manifest is read"


def test_ray_job_has_room_for_the_nightly_actors() -> None:
    job = load_job(ROOT / "jobs" / "nightly.yaml")
    workers = _groups(_ray_job())["gpu-spot"]
    assert isinstance(job.workers, int)
    assert workers["maxReplicas"] >= job.workers
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) >= (job.worker.num_gpus or 0)
    assert int(limits["cpu"]) >= job.worker.num_cpus


def test_spot_workers_and_a_head_that_is_not() -> None:
    job = _ray_job()
    head, workers = (_groups(job)[name]["template"]["spec"] for name in ("head", "gpu-spot"))
    [term] = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    kept_off = {rule["key"]: rule["values"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"}
    preferred = workers["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    wanted = {rule["key"]: rule["values"] for entry in preferred for rule in entry["preference"]["matchExpressions"]}
    assert kept_off == wanted
    assert "tolerations" not in head
    assert {toleration["key"] for toleration in workers["tolerations"]} >= {
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
    }


def test_pods_have_time_to_drain() -> None:
    job = _ray_job()
    for group in _groups(job).values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > RAY_DRAIN_S
    head = _groups(job)["head"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in head["containers"][0]["env"]}
    assert 3 < int(env["RAY_JOB_STOP_WAIT_TIME_S"]) < head["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("kind", ["ServiceAccount", "Role", "RoleBinding", "CronJob"])
def test_cron_documents_are_valid(kind: str) -> None:
    _check_kubernetes(_cron_documents()[kind])


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("CronJob", "concurrencyPolicy: Forbid", "concurencyPolicy: Forbid"),
        ("CronJob", "concurrencyPolicy: Forbid", "concurrencyPolicy: false"),
        ("CronJob", "containers:", "container:"),
        ("Role", "verbs:", "verb:"),
        ("RoleBinding", "roleRef:", "role:"),
    ],
)
def test_typo_in_the_cron_documents_is_caught(kind: str, old: str, new: str) -> None:
    text = _text("kubernetes/cronjob.yaml")
    assert old in text
    documents = {document["kind"]: document for document in yaml.safe_load_all(text.replace(old, new))}
    with pytest.raises(kubernetes_validate.ValidationError):
        _check_kubernetes(documents[kind])


def test_cron_job_starts_the_ray_job_and_may() -> None:
    documents = _cron_documents()
    cron, role = documents["CronJob"], documents["Role"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [script] = container["args"]
    name = _ray_job()["metadata"]["name"]
    verbs = re.findall(r"kubectl (\w+) (?:rayjob (\S+))?", script)
    assert {verb for verb, _ in verbs} <= set(role["rules"][0]["verbs"])
    assert {target for _, target in verbs if target} == {name}
    [mount] = container["volumeMounts"]
    assert f"{mount['mountPath']}/rayjob.yaml" in script
    [volume] = pod["volumes"]
    assert f"create configmap {volume['configMap']['name']} --from-file=cluster/kubernetes/rayjob.yaml" in _text(
        "kubernetes/cronjob.yaml"
    )
    assert pod["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
    assert documents["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_accepts_its_file(name: str) -> None:
    prepared = _check_ray_up(yaml.safe_load(_text(f"{name}.yaml")))
    assert prepared["setup_commands"] == [], "the defaults would install a nightly build of Ray"
    assert prepared["file_mounts"], "the token that guards the cluster"


@pytest.mark.parametrize(
    ("name", "old", "new", "error", "says"),
    [
        ("ray-up", "max_workers: 8\nupscaling", "max_worker: 8\nupscaling", SchemaError, "'max_worker' was unexpected"),
        ("ray-up", "head_node_type: head", "head_node_type: haed", ValueError, "head_node_type"),
        ("ray-up", "GPU: 1", "GPU: one", SchemaError, "'one' is not of type 'integer'"),
        ("ray-up", "idle_timeout_minutes: 5", "idle_timeout: 5", SchemaError, "'idle_timeout' was unexpected"),
        (
            "ray-up-hosts",
            "worker_ips: [10.0.0.11, 10.0.0.12]",
            "worker_ips: 10.0.0.11",
            SchemaError,
            "not of type 'array'",
        ),
        ("ray-up-hosts", "ssh_private_key", "ssh_key", SchemaError, "'ssh_key' was unexpected"),
        ("ray-up-hosts", "container_name", "name", AssertionError, "container"),
    ],
)
def test_typo_in_a_ray_up_file_is_caught(name: str, old: str, new: str, error: type[Exception], says: str) -> None:
    text = _text(f"{name}.yaml")
    assert old in text
    with pytest.raises(error, match=says):
        _check_ray_up(yaml.safe_load(text.replace(old, new)))


def test_ray_up_rents_spot_workers_for_an_ordinary_head() -> None:
    types = yaml.safe_load(_text("ray-up.yaml"))["available_node_types"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["head"]["resources"] == {"CPU": 0}
    job = load_job(ROOT / "jobs" / "nightly.yaml")
    assert types["gpu-spot"]["max_workers"] == job.workers


@pytest.mark.parametrize("name", ["kubernetes/rayjob.yaml", *(f"{name}.yaml" for name in RAY_UP)])
def test_every_file_runs_the_nightly_job(name: str) -> None:
    text = _text(name)
    commands = [shlex.split(found) for found in re.findall(r"python submit\.py .*", text)]
    assert commands
    for command in commands:
        assert command[2] == "jobs/nightly.yaml"
        output = command[command.index("--output") + 1]
        sets = [value for option, value in itertools.pairwise(command) if option == "--set"]
        load_job(ROOT / command[2], overrides=[*sets, f"output={output}"])


def test_one_version_of_ray_and_of_the_image() -> None:
    ray = _pinned("ray")
    base = re.search(r"^FROM rayproject/ray:(\S+)-py(\d)(\d+)$", _text("Containerfile"), re.MULTILINE)
    assert base is not None
    assert base[1] == ray
    assert (int(base[2]), int(base[3])) in {(3, 11), (3, 12)}
    assert _ray_job()["spec"]["rayClusterSpec"]["rayVersion"] == ray
    assert f"Ray {ray}" in _text("README.md")
    images = re.findall(
        r"(?:image|-t)[: ]+(ltx-batch:\S+)", "".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file())
    )
    assert len(images) >= 4
    assert set(images) == {"ltx-batch:0.1.0"}


def test_image_holds_no_weights_but_the_demo() -> None:
    text = _text("Containerfile")
    assert not re.search(r"huggingface-cli|hf download|snapshot_download|s3://|wget|curl", text)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"out", ".*"} <= set(ignored)


def test_weights_are_mounted_where_the_job_looks() -> None:
    checkpoint = load_job(ROOT / "jobs" / "nightly.yaml").model.checkpoint
    assert checkpoint is not None
    for group in _groups(_ray_job()).values():
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert any(checkpoint.startswith(mount["mountPath"] + "/") and mount["readOnly"] for mount in mounts)
    for name in RAY_UP:
        options = yaml.safe_load(_text(f"{name}.yaml"))["docker"]["run_options"]
        assert "-v /opt/models:/models:ro" in options
