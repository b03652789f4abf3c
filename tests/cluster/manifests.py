"""What deploy/kubernetes becomes: built by kustomize, and held to the schemas of Kubernetes and of custom resources.

`python -m tests.cluster.manifests` does so for `make check`. It applies nothing to a cluster.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.support.processes import REPOSITORY

Manifest = dict[str, Any]

FOLDER = REPOSITORY / "deploy" / "kubernetes"
OVERLAYS = ("single-node", "production")
SCHEMAS = Path(__file__).parent / "schemas"
# The oldest that has all we use (`sleep` before a stop), and the newest that the package knows.
VERSIONS = ("1.30", "1.37")
NO_KUSTOMIZE = "neither kubectl nor kustomize is installed"


def kustomize() -> list[str] | None:
    """The command that builds a folder; None where there is none."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


@functools.cache
def built(overlay: str) -> tuple[Manifest, ...]:
    """The manifests of an overlay, as they would be applied."""
    command = kustomize()
    assert command is not None, NO_KUSTOMIZE
    made = subprocess.run([*command, str(FOLDER / "overlays" / overlay)], check=True, capture_output=True, text=True)
    return tuple(yaml.safe_load_all(made.stdout))


def pods(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """By name the pod templates of everything that makes pods."""
    return dict(_pods(manifests))


def fault_of(manifest: Manifest, version: str) -> str | None:
    """What the schema of that version of Kubernetes, or of the custom resource, refuses in it; unknown fields too."""
    where = f"{manifest['kind']} {manifest['metadata']['name']}"
    try:
        if (schema := _custom_schema(manifest["apiVersion"], manifest["kind"])) is not None:
            jsonschema.Draft202012Validator(schema).validate(manifest)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{where}, Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message[:300]}"
    return None


def _pods(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for manifest in manifests:
        spec = manifest.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield manifest["metadata"]["name"], spec["template"]


@functools.cache
def _custom_schema(api_version: str, kind: str) -> Manifest | None:
    file = SCHEMAS / f"{kind}.json"
    if not file.exists():
        return None
    stored = json.loads(file.read_text())
    assert stored["apiVersion"] == api_version, f"{kind} of {api_version} is not known"
    schema: Manifest = _strict(stored["schema"])
    return schema


def _strict(schema: Any) -> Any:
    """The schema with unknown fields refused: an API server would drop them, and say so to who asks."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _strict(part) for name, part in schema.items()}
    if "properties" in schema and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


def main() -> int:
    """Check every overlay; 0 if nothing is refused, or nothing can be built here, which is said."""
    if kustomize() is None:
        sys.stderr.write(f"deploy/kubernetes is not checked: {NO_KUSTOMIZE}\n")
        return 0
    faults = [
        f"{overlay}: {fault}"
        for overlay in OVERLAYS
        for manifest in built(overlay)
        for version in VERSIONS
        if (fault := fault_of(manifest, version)) is not None
    ]
    sys.stderr.writelines(f"{fault}\n" for fault in faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
