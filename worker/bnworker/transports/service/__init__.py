"""A rank's end of the statistics service.

What happens, and what is done about it, is decided in `session`: events in, actions out, without a clock, socket or
thread. `client` performs the actions. `service_channel` says what a channel may do; `grpc_channel` and
`local_channel` are the two there are. `heartbeat` says that the process is alive, and `transport` is what a world sees
of all this.
"""

from bnworker.transports.service.transport import ServiceTransport

__all__ = ["ServiceTransport"]
