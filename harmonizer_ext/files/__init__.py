"""Files from elsewhere: one door for each kind of file, through which all of this package goes.

Names are names: no scheme, no pattern and no markup in them is obeyed. Sizes are read from headers
and compared with a limit before anything is allocated. What cannot be read is an
``UnreadableError``, whatever the library behind a door raises. No link is followed where a file is
written.
"""

from .reading import MAX_BYTES, UnreadableError

__all__ = ["MAX_BYTES", "UnreadableError"]
