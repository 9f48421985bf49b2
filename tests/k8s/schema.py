"""Makes mpijob.schema.json of manifests/base/kubeflow.org_mpijobs.yaml of github.com/kubeflow/mpi-operator (commit caa3c47, Apache 2.0):
the fields of an MPIJob, without descriptions, status, and what pod templates hold. schema.py CRD >mpijob.schema.json"""
import json
import sys

import yaml


def strip(node):
    if isinstance(node, list):
        return [strip(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: strip(value) for key, value in node.items() if key != "description" or not isinstance(value, str)}
    if "properties" in kept:
        if "template" in kept["properties"]:
            kept["properties"]["template"] = {"type": "object"}
        kept["properties"].pop("status", None)
        kept["additionalProperties"] = False
    return kept


with open(sys.argv[1]) as file:
    versions = yaml.safe_load(file)["spec"]["versions"]
(schema,) = (version["schema"] for version in versions if version["name"] == "v2beta1")
json.dump(strip(schema["openAPIV3Schema"]), sys.stdout, indent=1)
print()
