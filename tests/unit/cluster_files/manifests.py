"""Reads the manifests, and finds what neither a schema nor the API server does: what KubeRay's operator refuses.

The rules are those of controllers/ray/utils/validation.go of KubeRay 1.7 that could concern our files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMAS = ROOT / ".." / "shared" / "kuberay"
FILES = ("raycluster.yaml", "rayjob.yaml")
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / file).read_text()))


def ray_document(file: str) -> dict[str, Any]:
    return next(document for document in documents(file) if document["apiVersion"].startswith("ray.io/"))


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"].get("rayClusterSpec", document["spec"])


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(document)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of head, workers and a job's submitter."""
    yield from (group["template"] for group in groups(document))
    if "submitterPodTemplate" in document["spec"]:
        yield document["spec"]["submitterPodTemplate"]


def size(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\D*)", quantity).groups()
    return int(number) * UNITS[unit]


def complaints_of_the_crd(document: dict[str, Any]) -> list[jsonschema.ValidationError]:
    """What the API server would refuse, or drop without a word; skips where the schemas are not at hand."""
    schema = (
        SCHEMAS / {"RayCluster": "rayclusters.v1.schema.json", "RayJob": "rayjobs.v1.schema.json"}[document["kind"]]
    )
    if not schema.exists():
        pytest.skip(f"needs shared/kuberay/{schema.name} beside the checkout")
    return list(jsonschema.Draft7Validator(json.loads(schema.read_text())).iter_errors(document))


def refusals(document: dict[str, Any]) -> list[str]:
    """What the operator would refuse, each in a sentence."""
    return [*_of_names(document), *_of_cluster(cluster_spec(document)), *_of_job(document)]


def _of_names(document: dict[str, Any]) -> Iterator[str]:
    longest = 47 if document["kind"] == "RayJob" else 63 - len("-head-svc")
    name = document["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
        yield f"the name {name!r} is no DNS label of at most {longest} characters"
    names = [group["groupName"] for group in cluster_spec(document)["workerGroupSpecs"]]
    if len(set(names)) != len(names):
        yield "two worker groups have one name"


def _of_cluster(spec: dict[str, Any]) -> Iterator[str]:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        parameters = group["rayStartParams"]
        if "labels" in parameters:
            yield "rayStartParams.labels is refused"
        if group.get("resources") and set(parameters) & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield "a group's resources and those of rayStartParams exclude each other"
        if not all(isinstance(value, str) for value in parameters.values()):
            yield "rayStartParams are strings"
        template = group["template"]["spec"]
        if (
            spec.get("autoscalerOptions", {}).get("version") == "v2"
            and template.get("restartPolicy", "Never") != "Never"
        ):
            yield "autoscaler v2 wants restartPolicy Never"
        for variable in template["containers"][0].get("env", []):
            if variable["name"] in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
                yield "Redis is told by gcsFaultToleranceOptions only"
    for group in spec["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield "replicas lie outside of minReplicas and maxReplicas"
        if group.get("idleTimeoutSeconds") and spec.get("autoscalerOptions", {}).get("version") != "v2":
            yield "a group's idleTimeoutSeconds wants autoscaler v2"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = spec.get("rayVersion")
        if not isinstance(version, str) or tuple(map(int, version.split("."))) < (2, 52, 0):
            yield "token authentication wants a rayVersion of 2.52.0 or newer, as a string"


def _of_job(document: dict[str, Any]) -> Iterator[str]:
    if document["kind"] != "RayJob":
        return
    spec = document["spec"]
    ends = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not ends:
        yield "suspend wants shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished wants shutdownAfterJobFinishes"
    if spec.get("deletionStrategy", {}).get("deletionRules") and (ends or spec.get("ttlSecondsAfterFinished")):
        yield "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    alone = {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec)
    if spec.get("submissionMode") == "SidecarMode" and alone:
        yield f"SidecarMode excludes {', '.join(sorted(alone))}"
    if cluster_spec(document).get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "a RayJob's cluster cannot use Kubernetes' tokens"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"
