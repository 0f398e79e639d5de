"""Importing transformers beside other work: it takes more than half of the time that a start takes.

Nothing of mlx may be imported in the thread: mlx-lm draws random numbers' state as it is imported,
and mlx ends the process with an abort if the thread that did is gone before the interpreter is.
"""

import importlib
import threading

_thread: threading.Thread | None = None


def begin_importing_transformers() -> None:
    """Start the import, unless it was started before."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_import, name="import-transformers")
        _thread.start()


def finish_importing_transformers() -> None:
    """Wait for the import, if it was started; to be called before mlx-lm is imported.

    transformers replaces its own module at the end of its import. An import statement that has
    waited for that in another thread, as mlx-lm's would, gets the first one, which is empty.
    """
    if _thread is not None:
        _thread.join()


def _import() -> None:
    for module in ("transformers", "transformers.models.auto.tokenization_auto"):
        importlib.import_module(module)
