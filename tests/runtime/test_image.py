"""Any image input, bit for bit where the official code defines the bits."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError, InputError, ResolutionError
from fastvlm_mlx.image import open_image, preprocess
from support.captions import damaged_avif
from support.seeded import GOLDEN

NAMES = ("wide", "tall", "square", "tiny_image", "gray", "palette", "one_row")


@pytest.fixture(scope="module")
def reference():
    with np.load(GOLDEN / "preprocess.npz") as arrays:
        return dict(arrays)


def png(picture: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "png", **options)
    return out.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("name", NAMES)
def test_bit_exact(reference, name, aspect):
    found = preprocess(reference[f"{name}.png"].tobytes(), 128, aspect)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference[f"{name}.{aspect}"])


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_transparency_is_composited_on_white_where_the_reference_drops_it(reference, aspect):
    data, right = reference["alpha.png"].tobytes(), reference[f"alpha.{aspect}"]
    with Image.open(io.BytesIO(data)) as picture:
        rgba = picture.convert("RGBA")
    # Without its alpha the picture is the reference: nothing but the compositing differs.
    np.testing.assert_array_equal(preprocess(rgba.convert("RGB"), 128, aspect), right)
    white = Image.new("RGBA", rgba.size, "white")
    composited = Image.alpha_composite(white, rgba).convert("RGB")
    found = preprocess(data, 128, aspect)
    np.testing.assert_array_equal(found, preprocess(composited, 128, aspect))
    assert (found != right).any()


def test_hidden_colours_stay_hidden():
    """A fully transparent picture is white, whatever colour lies under it; palette and gray too."""
    red = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    gray = Image.new("LA", (64, 64), (0, 0))
    for data in (png(red), png(palette, transparency=0), png(gray)):
        assert (preprocess(data, 64) == 255).all()


@pytest.mark.parametrize("size", [(700, 333), (333, 700), (1300, 64), (70, 1290), (129, 128), (1, 900), (513, 512)])
def test_banded_padding_is_padding(size):
    """The two passes in bands against the square in one piece, as the official code makes it."""
    picture = gradient(*size)
    side = max(size)
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    right = np.asarray(square.resize((128, 128), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocess(picture, 128, "pad"), right)


def test_all_inputs_are_one_image(tmp_path):
    picture = gradient(90, 70)
    data = png(picture)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    right = preprocess(picture, 64)
    for image in (data, bytearray(data), io.BytesIO(data), path, str(path), np.asarray(picture)):
        np.testing.assert_array_equal(preprocess(image, 64), right)
    with path.open("rb") as file:
        np.testing.assert_array_equal(preprocess(file, 64), right)
    np.testing.assert_array_equal(preprocess(np.asarray(picture)[::-1], 64), preprocess(picture.transpose(1), 64))


def test_exif_orientation_is_applied():
    picture = gradient(80, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    out = io.BytesIO()
    picture.save(out, "png", exif=exif)
    upright = open_image(out.getvalue())
    assert upright.size == (40, 80)
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


def test_16_bit_gray_is_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    found = np.asarray(open_image(png(Image.fromarray(values))))
    np.testing.assert_array_equal(found[0, :, 0], [0, 1, 128, 255])
    assert (found == found[..., :1]).all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "gif", save_all=True, append_images=frames[1:])
    assert tuple(preprocess(out.getvalue(), 64)[0, 0]) == (255, 0, 0)


def test_cmyk():
    out = io.BytesIO()
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(out, "tiff")
    assert tuple(preprocess(out.getvalue(), 64)[0, 0]) == (255, 0, 0)


def test_stretch_uses_the_whole_picture():
    picture = gradient(130, 70)
    right = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocess(picture, 64, "stretch"), right)


def test_a_thin_strip_is_cropped_without_being_blown_up():
    """20,000 x 1 px at 1024 would be 20,480,000 x 1,024; only the centre is resampled."""
    strip = Image.new("RGB", (20_000, 1), "black")
    strip.paste("white", (9_990, 0, 10_010, 1))
    found = preprocess(strip, 1024, "crop")
    assert found.shape == (1024, 1024, 3)
    assert (found[:, 512] == 255).all()
    padded = preprocess(strip, 1024, "pad")
    assert padded.shape == (1024, 1024, 3)


def test_crop_of_a_strip_agrees_with_the_long_way(monkeypatch):
    from fastvlm_mlx import image

    picture = gradient(900, 7)
    right = preprocess(picture, 64, "crop").astype(int)
    monkeypatch.setattr(image, "MAX_SIDE", 1000)  # now the strip's 8,228 px are too long
    found = preprocess(picture, 64, "crop").astype(int)
    assert np.abs(found - right).max() <= 1


def huge_header(side: int) -> bytes:
    """The head of a PNG that says it is side x side, RGB; a few hundred bytes that ask for gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "doesn't exist; check the path"),
        (b"", "empty or no image"),
        (b"not an image at all", "empty or no image"),
        (png(gradient(64, 64))[:2000], "truncated or damaged"),
        (huge_header(60_000), "too large"),
        (np.zeros((64, 64), np.uint8), r"\(H, W, 3\) uint8"),
        (np.zeros((64, 64, 3), np.float32), r"\(H, W, 3\) uint8"),
        (np.zeros((0, 64, 3), np.uint8), r"\(H, W, 3\) uint8"),
        (np.zeros((1, 70_000, 3), np.uint8), "1 px; the limit is 65536 px a side"),
        (Image.new("F", (8, 8)), "floating-point"),
        (Image.fromarray(np.full((2, 2), 100_000, np.int32)), "32-bit gray"),
        (42, "an image is a path"),
        ("https://example.org/a.png", "is an address; download the image first"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ImageError, match=message):
        preprocess(image, 64)


