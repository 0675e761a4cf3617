"""Zip files that may be damaged or crafted, as torch and NumPy write them: checked before they are read."""

import zipfile
from pathlib import Path

_ZIP = b"PK\x03\x04"


class WrongFile(ValueError):
    """A file that cannot be used; the message goes on from the file's name and leaves the remedy to the caller."""


def check_zip(path, checksums=True):
    """Checks a file that begins as a zip does, and returns whether it does so.

    Raises:
        WrongFile: it is no whole zip, its parts claim more bytes than it has, or one differs from its checksum.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
            if claimed > size:  # torch and NumPy store without compression
                raise WrongFile(f"claims to hold {claimed:,} bytes in a file of {size:,}; torch makes no such files")
            if checksums and (part := archive.testzip()):
                raise WrongFile(f"is damaged: the checksum of its part {part} differs")
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError) as error:
        raise error if isinstance(error, WrongFile) else WrongFile("is damaged or truncated") from error
    return True
