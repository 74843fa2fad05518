"""The control queue of a network device over vhost-user, played by the front end.

The protocol has none: the front end enables the rings of a queue pair itself (SET_VRING_ENABLE). For a driver
to need no second way, its commands arrive here, in a split ring whose other end is in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..memory import Bytes, DmaPool
from ..spec import features as feat
from ..spec import net
from ..spec.ring import DESC_F_NEXT, DESC_F_WRITE
from ..virtqueue.kick import Kick
from ..virtqueue.queue import Virtqueue

SIZE: Final = 64
"""Entries."""

NEEDS_BACK_END: Final = feat.mask(
    bit for bit, needs in feat.DEPENDENCIES[feat.NET].items() if (net.F_CTRL_VQ,) in needs and bit != net.F_MQ
)
"""Features whose commands a back end never hears of."""


class ControlRing:
    """The queue, and who answers it: at once, in the driver's own thread.

    Args:
        index: number of the queue.
        size: entries.
        pool: where its memory comes from.
        look: view of bytes by their guest address.
        set_pairs: carries out VQ_PAIRS_SET; False: there are not so many.
        name: for messages.
        queue_class: what the queue is made of.
    """

    def __init__(
        self,
        index: int,
        size: int,
        pool: DmaPool,
        look: Callable[[int, int], Bytes],
        set_pairs: Callable[[int], bool],
        name: str,
        queue_class: type[Virtqueue] = Virtqueue,
    ) -> None:
        self._look = look
        self._set_pairs = set_pairs
        self._taken = 0
        self.queue = queue_class(
            index, size, 1 << feat.F_VERSION_1, pool, Kick.call(lambda _: self._answer_all()), name=name
        )

    def _answer_all(self) -> None:
        available, used, size = self.queue.driver, self.queue.device, self.queue.size
        while self._taken != int(available["idx"]):
            head = int(available["ring"][self._taken % size])
            used["ring"][self._taken % size] = (head, self._answer(head))
            self._taken = (self._taken + 1) & 0xFFFF
            used["idx"] = self._taken

    def _answer(self, head: int) -> int:
        """Carry out one command; bytes written."""
        command, status, at = b"", None, head
        while True:
            address, length, flags, following = self.queue.desc[at].item()
            if flags & DESC_F_WRITE:
                status = self._look(address, length)
                break
            command += self._look(address, length).tobytes()
            if not flags & DESC_F_NEXT:
                break
            at = following
        if status is None:
            return 0
        known = command[:2] == bytes((net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET)) and len(command) == 4
        done = known and self._set_pairs(int.from_bytes(command[2:], "little"))
        status[0] = net.CTRL_OK if done else net.CTRL_ERR
        return 1
