"""An outage: since when a rank has no usable connection, when it tries again, and when it gives up.

It knows times and nothing else. What state the rank is in, `session` knows, and what its errors and log lines say,
`explanations`.
"""

from __future__ import annotations

from bnworker.transports.service.events import Disconnected

_WARN_AFTER_S = 2.0  # a service that listens answers sooner; then the log says what the rank waits for
# Between two attempts to connect. A broken connection is made anew at once: others wait for it.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
# A service that keeps nothing on disk, and whose port is free, has no state to return with.
_UNREACHABLE_S = 0.5


class Outage:
    """The current outage, or the latest one.

    Args:
        timeout: seconds after which the rank gives up.
        now: seconds: a rank begins without a connection.

    Attributes:
        limit_s: after which the rank gives up.
        ended: how the latest connection ended; None before the first one has.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self.limit_s = timeout
        self.ended: Disconnected | None = None
        self._timeout = timeout
        self._warned = False
        self._since, self._pause = now, _FIRST_PAUSE_S

    def begin(self, now: float) -> None:
        """A connection that was of use has ended."""
        self._since, self._pause, self._warned = now, _FIRST_PAUSE_S, False

    def may_be_permanent(self, now: float) -> bool:
        """Whether it is time to find out if the port is free, of a service without a state directory."""
        return now - self._since >= _UNREACHABLE_S

    def port_is_free(self) -> None:
        """Nothing listens: a service without a state directory does not return."""
        self.limit_s = _UNREACHABLE_S

    def is_over_limit(self, now: float) -> bool:
        """Whether the rank gives up."""
        return now - self._since >= self.limit_s

    def must_warn(self, now: float, *, has_joined: bool) -> bool:
        """Whether the log gets its one line about this outage now."""
        if self._warned or not (has_joined or now - self._since >= min(_WARN_AFTER_S, self._timeout)):
            return False
        self._warned = True
        return True

    def next_pause(self, now: float, jitter: float) -> float:
        """Seconds until the next attempt.

        Args:
            now: seconds.
            jitter: 0 to 1, so that not all ranks try at once.
        """
        pause = min(self._pause * (0.5 + 0.5 * jitter), self.limit_s - (now - self._since))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        return pause
