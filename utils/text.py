"""Text and CSV files in several encodings, and the standard streams of a command."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import sys
from pathlib import Path

MARKS = {  # byte-order marks of other encodings than UTF-8; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SEPARATORS = ",;\t|"
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}  # not \t, \n, \r


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8 or, with a byte-order mark, UTF-16 or UTF-32.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another encoding.
    """
    return decode_text(path.read_bytes(), errors)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """The text in the content of a file, as `read_text`."""
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        if encoding == "utf-8-sig" and b"\0" in content:  # UTF-16 without a mark
            raise UnicodeError
        return content.decode(encoding, errors if encoding == "utf-8-sig" else "strict")
    except UnicodeError as error:
        raise ValueError(f"it is not text in {encoding.removesuffix('-sig').upper()}; save it as UTF-8") from error


def read_table(path: Path, errors: str = "strict") -> list[dict[str, str]]:
    """The rows of a CSV file by column, without spaces around values. The header's most frequent separator is used.

    Empty rows are ignored, and so is a line such as `sep=;` above the header, which Excel reads.

    Raises:
        OSError, ValueError: as `read_text`; ValueError also for a row with more or fewer values than columns.
    """
    text = re.sub(r'\A"?sep=."?\r?\n', "", read_text(path, errors), flags=re.IGNORECASE)
    head = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=head.count), skipinitialspace=True)
    try:
        stripped = ([value.strip() for value in line] for line in lines)
        columns, *rows = [line for line in stripped if any(line)] or [[]]
    except csv.Error as error:
        raise ValueError(f"it is not a CSV file: {error}") from error
    if wrong := next((number for number, row in enumerate(rows, start=2) if len(row) != len(columns)), None):
        raise ValueError(f"row {wrong} has {len(rows[wrong - 2])} values for {len(columns)} columns")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def one_line(text: str) -> str:
    """The text with its line breaks escaped, as a file name may contain some."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def path_text(path: str) -> str:
    """A path as text for files that other locales read: undecodable bytes are escaped as in UTF-8 locales."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def text_path(text: str) -> str:
    """The path of a `path_text`, in this process's locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


class Stream:
    """A standard stream that raises no errors: if it is closed, broken or full, the text is lost. CONTROLS are escaped.

    fault: the first error, or None.
    """

    def __init__(self, stream: io.TextIOBase | None) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for the rest of the process
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text.translate(CONTROLS))
        except (OSError, ValueError) as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Discards all later text, also that which Python flushes at its end."""
        self.fault = self.fault or (error if isinstance(error, OSError) else OSError(None, str(error)))
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for the rest of the process
        try:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        except (OSError, ValueError):
            self._stream = nowhere
        if isinstance(error, BrokenPipeError):
            print("warning: the reader of the output has closed the stream; the run continues", file=sys.stderr)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
