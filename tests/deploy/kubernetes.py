"""Renders deploy/kubernetes and checks the result against Kubernetes' schemas and our own claims.

    python3 tests/deploy/kubernetes.py --packages FOLDER    # with kubernetes-validate in it, as `make test-kubernetes` does

Needs kubectl or kustomize on the PATH, and no cluster. Exit code 0: all claims hold; 1: one does not; 2: it cannot be run.
Each claim is also shown manifests in which it is broken, and must notice: a check that cannot fail is none.
"""

import argparse
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "deploy/kubernetes/overlays"
VERSION = "1.32"
LIMIT_SECONDS = 60
COMPONENT = "app.kubernetes.io/component"
# Variant tested besides the overlays: one of them with a component, and its job.
VARIANTS = {
    "cpu with object-store": """
resources: [{overlays}/cpu]
components: [{overlays}/../components/object-store]
configMapGenerator:
  - {{name: ganglion-job, namespace: ganglion, behavior: merge, files: [job.toml]}}
""",
}
VARIANT_JOB = """
[job]
name = "variant"
steps = 10
[checkpoint]
url = "s3://bucket/run"
"""
# Made by hand or by cert-manager; docs/kubernetes.md says how.
SECRETS = {"ganglion-join-token", "ganglion-coordinator-tls", "ganglion-worker-tls"}
# Of the kinds in use, those that the restricted profile allows.
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
# Length of a lease in failure deadlines: membership/src/limits.rs.
LEASE = 12
# Additional time of a drain, for the storage.
SPARE_SECONDS = 30


class Rendered:
    """The objects of an overlay, by kind and name."""

    def __init__(self, overlay, objects):
        self.overlay = overlay.split()[0]
        self.objects = objects

    def of(self, kind):
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind, name):
        found = [item for item in self.of(kind) if item["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} objects {kind}/{name}"
        return found[0]

    def set(self, component):
        return self.one("StatefulSet", f"ganglion-{component}")

    def pod(self, component):
        return self.set(component)["spec"]["template"]

    def container(self, component):
        return self.pod(component)["spec"]["containers"][0]

    def pods(self):
        return [item["spec"]["template"] for item in self.of("StatefulSet")]

    def containers(self):
        for pod in self.pods():
            yield from ((pod, container) for container in pod["spec"].get("initContainers", []))
            yield from ((pod, container) for container in pod["spec"]["containers"])

    def job(self):
        maps = [item for item in self.of("ConfigMap") if "job.toml" in item["data"]]
        assert len(maps) == 1, "there is one job"
        return tomllib.loads(maps[0]["data"]["job.toml"])


def selects(selector, pod):
    assert set(selector) <= {"matchLabels"}, "a selector that this check does not understand"
    labels = pod["metadata"]["labels"].items()
    return selector.get("matchLabels", {}).items() <= labels


def environment(container):
    return {item["name"]: item.get("value") for item in container.get("env", [])}


# ---- Claims ----------------------------------------------------------------------------------------------------------


def pods_keep_the_restricted_profile(rendered):
    namespace = rendered.one("Namespace", "ganglion")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted", "the namespace does not ask for it"
    for pod in rendered.pods():
        spec, context = pod["spec"], pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == context["fsGroup"] == 10001, "another user"
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, "no seccomp profile"
        assert spec["automountServiceAccountToken"] is False, "a token for the API server"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), "something of the host"
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= VOLUMES, f"a volume {volume}"
    for _, container in rendered.containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["privileged"] is False, "privileges"
        assert context["capabilities"] == {"drop": ["ALL"]}, "capabilities"
        assert context["readOnlyRootFilesystem"] is True, "a root file system that can be written"
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, "no /tmp to write to"


def containers_have_resources(rendered):
    for _, container in rendered.containers():
        for what in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][what]), f"no {what} of {container['name']}"


