"""The files in deploy/kubernetes/: rendered by kustomize, held against schemas, and their command lines run.

kubectl and Kubernetes' schemas come with the environment. The schemas of MPIJob and JobSet, which are no part of
Kubernetes, are beside this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from bnworker.train.checkpoint import read
from support.datasets import write
from support.service import daemon

_FILES = Path(__file__).parents[2] / "deploy" / "kubernetes"
_VERSION = "1.36"
_OVERLAYS = ("service", "indexed-job", "jobset", "mpijob")
_SCHEMAS = {"MPIJob": "mpijob-v2beta1.json", "JobSet": "jobset-v1alpha2.json"}

Resource = dict[str, Any]


@pytest.mark.parametrize("overlay", _OVERLAYS)
def test_an_overlay_is_valid(overlay: str) -> None:
    """Every resource, and every template in it, has the fields and types that the cluster asks for, and no other."""
    for resource in _rendered(overlay):
        _validate(resource)
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "bnlayer"


@pytest.mark.parametrize(
    ("overlay", "kind", "right", "wrong"),
    [
        ("service", "StatefulSet", "readinessProbe", "readynessProbe"),
        ("service", "PodDisruptionBudget", "minAvailable: 1", "minAvailable: {}"),
        ("indexed-job", "Job", "completionMode", "completionsMode"),
        ("jobset", "JobSet", "action: FailJobSet", "action: Fail"),
        ("jobset", "JobSet", "maxRestarts", "restarts"),
        ("jobset", "JobSet", "backoffLimit: 0", "backoffLimit: none"),
        ("mpijob", "MPIJob", "slotsPerWorker: 2", "slotsPerWorker: two"),
        ("mpijob", "MPIJob", "mpiImplementation: MPICH", "mpiImplementation: Mpich"),
        ("mpijob", "MPIJob", "volumeMounts", "mounts"),
    ],
)
def test_validation_notices_a_mistake(overlay: str, kind: str, right: str, wrong: str) -> None:
    """The check above can fail, for each schema, and within the templates."""
    text = yaml.safe_dump(_one(overlay, kind))
    assert right in text
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        _validate(yaml.safe_load(text.replace(right, wrong, 1)))


@pytest.mark.parametrize("overlay", _OVERLAYS)
def test_pods_keep_the_restricted_profile(overlay: str) -> None:
    """The namespace enforces it: a pod that asks for more would be refused when it is made, not when it is applied."""
    rendered = _rendered(overlay)
    (namespace,) = (each for each in rendered if each["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = [pod for resource in rendered for pod in _pods(resource)]
    assert pods
    for pod in pods:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
            assert context["readOnlyRootFilesystem"] is True


def test_only_ranks_may_connect() -> None:
    """Service, budget and policy select the service's pod; the policy admits the ranks, to its one port."""
    (pod,) = _pods(_one("service", "StatefulSet"))
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    for kind, path in (("Service", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        selector = _one("service", kind)["spec"][path]
        assert _selects(selector.get("matchLabels", selector), pod), kind
    (rule,) = _one("service", "NetworkPolicy")["spec"]["ingress"]
    assert [each["port"] for each in rule["ports"]] == [port["containerPort"]]
    assert [each["port"] for each in _one("service", "Service")["spec"]["ports"]] == [port["containerPort"]]
    assert f"--listen=0.0.0.0:{port['containerPort']}" in container["args"]
    for overlay, kind in (("indexed-job", "Job"), ("jobset", "JobSet")):
        (rank,) = _pods(_one(overlay, kind))
        assert [_selects(each["podSelector"]["matchLabels"], rank) for each in rule["from"]] == [True]
        assert _environment(rank)["BNLAYER_ADDRESS"] == f"bnlayer:{port['containerPort']}"
    policy = _one("mpijob", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert all(_selects(policy, pod) for pod in _pods(_one("mpijob", "MPIJob")))


def test_all_fields_agree_on_the_number_of_ranks() -> None:
    """In the two or three places in which each kind of job needs it."""
    job = _one("indexed-job", "Job")["spec"]
    (replicated,) = _one("jobset", "JobSet")["spec"]["replicatedJobs"]
    for spec in (job, replicated["template"]["spec"]):
        ranks = _environment(spec["template"])["BNLAYER_WORLD_SIZE"]
        assert [ranks] * 2 == [str(spec["completions"]), str(spec["parallelism"])]
    assert replicated["replicas"] == 1
    spec = _one("mpijob", "MPIJob")["spec"]
    (launcher,) = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    assert launcher["command"][:2] == ["mpiexec", "-n"]
    assert int(launcher["command"][2]) == spec["mpiReplicaSpecs"]["Worker"]["replicas"] * spec["slotsPerWorker"]


def test_job_and_jobset_run_the_same_pods() -> None:
    """They differ in the label that names the job alone: what is mended in one must be in the other."""
    (one,), (other,) = _pods(_one("indexed-job", "Job")), _pods(_one("jobset", "JobSet"))
    text = json.dumps(one).replace("batch.kubernetes.io/job-name", "jobset.sigs.k8s.io/jobset-name")
    assert json.loads(text) == other


def test_exit_codes_mean_what_they_say() -> None:
    """75, stopped with a checkpoint, is never counted; 2, a wrong option, is never repeated."""
    rules = _one("indexed-job", "Job")["spec"]["podFailurePolicy"]["rules"]
    assert {
        (rule["action"], code) for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
    } == {
        ("Ignore", 75),
        ("FailJob", 2),
    }
    spec = _one("jobset", "JobSet")["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 75]
    (rank,) = _pods(_one("jobset", "JobSet"))
    name = rule["onExitCodes"]["containerName"]
    assert [each["name"] for each in rank["spec"]["containers"]] == [name]
    for code, action in ((75, "RestartJobSetAndIgnoreMaxRestarts"), (2, "FailJobSet")):
        said = f"Container {name} for pod bnlayer/p failed with exit code {code} matching FailJob rule at index 0"
        assert _first_rule(spec["failurePolicy"]["rules"], "PodFailurePolicy", said) == action
    assert _first_rule(spec["failurePolicy"]["rules"], "BackoffLimitExceeded", "") is None  # restarted, and counted


@pytest.mark.parametrize("overlay", _OVERLAYS[1:])
def test_claims_for_one_node(overlay: str, tmp_path: Path) -> None:
    """With the component for clusters of one node, checkpoints ask for a volume that such a cluster has."""
    assert _one(overlay, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    text = (_FILES / overlay / "kustomization.yaml").read_text()
    assert "  # - ../single-node\n" in text
    _copied(overlay, text.replace("  # - ../single-node\n", "  - ../single-node\n"), tmp_path)
    (claim,) = (each for each in _render(tmp_path / overlay) if each["kind"] == "PersistentVolumeClaim")
    _validate(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


@pytest.mark.rpc
@pytest.mark.slow
def test_the_job_trains(tmp_path: Path) -> None:
    """The ranks' command lines and variables, over a service with that of the StatefulSet, on this machine."""
    (service,) = _pods(_one("service", "StatefulSet"))
    given = service["spec"]["containers"][0]["args"]
    assert given[0] == "serve"
    moved = {"--listen=0.0.0.0:50551": None, "--state-dir=/var/lib/bnlayer": f"--state-dir={tmp_path}/state"}
    arguments = [changed for word in given[1:] if (changed := moved.get(word, word)) is not None]
    assert len(arguments) == len(given) - 2

    (rank,) = _pods(_one("indexed-job", "Job"))
    (container,) = rank["spec"]["containers"]
    write(tmp_path / "data", [64])
    replacements = {
        "/data/digits.npz": f"{tmp_path}/data/0.npz",
        "/checkpoints": str(tmp_path),
        "$(BNLAYER_JOB)": "train",
    }
    command = container["args"]
    for mounted, local in replacements.items():
        assert any(mounted in word for word in command), mounted
        command = [word.replace(mounted, local) for word in command]
    announced = {name: value for name, value in _environment(rank).items() if value is not None}
    ranks = int(announced["BNLAYER_WORLD_SIZE"])
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")},
        **announced,
        "BNLAYER_JOB": "train",
        "BNLAYER_KERNELS": "reference",
    }
    with daemon(*arguments) as address, ThreadPoolExecutor(ranks) as threads:
        done = list(
            threads.map(
                lambda number: subprocess.run(
                    [sys.executable, "-m", "bnworker.cli", *command],
                    env={**environ, "BNLAYER_ADDRESS": address, "BNLAYER_RANK": str(number)},
                    capture_output=True,
                    text=True,
                    timeout=200,
                    check=False,
                ),
                range(ranks),
            )
        )
    assert [each.returncode for each in done] == [0] * ranks, [each.stderr for each in done]
    assert json.loads((tmp_path / "train.json").read_text())["world_size"] == ranks
    saved = read(tmp_path / "train.safetensors")
    assert saved is not None
    assert len(saved.progress.epochs) == 20


# ---- reading the files ----


@cache
def _rendered(overlay: str) -> list[Resource]:
    return _render(_FILES / overlay)


def _render(folder: Path) -> list[Resource]:
    done = subprocess.run(
        [Path(sys.executable).with_name("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr  # a warning names what is deprecated
    return list(yaml.safe_load_all(done.stdout))


def _copied(overlay: str, kustomization: str, folder: Path) -> None:
    """All files in another folder, where one overlay has another kustomization."""
    for path in _FILES.rglob("*.yaml"):
        copy = folder / path.relative_to(_FILES)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (folder / overlay / "kustomization.yaml").write_text(kustomization)


def _one(overlay: str, kind: str) -> Resource:
    (resource,) = (candidate for candidate in _rendered(overlay) if candidate["kind"] == kind)
    return resource


def _validate(resource: Resource) -> None:
    schema = _SCHEMAS.get(resource["kind"])
    if schema is None:
        kubernetes_validate.validate(resource, _VERSION, strict=True)
        return
    text = (Path(__file__).parent / "schemas" / schema).read_text(encoding="utf-8")
    jsonschema.validate(resource, json.loads(text))
    for replicated in resource["spec"].get("replicatedJobs", []):
        _validate({"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]})
    for replicas in resource["spec"].get("mpiReplicaSpecs", {}).values():
        _validate({"apiVersion": "v1", "kind": "Pod", **replicas["template"]})


def _pods(resource: Resource) -> list[Resource]:
    """The pod templates of a resource, however deep."""
    return list(_templates(resource["spec"])) if "spec" in resource else []


def _templates(spec: Any) -> Iterator[Resource]:
    if isinstance(spec, list):
        for each in spec:
            yield from _templates(each)
    elif isinstance(spec, dict):
        if "containers" in spec.get("spec", {}):
            yield spec
        else:
            yield from _templates(list(spec.values()))


def _environment(pod: Resource) -> dict[str, str | None]:
    (container,) = pod["spec"]["containers"]
    return {each["name"]: each.get("value") for each in container["env"]}


def _selects(labels: dict[str, str], pod: Resource) -> bool:
    return all(pod["metadata"]["labels"].get(name) == value for name, value in labels.items())


def _first_rule(rules: list[dict[str, Any]], reason: str, message: str) -> str | None:
    """What JobSet does, by its rules: reason and message must both match, where they are asked for."""
    for rule in rules:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return None
