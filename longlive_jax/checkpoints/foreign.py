"""What a file is that holds no weights, by its first bytes."""

_STARTS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file; run `git lfs pull`",
    b"<!doctype html": "is a web page, not the file; download the file itself",
    b"<html": "is a web page, not the file; download the file itself",
    b"<?xml": "is an XML page, not the file; download the file itself",
    b"gguf": "is a GGUF file, which is not read; give the model's safetensors files",
    b"\x1f\x8b": "is compressed by gzip; unpack it",
    b"7z\xbc\xaf": "is a 7-Zip archive; unpack it",
    b"rar!": "is a RAR archive; unpack it",
    b"entry not found": "is a server's error message; download the file again",
    b"access denied": "is a server's error message; download the file again",
    b"access to model": "is a server's error message; log in, and download the file again",
    b"invalid username": "is a server's error message; log in, and download the file again",
}


def describe(start: bytes) -> str | None:
    """A sentence's end that names the file, with the way out; None: it is none of these kinds."""
    if not start:
        return "is empty; copy or download it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for begin, what in _STARTS.items() if text.startswith(begin)), None)
