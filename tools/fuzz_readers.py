"""Atheris on everything that reads: inputs that reach new code of the readers, and what it does.

python tools/fuzz_readers.py --seconds 600                all readers, each its share of the time
python tools/fuzz_readers.py --runs 2000 selection.json        some readers, so many inputs each
python tools/fuzz_readers.py --runs 2000 all              all readers in one process

A reader either reads an input as what it is or raises UserError; any other exception, a crash of
the process and a hang are findings: their input is kept, and the exit code is 1. Half of the inputs
of selections and tensors get a fitting seal first, so that damage also reaches what lies behind it.
Not those of tables: Arrow itself aborts on some footers, which no damage gets past a seal
(test_fuzz.py has whole tables of odd content).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MISSING = "no atheris: pip install -r requirements.txt (it is for Linux on x86-64 and Python 3.11+)"
NAMES = (
    "calls.parquet",
    "tokens.parquet",
    "intervals.parquet",
    "start.safetensors",
    "selection.json",
    "prompts.csv",
    "prompts.txt",
    "prompts.jsonl",
    "config.yaml",
    "inline.json",
)
ALL = "all"
CHILD = "--child"  # starts the process of one reader
PATIENCE = 600  # seconds for the start, and for inputs that hang


def resealed(name: str, content: bytes) -> bytes:
    """The content of a sealed file with the digests and the seal that fit it, if it has the form
    of such a file; else the content as it is."""
    import hashlib

    from ppcl.storage import seals, tensors

    def zeroed(description: bytes) -> bytes:
        return re.sub(rb"(?<=sha256:)[0-9a-f]{64}", b"0" * 64, description)

    suffix = name.rpartition(".")[2]
    try:
        if suffix == "json":
            return seals.seal(zeroed(content))
        if suffix == "safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            data = hashlib.sha256(hashlib.sha256(content[end:]).digest()).hexdigest()
            mark = rf'(?<="{tensors._DATA}":")[0-9a-f]{{64}}'.encode()
            return seals.seal(re.sub(mark, data.encode(), zeroed(content[:end]))) + content[end:]
    except seals.UserError:
        pass
    return content


def fuzz(name: str, folder: Path, options: list[str]) -> None:
    """In a process of its own, which this ends."""
    import atheris

    with atheris.instrument_imports(include=["ppcl"]):
        from support import fuzzing
    corpus = folder / "corpus"
    corpus.mkdir()
    (folder / "whole").mkdir()
    whole = fuzzing.example(folder / "whole") | {"inline.json": b"{}"}
    names = NAMES if name == ALL else [name]
    for number in range(2 * len(names)):  # the first byte: which, and whether its seal is to fit
        (corpus / str(number)).write_bytes(bytes([number]) + whole[names[number // 2]])

    def one(data: bytes) -> None:
        kind, content = (data[0] if data else 0), data[1:]
        name = names[kind // 2 % len(names)]
        path = folder / name
        if kind % 2 == 0 and name in fuzzing.SEALED:
            content = resealed(name, content)
        if name == "inline.json":
            try:
                fuzzing.config.load("{" + content.decode("utf-8", "surrogateescape"))
            except fuzzing.UserError:
                pass
            return
        path.write_bytes(content)
        fuzzing.refused(name, path)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readers", nargs="*", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument("--seconds", type=float, help="time for all readers together")
    parser.add_argument("--runs", type=int, help="inputs per reader")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs")
    parser.add_argument("--keep", type=Path, default=Path("."), help="folder for bad inputs")
    options = parser.parse_args()
    if not (options.seconds or options.runs):
        parser.error("say how long: --seconds or --runs")
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit(MISSING)
    readers, bad = options.readers or list(NAMES), 0
    options.keep.mkdir(parents=True, exist_ok=True)
    for name in readers:
        limit = f"runs={options.runs}"
        if options.seconds:
            limit = f"max_total_time={max(1, round(options.seconds / len(readers)))}"
        # Without libFuzzer's own alarm, which under load ends the process that it should watch.
        given = [limit, f"seed={options.seed}", "timeout=0", "rss_limit_mb=4096"]
        given += ["print_final_stats=1", f"artifact_prefix={options.keep.resolve()}/{name}-"]
        folder = Path(tempfile.mkdtemp())
        try:
            done = subprocess.run(
                [sys.executable, __file__, CHILD, name, folder, *(f"-{word}" for word in given)],
                capture_output=True,
                text=True,
                errors="replace",
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                timeout=PATIENCE + (options.seconds or 0),
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        counted = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        print(f"{name}: {counted[1] if counted else 'an unknown number of'} inputs", end="")
        # Not by the exit code: torch's threads may spoil the end of a process that is done.
        finding = "Test unit written to" in done.stderr or "\nDone " not in done.stderr
        print(f", exit code {done.returncode}" if finding else ", no finding", flush=True)
        if finding:
            bad += 1
            shown = [line for line in done.stdout.splitlines() if not line.startswith("INFO")]
            shown += re.findall(r"Test unit written to .*", done.stderr) or [done.stderr[-2000:]]
            print("\n".join(shown[-40:]), flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflow/scripts")]
    if sys.argv[1:2] == [CHILD]:
        fuzz(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    main()
