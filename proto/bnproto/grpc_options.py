"""What both ends of a connection must agree on, in one place.

A client that pings more often than its server allows is cut off ("too many pings"): so both read these lines.
"""

from __future__ import annotations

Options = list[tuple[str, int]]

SERVICE_NAME = "bnproto.v1.StatisticsService"
OBSERVATION_NAME = "bnproto.v1.ObservationService"
# What the health service calls the state directory: SERVING while jobs are saved there.
SAVING_NAME = f"{SERVICE_NAME}/saving"

# gRPC refuses messages above 4 MiB. Much smaller parts keep one job's message from holding up another's, and stay in
# the caches while they are copied: with 1 MiB a reduction of 4 MiB took 36 ms instead of 19, and a job beside one that
# made them without a pause 1.7 times as long for an exchange, instead of 1.2 (`python -m benchmarks.beside`).
PART_BYTES = 2**18

# The details of a status name every rank of a job: far more than gRPC's default of 8 KiB for metadata.
_METADATA_BYTES = 2**20

# Pings find machines that vanished without closing their connection. They are answered below Python, so a busy
# process answers too; a rank whose both cores are saturated gets 20 s to do so.
_PING_EVERY_MS = 20_000
_PING_ANSWER_MS = 20_000

_HANDSHAKE_MS = 10_000  # the default is 120 s
_IDLE_MS = 60_000  # without a call; the default is for ever

_BOTH: Options = [
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PING_ANSWER_MS),
    ("grpc.http2.max_pings_without_data", 0),  # 0: no limit; exchanges may lie minutes apart
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
]

SERVER_OPTIONS: Options = [
    *_BOTH,
    ("grpc.so_reuseport", 0),  # 1 is the default: a second daemon would silently share the port
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 4),
    # Connections of which nothing comes cost memory and a file each. A rank has a stream open as long as it is there.
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    ("grpc.max_connection_idle_ms", _IDLE_MS),
]

CLIENT_OPTIONS: Options = [
    *_BOTH,
    ("grpc.enable_http_proxy", 0),  # ranks and their service live on one network
    ("grpc.enable_retries", 0),  # a stream with state can't be retried by gRPC
    ("grpc.use_local_subchannel_pool", 1),  # a rank's connection is its sign of life: not shared with others
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # the default reaches 120 s; daemons often start after their ranks
    ("grpc.min_reconnect_backoff_ms", 2_000),  # how long one attempt to connect may take
]
