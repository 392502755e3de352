"""Ask a plaintext service for its health:  python healthcheck.py HOST:PORT.

Exit status 0: it serves. 1: it does not, and the reason stands on stderr.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_ANSWER_WITHIN_S = 3.0  # below the image's limit for a check


def main(address: str) -> str | None:
    """Return None if the service at `address` says SERVING, else what is wrong.

    Args:
        address: HOST:PORT.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # its types lack the methods
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            return f"{address}: expected SERVING, received {error.code().name}: {error.details()}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if name == "SERVING" else f"{address}: expected SERVING, received {name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
