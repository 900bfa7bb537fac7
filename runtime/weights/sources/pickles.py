"""Models whose weights only come as torch pickles them: converted once, into the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.weights.sources.cache import Entry, require_space
from runtime.weights.sources.progress import FetchProgress


def convert_into(
    entry: Entry, folder: Path, names: Sequence[str], on_progress: Callable[[FetchProgress], None]
) -> dict[str, int]:
    """Convert the files `names` in `folder` to safetensors in the entry's directory; these, by size.

    `folder` may be that directory. Whole files alone enter it. Raises PickledError for files that hold more
    than tensors.
    """
    from runtime.weights.pickled import convert_pickled, safetensors_name

    sizes = [(folder / name).stat().st_size for name in names]
    require_space(entry.directory, sum(sizes))
    made = {}
    for i, name in enumerate(names):

        def report(done: int, total: int, before: int = sum(sizes[:i]), size: int = sizes[i]) -> None:
            come = before + size * done // max(1, total)
            on_progress(
                FetchProgress(
                    bytes_done=come, bytes_total=sum(sizes), directory=entry.directory, phase="convert"
                )
            )

        temporary = entry.partial / safetensors_name(name)
        convert_pickled(folder / name, temporary, report)
        final = temporary.replace(entry.directory / temporary.name)
        made[final.name] = final.stat().st_size
    return made
