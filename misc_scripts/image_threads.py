"""The same work on many images, in threads."""

from collections.abc import Callable, Collection
from multiprocessing.pool import ThreadPool
from threading import Event
from typing import TypeVar

from tqdm import tqdm

from apm.data.images import Skipped, UnreadableImage

Item = TypeVar("Item")


def for_each(
    work: Callable[[Item], None],
    items: Collection[Item],
    workers: int,
    description: str = "",
    ended: Event | None = None,
) -> Skipped:
    """Do the work on every item, with a progress bar; skip images that cannot be read.

    Args:
        work: raises ``UnreadableImage`` for an image that cannot be read.
        items: what the work is done on.
        workers: number of threads.
        description: of the progress bar.
        ended: is set when no more work is wanted, because of Ctrl-C or an error. What has begun is
            waited for, so long work looks at it.

    Returns:
        What was skipped.

    Raises:
        ValueError: at the end, if every image was skipped; for a single one at once.
    """
    skipped = Skipped()

    def attempt(item: Item) -> UnreadableImage | None:
        try:
            work(item)
        except UnreadableImage as error:
            return error
        return None

    pool = ThreadPool(max(workers, 1))
    try:
        errors = pool.imap_unordered(attempt, items)
        for error in tqdm(errors, desc=description, total=len(items), unit="image"):
            if error and len(items) == 1:
                raise error
            if error:
                skipped.add(error)
    finally:
        if ended:
            ended.set()
        pool.terminate()
        pool.join()  # a file that is being written is finished or removed
    skipped.refuse_all(len(items))
    return skipped