def selectors_find_their_pods(rendered):
    for item in rendered.of("StatefulSet"):
        assert selects(item["spec"]["selector"], item["spec"]["template"]), "a set that does not select its pods"
        rendered.one("Service", item["spec"]["serviceName"])
        for spread in item["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert selects(spread["labelSelector"], item["spec"]["template"]), "a spread of other pods"
    selectors = [({"matchLabels": item["spec"]["selector"]}, item) for item in rendered.of("Service")]
    budgets = rendered.of("PodDisruptionBudget") + rendered.of("StatefulSet")
    selectors += [(item["spec"]["selector"], item) for item in budgets]
    for selector, item in selectors:
        found = [pod["metadata"]["labels"][COMPONENT] for pod in rendered.pods() if selects(selector, pod)]
        wanted = item["metadata"]["labels"][COMPONENT]
        assert found == [wanted], f"{item['kind']}/{item['metadata']['name']} selects {found}"
    ports = {port["name"]: port["containerPort"] for port in rendered.container("coordinator")["ports"]}
    for port in rendered.one("Service", "ganglion-coordinator")["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"], "a service's port that leads nowhere"


def admitted(rendered, direction, pod, peer, port):
    """Whether policies let `pod` be reached by (or reach) `peer` at a port."""
    policies = [item["spec"] for item in rendered.of("NetworkPolicy")]
    policies = [spec for spec in policies if selects(spec["podSelector"], pod) and direction in spec["policyTypes"]]
    assert policies, f"no policy for the {direction} of a pod"
    side, rules = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
    for rule in (rule for spec in policies for rule in spec.get(rules, [])):
        peers = rule.get(side)
        near = [
            item["podSelector"] for item in peers or [] if "namespaceSelector" not in item and "podSelector" in item
        ]
        fits = peers is None or any(selects(selector, peer) for selector in near)
        if fits and ("ports" not in rule or port in {item["port"] for item in rule["ports"]}):
            return True
    return False


def policies_fence_the_data_plane(rendered):
    worker, coordinator = rendered.pod("worker"), rendered.pod("coordinator")
    stranger = {"metadata": {"labels": {"app": "other"}}}
    wanted = [
        (worker, worker, 40000, True),
        (worker, coordinator, 7000, True),
        (worker, coordinator, 7001, False),
        (coordinator, worker, 40000, False),
        (stranger, worker, 40000, False),
        (stranger, coordinator, 7000, False),
        (stranger, coordinator, 7001, False),
    ]
    for source, target, port, may in wanted:
        reached = admitted(rendered, "Ingress", target, source, port)
        sent = source is stranger or admitted(rendered, "Egress", source, target, port)
        assert (reached and sent) == may, f"port {port} of the {target['metadata']['labels'][COMPONENT]}"
    assert not admitted(rendered, "Egress", worker, stranger, 80), "workers reach others"


def pods_have_time_to_drain(rendered):
    lease = LEASE * rendered.job()["job"].get("failure_deadline", 5.0)
    for pod in rendered.pods():
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace >= lease + SPARE_SECONDS, f"{grace} s, and the lease is {lease} s"


def workers_can_be_scaled_and_stay(rendered):
    assert rendered.set("worker")["spec"]["podManagementPolicy"] == "Parallel", "workers wait for each other"
    assert rendered.set("coordinator")["spec"]["replicas"] == 1, "more than one coordinator"
    for component in ("coordinator", "worker"):
        container = rendered.container(component)
        assert "--stay" in container["args"], f"a {component} that ends and is started again for ever"
        assert container["command"] == [f"/usr/local/bin/{component}"], "another program"
    assert "--workers=0" in rendered.container("coordinator")["args"], "workers in the coordinator's pod"


def all_that_is_mounted_exists(rendered):
    assert not rendered.of("Secret"), "a Secret in files that people apply"
    claims = {item["metadata"]["name"] for item in rendered.of("PersistentVolumeClaim")}
    maps = {item["metadata"]["name"] for item in rendered.of("ConfigMap")}
    for item in rendered.of("StatefulSet"):
        pod = item["spec"]["template"]
        names = {template["metadata"]["name"] for template in item["spec"].get("volumeClaimTemplates", [])}
        for volume in pod["spec"]["volumes"]:
            names.add(volume["name"])
            assert volume.get("secret", {}).get("secretName", "ganglion-join-token") in SECRETS, f"{volume}"
            assert volume.get("configMap", {}).get("name") in {None, *maps}, f"{volume}"
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}, f"{volume}"
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == names, "mounts and volumes differ"
            folders = {mount["mountPath"] for mount in container["volumeMounts"]}
            named = [value for name, value in environment(container).items() if name.startswith("GANGLION_") and value]
            for path in (Path(value) for value in named if value.startswith("/")):
                assert {str(path), str(path.parent)} & folders, f"{path} is not mounted"
    rendered.one("ServiceAccount", "ganglion")


def all_see_the_checkpoints(rendered):
    url = rendered.job()["checkpoint"]["url"]
    if url.startswith("file://"):
        volumes = set()
        for _, container in rendered.containers():
            mounts = [mount for mount in container["volumeMounts"] if url[7:].startswith(mount["mountPath"] + "/")]
            assert len(mounts) == 1 and not mounts[0].get("readOnly"), f"{container['name']} does not see {url}"
            volumes.add(mounts[0]["name"])
        assert len(volumes) == 1, f"{url} is not one volume"
        modes = rendered.one("PersistentVolumeClaim", "ganglion-checkpoints")["spec"]["accessModes"]
        assert modes == ["ReadWriteMany"], "a volume for one node"
    else:
        assert not rendered.of("PersistentVolumeClaim"), "a claim that nobody needs"
        for _, container in rendered.containers():
            sources = [source["secretRef"]["name"] for source in container["envFrom"]]
            assert sources == ["ganglion-object-store"], f"{container['name']} has no credentials for {url}"
        stranger = {"metadata": {"labels": {"app": "other"}}}
        for pod in rendered.pods():
            assert admitted(rendered, "Egress", pod, stranger, 443), f"a policy keeps pods from {url}"


