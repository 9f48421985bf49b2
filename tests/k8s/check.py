"""Checks manifests against the schemas of Kubernetes, which the package kubernetes-validate brings, and of Kubeflow's MPIJob: check.py FILE..."""
import json
import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml

MPI_JOB = json.loads(pathlib.Path(__file__).with_name("mpijob.schema.json").read_text())


def check(manifest):
    if (manifest["apiVersion"], manifest["kind"]) != ("kubeflow.org/v2beta1", "MPIJob"):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.validate(manifest, MPI_JOB)
    for replica in manifest["spec"]["mpiReplicaSpecs"].values():
        check({"apiVersion": "v1", "kind": "PodTemplate", "template": replica["template"]})


for path in sys.argv[1:]:
    with open(path) as file:
        for manifest in yaml.safe_load_all(file):
            try:
                check(manifest)
            except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
                sys.exit(f"{path}: {manifest['kind']}: {error.message}")
