"""KubeRay's manifests: their schemas, what the operator checks besides, and what makes them safe to apply."""

import copy
from pathlib import Path

import pytest
import yaml
from manifests import (
    FILES,
    cluster_spec,
    complaints_of_the_crd,
    documents,
    groups,
    pod_templates,
    ray_document,
    refusals,
    size,
)

from laasp_ray import __version__

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = "1.37"
by_file = pytest.mark.parametrize("file", FILES)


def check_with_kubernetes(document):
    library = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    library.validate(document, KUBERNETES, strict=True)


def as_pod(template):
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", **template["metadata"]},
        "spec": template["spec"],
    }


def changed(document, path, value):
    """A copy with the value at a dotted path replaced, or made anew; numbers are places in a list."""
    result = copy.deepcopy(document)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    place = result
    for part in parents:
        place = place[part]
    place[last] = value
    return result


@by_file
def test_ray_s_kinds_have_the_schema_of_the_operator(file):
    assert complaints_of_the_crd(ray_document(file)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/autoscalerOptions/version", "v3"),
        ("spec/headGroupSpec/template/spec/containers/0/securityContext/allowPrivilegeEscalatoin", False),
        ("spec/workerGroupSpecs/0/replicas", "1"),
        ("spec/workerGroupSpecs/0/template/spec/volumes/1/emptyDir/sizeLimit", "8 GB"),
    ],
)
def test_that_schema_finds_what_is_wrong(path, value):
    assert complaints_of_the_crd(changed(ray_document("raycluster.yaml"), path, value)) != []


@by_file
def test_all_else_has_the_schema_of_kubernetes(file):
    others = [document for document in documents(file) if not document["apiVersion"].startswith("ray.io/")]
    assert [document["kind"] for document in others] == ["ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"]
    for document in others:
        check_with_kubernetes(document)


@by_file
def test_pods_have_the_schema_of_kubernetes(file):
    pods = [as_pod(template) for template in pod_templates(ray_document(file))]
    for pod in pods:
        check_with_kubernetes(pod)
    with pytest.raises(Exception, match="allowPrivilegeEscalatoin"):
        check_with_kubernetes(changed(pods[0], "spec/containers/0/securityContext/allowPrivilegeEscalatoin", False))


@by_file
def test_the_operator_refuses_nothing(file):
    assert refusals(ray_document(file)) == []


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("metadata/name", "Laasp_resnet50", "DNS label"),
        ("metadata/name", "l" * 48, "at most 47"),
        ("spec/ttlSecondsAfterFinished", 600, "wants shutdownAfterJobFinishes"),
        ("spec/suspend", True, "suspend wants"),
        ("spec/submissionMode", "SidecarMode", "excludes submitterConfig, submitterPodTemplate"),
        ("spec/runtimeEnvYAML", "env_vars", "no mapping"),
        ("spec/rayClusterSpec/rayVersion", 2.6, "as a string"),
        ("spec/rayClusterSpec/rayVersion", "2.51.1", "2.52.0 or newer"),
        ("spec/rayClusterSpec/authOptions/enableK8sTokenAuth", True, "Kubernetes' tokens"),
        ("spec/rayClusterSpec/headGroupSpec/rayStartParams/labels", "a=b", "labels is refused"),
        ("spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0, "strings"),
        ("spec/rayClusterSpec/headGroupSpec/resources", {"CPU": "0"}, "exclude each other"),
        ("spec/rayClusterSpec/headGroupSpec/template/spec/restartPolicy", "Always", "restartPolicy Never"),
        (
            "spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/env",
            [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}],
            "gcsFaultToleranceOptions only",
        ),
        ("spec/rayClusterSpec/workerGroupSpecs/0/replicas", 9, "outside of minReplicas"),
    ],
)
def test_what_the_operator_refuses_is_found(path, value, sentence):
    job = ray_document("rayjob.yaml")
    if "shutdownAfterJobFinishes" in sentence or "suspend" in sentence:
        job["spec"]["shutdownAfterJobFinishes"] = False
    assert any(sentence in refusal for refusal in refusals(changed(job, path, value)))


@by_file
def test_the_token_is_on_and_the_head_takes_no_tasks(file):
    spec = cluster_spec(ray_document(file))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"


@by_file
def test_no_pod_is_root_or_may_become_it(file):
    document = ray_document(file)
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert cluster_spec(document)["autoscalerOptions"]["securityContext"] == confined
    for template in pod_templates(document):
        pod = template["spec"]["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["fsGroup"]) == (True, 1000, 1000)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert [one["securityContext"] for one in template["spec"]["containers"]] == [confined]


@by_file
def test_data_is_read_only_and_shared_memory_holds_the_object_store(file):
    for group in groups(ray_document(file)):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/data"]["readOnly"]
        assert volumes[mounts["/data"]["name"]]["persistentVolumeClaim"]["readOnly"]
        shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
        memory = size(container["resources"]["limits"]["memory"])
        assert shared["medium"] == "Memory"
        assert 0.3 * memory <= size(shared["sizeLimit"]) <= 0.5 * memory


@by_file
def test_workers_have_gpus_and_there_is_one_when_a_run_begins(file):
    for group in cluster_spec(ray_document(file))["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert int(resources["limits"]["nvidia.com/gpu"]) >= 1
        assert 1 <= group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


@by_file
def test_only_the_cluster_s_own_pods_and_the_operator_get_in(file):
    policy = next(document for document in documents(file) if document["kind"] == "NetworkPolicy")["spec"]
    own = policy["podSelector"]["matchLabels"]
    for template in pod_templates(ray_document(file)):
        assert own.items() <= template["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    among_themselves, of_the_operator = policy["ingress"]
    assert among_themselves == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert of_the_operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (source,) = of_the_operator["from"]
    assert source["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


@by_file
def test_the_head_is_not_evicted_and_no_other_file_s_head_counts_for_it(file):
    budget = next(document for document in documents(file) if document["kind"] == "PodDisruptionBudget")["spec"]
    selected = budget["selector"]["matchLabels"]
    head = cluster_spec(ray_document(file))["headGroupSpec"]["template"]["metadata"]["labels"]
    assert budget["minAvailable"] == 1
    assert selected.pop("ray.io/node-type") == "head"  # a label that the operator sets
    assert selected.items() <= head.items()
    others = [name for name in FILES if name != file]
    assert all(
        not selected.items() <= template["metadata"]["labels"].items()
        for name in others
        for template in pod_templates(ray_document(name))
    )


@by_file
def test_image_and_ray_are_those_of_the_project(file):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    document = ray_document(file)
    assert cluster_spec(document)["rayVersion"] == pins["ray"]
    images = {template["spec"]["containers"][0]["image"] for template in pod_templates(document)}
    assert images == {f"registry.example/laasp_ray:{__version__}"}


def test_a_job_runs_the_image_s_code_and_has_time_to_stop():
    spec = ray_document("rayjob.yaml")["spec"]
    script = spec["entrypoint"].split()[1]
    assert (ROOT / script.removeprefix("/opt/laasp_ray/")).is_file()
    assert "COPY jobs /opt/laasp_ray/jobs" in (ROOT / "cluster" / "Dockerfile").read_text()
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