def connections_are_protected_or_said_not_to_be(rendered):
    coordinator, worker = rendered.container("coordinator"), rendered.container("worker")
    secure = "GANGLION_TLS_DIR" in environment(coordinator)
    assert secure != ("--insecure" in coordinator["args"]), "TLS or --insecure"
    assert secure == rendered.overlay.endswith("mtls"), "the overlay's name promises something else"
    assert secure == ("GANGLION_TLS_DIR" in environment(worker)), "one side speaks TLS"
    url = environment(worker)["GANGLION_COORDINATOR"]
    assert url == f"{'https' if secure else 'http'}://ganglion-coordinator:7000", f"workers go to {url}"
    for container in (coordinator, worker):
        assert "GANGLION_JOIN_TOKEN_FILE" in environment(container), "no join token"
    for probe, path in (("startupProbe", "healthz"), ("livenessProbe", "healthz"), ("readinessProbe", "readyz")):
        get = coordinator[probe]["httpGet"]
        assert (get["path"], get["port"]) == (f"/{path}", "http"), f"{probe} asks {get}"
        assert (get.get("scheme") == "HTTPS") == secure, f"{probe} does not speak as the server does"


def images_and_gpus_are_those_of_the_overlay(rendered):
    gpu = rendered.overlay.startswith("gpu")
    images = {container["name"]: container["image"] for _, container in rendered.containers()}
    assert images == {"coordinator": "ganglion:cpu", "worker": "ganglion:cuda" if gpu else "ganglion:cpu"}, f"{images}"
    limits = rendered.container("worker")["resources"]["limits"]
    assert (limits.get("nvidia.com/gpu") == 1) == gpu, "GPUs"
    shm = [item for item in rendered.pod("worker")["spec"]["volumes"] if item["name"] == "shm"]
    assert bool(shm) == gpu and all(item["emptyDir"]["medium"] == "Memory" for item in shm), "shared memory"


# ---- Faults that break each --------------------------------------------------------------------------------------------------


def drop(path):
    *keys, last = path.split(".")
    return lambda rendered: walk(rendered, keys).pop(last)


def put(path, value):
    *keys, last = path.split(".")
    return lambda rendered: walk(rendered, keys).__setitem__(int(last) if last.isdigit() else last, value)


def walk(rendered, parts):
    """The part of a container (c), a pod (p) or an object, of a component, that keys lead to."""
    what, name, *keys = parts
    place = {
        "c": lambda: rendered.container(name),
        "p": lambda: rendered.pod(name),
        "s": lambda: rendered.set(name),
    }.get(what, lambda: rendered.one(what, name))()
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    return place


def unlist(path, value):
    return lambda rendered: walk(rendered, path.split(".")).remove(value)


def open_to_all(name):
    return lambda rendered: rendered.one("NetworkPolicy", name)["spec"]["ingress"].append({})


def add_secret(rendered):
    rendered.objects.append({"kind": "Secret", "metadata": {"name": "ganglion-join-token"}})


def hide_storage(component):
    return lambda rendered: rendered.container(component).update(volumeMounts=[], envFrom=[])


