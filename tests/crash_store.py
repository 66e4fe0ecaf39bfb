"""Kills a process with SIGKILL before each of its file operations in turn, and looks at the store it leaves behind.

`python tests/crash_store.py ROOT TARGET DRAFTER` prints how many crashes there were; what is not whole ends it with an
error. A program of its own, because it forks: the test process may have threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from dspark_cpp.store import Store

_EVENTS = ("open", "os.", "fcntl.flock")


def work(root: Path, target: Path, draft: bytes) -> None:
    """Everything that changes a store: a blob, a name, another one in its place, a copy, deletions."""
    store = Store(root)
    digest = f"sha256:{hashlib.sha256(draft).hexdigest()}"
    store.blobs.put(digest, [draft[:100], draft[100:]])
    store.create("first", target=target, draft_files={"draft.gguf": digest}, system="one")
    store.create("first", target=target, draft_files={"draft.gguf": digest}, system="two")
    store.copy("first", "second")
    store.delete("first")
    store.create("second", target=target)
    store.delete("second")
    store.collect()


def crash_at(n: int, root: Path, target: Path, draft: bytes) -> bool:
    """Work in a process that dies before its n-th operation below `root`; False when it got through."""
    process = os.fork()
    if process == 0:
        n_left = n

        def count(event: str, args: tuple[object, ...]) -> None:
            nonlocal n_left
            is_here = event == "fcntl.flock" or any(str(root) in arg for arg in args if isinstance(arg, str))
            n_left -= is_here and event.startswith(_EVENTS)
            if n_left == 0:
                n_left = -1  # the kill is an operation, too
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work(root, target, draft)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, f"the work failed with status {status}"
    return False


def check_whole(root: Path) -> None:
    """Every name has its files, every blob has its digest, and what is left over can be freed."""
    store = Store(root)
    for manifest in store.list():
        store.check(manifest)
    blobs = root / "blobs"
    for path in blobs.iterdir() if blobs.is_dir() else ():
        assert path.name == f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}", path
    store.collect(min_age_s=-1.0)
    needed = {digest.replace(":", "-") for manifest in store.list() for digest in manifest.blobs}
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    expected = {f"blobs/{name}" for name in needed}
    assert {name for name in left if not name.startswith(("locks/", "manifests/"))} == expected, left
    assert not any(name.endswith(".tmp") for name in left), left


def main(root: Path, target: Path, drafter: Path) -> int:
    draft = drafter.read_bytes()
    n = 1
    while crash_at(n, root, target, draft):
        check_whole(root)
        shutil.rmtree(root, ignore_errors=True)
        n += 1
    check_whole(root)
    return n - 1


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:])))
