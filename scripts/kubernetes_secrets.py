"""Prints the Secret that the Kubernetes trial asks for, with random passwords; it never touches a disk.

    python3 -m scripts.kubernetes_secrets | kubectl create -n stoker -f -

`create` refuses where the Secret exists: volumes keep the passwords that they were made with. It needs nothing but
Python. With services elsewhere the same keys are yours to fill: docs/kubernetes.md.
"""

from __future__ import annotations

import json
import secrets
import sys

from scripts.compose_env import PASSWORD_BYTES

SECRET = "stoker-secrets"  # noqa: S105  # its name
POSTGRES = "postgres:5432/stoker"
# KEDA's operator asks from a namespace of its own.
POSTGRES_FROM_ELSEWHERE = "postgres.stoker.svc:5432/stoker?sslmode=disable"


def secret() -> dict[str, object]:
    """The Secret as a manifest: a random password for each service, and the URLs that have them."""
    postgres, rabbitmq, redis, flower, backlog = (secrets.token_hex(PASSWORD_BYTES) for _ in range(5))
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": SECRET},
        "type": "Opaque",
        "stringData": {
            "STOKER_POSTGRES__URL": f"postgresql://stoker:{postgres}@{POSTGRES}",
            "STOKER_BROKER__URL": f"amqp://stoker:{rabbitmq}@rabbitmq:5672/stoker",
            "STOKER_REDIS__URL": f"redis://:{redis}@redis:6379/0",
            "STOKER_FLOWER__PASSWORD": flower,
            "POSTGRES_PASSWORD": postgres,
            "RABBITMQ_PASSWORD": rabbitmq,
            "REDIS_PASSWORD": redis,
            "BACKLOG_PASSWORD": backlog,
            "BACKLOG_URL": f"postgresql://stoker_backlog:{backlog}@{POSTGRES_FROM_ELSEWHERE}",
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(secret(), indent=2) + "\n")
