"""tokens.parquet, the sample of tokens that extraction keeps of every boundary.

Of M blocks, boundary b is the input of block b, and boundary M the output of the last block.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from ppcl.errors import UserError
from ppcl.storage import schemas, seals, tables


def write_sample(path: Path, samples: dict[str, dict], provenance: dict[str, str]) -> None:
    """Writes tokens.parquet: a row group per boundary and stream. A stream's tokens have the same
    order at all boundaries.

    Tokens of streams with fewer channels than the widest are filled up with zeros; the file's
    metadata has the number of channels of each stream.

    Args:
        samples: stream -> its sample, as `activations.collect` returns it.
    """
    widths = {stream: s["value"].shape[-1] for stream, s in samples.items()}
    widest = max(widths.values())
    schema = schemas.tokens(widest)
    kind = schema.field("value").type
    with tables.writer(path, schema, provenance | {"widths": json.dumps(widths)}) as out:
        for stream, sample in samples.items():
            for boundary, value in enumerate(sample["value"], start=sample.get("first", 0)):
                value = np.pad(value, ((0, 0), (0, widest - value.shape[1])))
                storage = pa.FixedSizeListArray.from_arrays(value.ravel(), value.shape[1])
                columns = {
                    "boundary": pa.array(np.full(len(value), boundary, np.int32)),
                    "stream": pa.array([stream] * len(value)),
                    "value": pa.ExtensionArray.from_storage(kind, storage),
                }
                rest = {n: pa.array(sample[n]) for n in schema.names if n not in columns}
                out.write(pa.table(columns | rest))


class TokenReader:
    """Reads tokens.parquet one boundary of one stream at a time.

    Attributes:
        streams: names, in file order.
        boundaries: number of boundaries of the teacher, M + 1.
        provenance: the file's.

    Raises:
        UserError: the file is missing or damaged, or holds no tokens.
    """

    def __init__(self, path: str | Path):
        self._file = tables.File(path)
        self.provenance = self._file.provenance
        schema = self._file.schema
        kind = schema.field("value").type if "value" in schema.names else None
        widest = kind.shape[0] if isinstance(kind, pa.FixedShapeTensorType) else 1
        tables.require(path, schema, schemas.tokens(widest))
        if not len(self._file):
            raise UserError(f"{path}: holds no tokens; {seals.REMAKE}")
        try:
            self._groups: dict[tuple[str, int], int] = {}
            for group in range(len(self._file)):
                head = self._file.group(group, ["stream", "boundary"])
                self._groups[head["stream"][0].as_py(), head["boundary"][0].as_py()] = group
            self.streams = list(dict.fromkeys(stream for stream, _ in self._groups))
            self._first, self._widths = {}, json.loads(self.provenance["widths"])
            for stream in self.streams:
                if not 0 < self._widths[stream] <= widest:
                    raise ValueError(f"{stream} of {self._widths[stream]} channels")
                # A stream may begin or end at a seam, but has no gaps.
                passed = [boundary for of, boundary in self._groups if of == stream]
                self._first[stream] = min(passed)
                if len(passed) != 1 + max(passed) - min(passed):
                    raise ValueError(f"{stream} at boundaries {sorted(passed)}")
            self.boundaries = 1 + max(boundary for _, boundary in self._groups)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: holds no tokens ({error!r}); {seals.REMAKE}") from error

    def values(self, boundary: int, stream: str) -> np.ndarray:
        """The tokens of a stream at a boundary, [n, d] float32."""
        column = self._column(boundary, stream, "value").combine_chunks()
        return column.to_numpy_ndarray()[:, : self._widths[stream]]

    def heldout(self, stream: str) -> np.ndarray:
        """Whether each token is of a held-out prompt, on which no probe was fitted; bool [n]."""
        return self._column(self._first[stream], stream, "heldout").to_numpy(zero_copy_only=False)

    def prompts(self, stream: str) -> np.ndarray:
        """Index of each token's prompt, [n]."""
        return self._column(self._first[stream], stream, "prompt").to_numpy()

    def _column(self, boundary: int, stream: str, name: str):
        group = self._groups[stream, boundary]
        return self._file.group(group, [name]).column(name)
