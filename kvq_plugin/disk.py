"""Full disks: the system's error names no file, and safetensors' is no OSError."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

#: No room, no quota left, a file larger than this file system or process may have.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAID = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b")  # as safetensors words it


@contextmanager
def room_for(what: object, remedy: str) -> Iterator[None]:
    """Within the block the error of a full disk is an OSError that names *what* and a *remedy*."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _FULL and not _SAID.search(str(error)):
            raise
        raise OSError(f"{what} was not written ({error}): make room there, or {remedy}") from error