def test_large_photographs_are_taken():
    """Pillow warns above 89 megapixels and refuses above 178; phones take 200."""
    buffer = io.BytesIO()
    Image.new("L", (14_000, 14_000), 200).save(buffer, "png", compress_level=1)
    assert (preprocess(buffer.getvalue(), 64, "stretch") == 200).all()
    assert Image.MAX_IMAGE_PIXELS is not None  # the user's own limit is as it was


def test_a_closed_or_truncated_pil_image():
    truncated = Image.open(io.BytesIO(png(gradient(64, 64))[:2000]))
    with pytest.raises(ImageError, match="truncated or damaged"):
        preprocess(truncated, 64)
    closed = Image.open(io.BytesIO(png(gradient(64, 64))))
    closed.close()
    with pytest.raises(ImageError, match="can't be decoded"):
        preprocess(closed, 64)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        preprocess(tmp_path, 64)


@pytest.mark.parametrize("resolution", [1000, 0, -64, 63])
def test_bad_resolution(resolution):
    with pytest.raises(ResolutionError, match=f"multiple of 64 pixels, got {resolution}"):
        preprocess(gradient(8, 8), resolution)


def test_bad_aspect():
    with pytest.raises(InputError, match="one of pad, crop, stretch, native, anyres, got 'squash'"):
        preprocess(gradient(8, 8), 64, "squash")


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, struct.error, ZeroDivisionError])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, kind):
    def broken(*args, **options):
        raise kind("decoding of color planes failed")

    path = tmp_path / "broken.png"
    path.write_bytes(png(gradient(8, 8)))
    monkeypatch.setattr(Image.Image, "convert", broken)
    for source, name in ((path, str(path)), (gradient(8, 8), "the image")):
        with pytest.raises(ImageError, match="color planes") as caught:
            open_image(source)
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_image_is_not_blamed_on_it(monkeypatch, kind):
    def broken(*args, **options):
        raise kind

    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(kind):
        open_image(png(gradient(8, 8)))


def test_damaged_avif():
    """Its decoder raises RuntimeError where others raise OSError or SyntaxError."""
    with pytest.raises(ImageError, match="may be truncated or damaged"):
        open_image(damaged_avif())
