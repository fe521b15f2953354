"""A picture's file that lies within another one, as a member of a tar file does; read when it is decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FilePart:
    """Where the bytes of a picture's file are; until it is decoded they are not in memory.

    Args:
        name: of the picture, for people.
        path: of the file around it.
        offset: of its first byte in that file.
        size_bytes: of its content.
    """

    name: str
    path: str
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        """The content.

        Raises:
            OSError: the file cannot be read, or ends before the part does.
        """
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size_bytes)
        if len(data) != self.size_bytes:
            raise OSError(f"{self.path} ends within it")
        return data