CLAIMS = {
    pods_keep_the_restricted_profile: [
        drop("p.worker.spec.securityContext.seccompProfile"),
        put("c.worker.securityContext.readOnlyRootFilesystem", False),
        put("c.coordinator.securityContext.capabilities", {"drop": []}),
        put("p.worker.spec.hostNetwork", True),
        put("p.worker.spec.volumes.0", {"name": "x", "hostPath": {"path": "/"}}),
    ],
    containers_have_resources: [drop("c.worker.resources.limits.memory"), drop("c.coordinator.resources.requests.cpu")],
    selectors_find_their_pods: [
        put("s.worker.spec.selector.matchLabels.app", "x"),
        put("Service.ganglion-coordinator.spec.selector", {"app.kubernetes.io/name": "ganglion"}),
        put("PodDisruptionBudget.ganglion-worker.spec.selector", {"matchLabels": {COMPONENT: "coordinator"}}),
        put("Service.ganglion-coordinator.spec.ports.0.port", 7002),
    ],
    policies_fence_the_data_plane: [
        open_to_all("ganglion-worker"),
        open_to_all("ganglion-coordinator"),
        put("NetworkPolicy.ganglion-worker.spec.egress", []),
        put("NetworkPolicy.ganglion-worker.spec.policyTypes", ["Ingress"]),
        put("NetworkPolicy.ganglion-coordinator.spec.podSelector.matchLabels", {"app": "x"}),
    ],
    pods_have_time_to_drain: [put("p.worker.spec.terminationGracePeriodSeconds", 30)],
    workers_can_be_scaled_and_stay: [
        put("s.worker.spec.podManagementPolicy", "OrderedReady"),
        unlist("c.worker.args", "--stay"),
        put("s.coordinator.spec.replicas", 2),
    ],
    all_that_is_mounted_exists: [
        add_secret,
        put("c.worker.volumeMounts.0.name", "other"),
        put("p.coordinator.spec.volumes.0", {"name": "checkpoints", "persistentVolumeClaim": {"claimName": "x"}}),
    ],
    all_see_the_checkpoints: [hide_storage("worker"), hide_storage("coordinator")],
    connections_are_protected_or_said_not_to_be: [
        put("c.coordinator.readinessProbe.httpGet.path", "/healthz"),
        put("c.worker.env.0.value", "http://elsewhere:7000"),
        put("c.coordinator.env", []),
        put("c.worker.env", []),
    ],
    images_and_gpus_are_those_of_the_overlay: [put("c.worker.image", "ganglion:latest")],
}


def holds(claim, rendered):
    """Returns the reason why a claim does not hold, if any."""
    try:
        claim(rendered)
    except (AssertionError, KeyError) as broken:
        return str(broken) or "it does not hold"
    return None


def notices(claim, breach, rendered):
    broken = Rendered(rendered.overlay, copy.deepcopy(rendered.objects))
    breach(broken)
    if broken.objects == rendered.objects:
        return True
    return holds(claim, broken) is not None


def renderer():
    """The command that renders a folder, if this machine has one."""
    for program, arguments in (("kustomize", ["build"]), ("kubectl", ["kustomize"])):
        if shutil.which(program):
            return [program, *arguments]
    return None


def check_schemas(text, packages):
    """Returns the complaints of kubernetes-validate; a warning is an object that it does not know."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-m", "kubernetes_validate", "-k", VERSION, "--strict", file.name]
        variables = {**os.environ, "PYTHONPATH": str(packages)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    said = (done.stdout + done.stderr).splitlines()
    wrong = [line for line in said if not line.startswith("INFO")]
    if done.returncode != 0 and not wrong:
        wrong = [f"kubernetes-validate ended with {done.returncode}"]
    return wrong if any(line.startswith("INFO") for line in said) else wrong or ["nothing was checked"]


def render(command, name):
    """The text of an overlay or a variant; raises ValueError with the error."""
    with tempfile.TemporaryDirectory() as folder:
        place = OVERLAYS / name
        if name in VARIANTS:
            place = Path(folder).resolve()
            text = VARIANTS[name].format(overlays=os.path.relpath(OVERLAYS, place))
            (place / "kustomization.yaml").write_text(text)
            (place / "job.toml").write_text(VARIANT_JOB)
        done = subprocess.run([*command, str(place)], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if done.returncode != 0 or done.stderr:
        raise ValueError(f"it does not render: {done.stderr.strip()}")
    return done.stdout


def check(name, command, packages, yaml):
    try:
        text = render(command, name)
    except ValueError as error:
        return [str(error)]
    wrong = check_schemas(text, packages)
    rendered = Rendered(name, [item for item in yaml.safe_load_all(text) if item])
    for claim, breaches in CLAIMS.items():
        title = claim.__name__.replace("_", " ")
        broken = holds(claim, rendered)
        if broken:
            wrong.append(f"{title}: {broken}")
        elif not all(notices(claim, breach, rendered) for breach in breaches):
            wrong.append(f"{title}: the check does not notice when this is broken")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="the folder with kubernetes-validate")
    packages = parser.parse_args().packages
    sys.path.insert(0, str(packages))
    try:
        import yaml
    except ImportError as error:
        print(f"error: --packages {packages}: {error}; pip install --target it kubernetes-validate", file=sys.stderr)
        return 2
    command = renderer()
    if command is None:
        print("error: neither kustomize nor kubectl is on the PATH; install one of them", file=sys.stderr)
        return 2
    failed = False
    for name in [*sorted(path.name for path in OVERLAYS.iterdir()), *VARIANTS]:
        wrong = check(name, command, packages, yaml)
        failed |= bool(wrong)
        print(f"{name}: " + ("\n  ".join(["", *wrong]) if wrong else f"valid in {VERSION}, {len(CLAIMS)} claims hold"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
