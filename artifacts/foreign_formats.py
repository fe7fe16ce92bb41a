"""Tells the formats of files that are not accepted, and what their owner can do with them. Decodes nothing."""

from __future__ import annotations

_CONVERT = "Convert it to JPEG or PNG."
_ASK = f"{_CONVERT} The operator may also add the format to ESPALIER_IMAGE_FORMATS."
_RAW = "Export it as JPEG, PNG or TIFF."

# For each format: a position, the bytes that a file of it has there, its name, and what to do.
_STARTS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xff\xd8\xff", "a JPEG", _ASK),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG", _ASK),
    (0, b"GIF8", "a GIF", _ASK),
    (8, b"WEBPVP8", "a WEBP", _ASK),
    (0, b"BM", "a BMP", _ASK),
    (8, b"CR\x02\0", "a camera's raw file (CR2)", _RAW),
    (0, b"IIU\0", "a camera's raw file (RW2)", _RAW),
    (0, b"IIRO", "a camera's raw file (ORF)", _RAW),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)", _RAW),
    (4, b"ftypcrx ", "a camera's raw file (CR3)", _RAW),
    (0, b"II*\0", "a TIFF", _ASK),
    (0, b"MM\0*", "a TIFF", _ASK),
    (0, b"II+\0", "a BigTIFF", _ASK),
    (0, b"MM\0+", "a BigTIFF", _ASK),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL", _CONVERT),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL", _CONVERT),
    (0, b"%PDF", "a PDF", "Export its pictures as JPEG or PNG."),
    (0, b"%!PS", "a PostScript file", _CONVERT),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS", _CONVERT),
    (0, b"8BPS", "a Photoshop file", "Export it as JPEG or PNG."),
    (0, b"gimp xcf", "a GIMP file", "Export it as JPEG or PNG."),
    (0, b"\0\0\1\0", "an icon (ICO)", _CONVERT),
    (0, b"icns", "an icon (ICNS)", _CONVERT),
    (0, b"DDS ", "a DDS texture", _CONVERT),
    (0, b"\x01\xda", "an SGI image", _CONVERT),
    (0, b"SIMPLE  =", "a FITS file", "Scale its values and save them as 8- or 16-bit PNG or TIFF."),
    (0, b"CDF", "a NetCDF file", "Scale its values and save them as 8- or 16-bit PNG or TIFF."),
    (0, b"\x89HDF", "an HDF5 file", "Scale its values and save them as 8- or 16-bit PNG or TIFF."),
    (128, b"DICM", "a DICOM file", "Export it as 8- or 16-bit PNG or TIFF."),
    (0, b"\x93NUMPY", "a NumPy array", "Save it as PNG."),
    (0, b"PK\x03\x04", "a zip", "Send images, or upload the zip as a data set."),
    (0, b"\x1f\x8b", "a gzip file", "Unpack it."),
    (0, b"P4", "a PNM", _CONVERT),
    (0, b"P5", "a PNM", _CONVERT),
    (0, b"P6", "a PNM", _CONVERT),
    (4, b"ftypqt", "a film", "Export single frames as JPEG or PNG."),
    (4, b"ftypisom", "a film", "Export single frames as JPEG or PNG."),
    (4, b"ftypmp4", "a film", "Export single frames as JPEG or PNG."),
    (8, b"AVI ", "a film", "Export single frames as JPEG or PNG."),
    (0, b"\x1a\x45\xdf\xa3", "a film", "Export single frames as JPEG or PNG."),
    (0, b"data:image/", "the text of a data URL", "Send the bytes that its base64 stands for."),
    (0, b"<!DOCTYPE html", "a web page", "Its address may need a login; download the image itself."),
    (0, b"<html", "a web page", "Its address may need a login; download the image itself."),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "Fetch the image itself with `git lfs pull`."),
)
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis")
_HEIC_ADVICE = (
    "a HEIC, which this service does not read. Convert it to JPEG, for example with `heif-convert`. iPhones write JPEG "
    "with Settings › Camera › Formats › Most Compatible."
)


def advice(data: bytes) -> str:
    """Return the format of a file that is not accepted, and what to do with it, as the end of a sentence.

    For an unknown format, the answer is `something else.`.
    """
    if not data.strip(b"\0"):
        return "an empty file, or only zeros. Copy it again."
    if data[4:8] == b"ftyp":
        brands = data[8:64]
        if any(brand in brands for brand in _HEIC):
            return _HEIC_ADVICE
        if b"avif" in brands:
            return f"an AVIF. {_ASK}"
    if b"<svg" in data[:1024]:
        return f"an SVG. {_CONVERT}"
    for position, start, name, what_to_do in _STARTS:
        if data.startswith(start, position):
            return f"{name}. {what_to_do}"
    return "something else."
