"""One thing at a time in a thread beside the caller: reading ahead, writing behind."""

import concurrent.futures


class Background:
    """A thread that does one thing at a time; the first failure ends the block.

    `submit` waits for what was submitted before, so at most one result waits in memory; leaving the block waits for
    the last.
    """

    def __init__(self):
        self._pool, self._last = concurrent.futures.ThreadPoolExecutor(max_workers=1), None

    def submit(self, work, *arguments):
        """The future of work(*arguments); raises what the work before it raised."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(work, *arguments)
        return self._last

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        self._pool.shutdown(wait=True)
        if kind is None and self._last is not None:
            self._last.result()
