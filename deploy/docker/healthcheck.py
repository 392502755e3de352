"""Ask a service for its health:  python healthcheck.py HOST:PORT.

Over TLS where BNLAYER_TLS_CA names the CA's certificate (and BNLAYER_TLS_CERT and BNLAYER_TLS_KEY, where the service
asks for one), else in plain text. Exit status 0: it serves. 1: it does not, and the reason stands on stderr.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bnproto.connection import Connector
from bnproto.credentials import CredentialsError, credentials

_ANSWER_WITHIN_S = 3.0  # below the image's limit for a check


def main(address: str) -> str | None:
    """Return None if the service at `address` says SERVING, else what is wrong.

    Args:
        address: HOST:PORT.
    """
    try:
        connector = Connector(address, credentials(os.environ))
    except CredentialsError as error:
        return f"{address}: {error}"
    with connector.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # its types lack the methods
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            why = connector.fault() if error.code() is grpc.StatusCode.UNAVAILABLE else None
            return f"{address}: expected SERVING, received {error.code().name}: {why or error.details()}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if name == "SERVING" else f"{address}: expected SERVING, received {name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
