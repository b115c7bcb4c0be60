"""What a picture becomes, by values found without Pillow: levels, orientation, transparency, size."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from asib_jax.data import pictures
from asib_jax.data.pictures import read_pictures
from asib_jax.errors import UserError

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
DEEP[0, :4] = 0, 65535, 128, 129  # 128 / 257 is below a half, 129 / 257 above
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png(depth, kind, rows, **chunks):
    """A PNG of unfiltered rows of bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 7, 5, depth, kind, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def big(array):
    return [row.astype(">u2").tobytes() for row in array]


def read(path, image_size=0):
    """The picture, and what was done to it."""
    images, done = read_pictures([path], image_size)
    assert images.dtype == np.uint8 and len(images) == 1 and set(done.values()) <= {1}
    return images[0], list(done)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def grey(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, -1)


SCALED = "had 16 bits a channel, scaled to 8"
WHITE = "had transparent parts, composed on white"
TURNED = "were turned by their EXIF orientation"
FRAMES = "had several frames, the first of which was read"
ROUNDED = np.floor(DEEP / 257 + 0.5)  # of which no half is exact: 257 is odd
FILES = {
    "16 bits": ("a.png", png(16, 0, big(DEEP)), grey(ROUNDED), [SCALED]),
    "16 bits, pgm": ("a.pgm", b"P5\n7 5\n65535\n" + b"".join(big(DEEP)), grey(ROUNDED), [SCALED]),
    "16 bits of colour": (
        "a.png",
        png(16, 2, big(np.stack([DEEP, DEEP[::-1], DEEP], -1).reshape(5, -1))),
        np.stack([DEEP, DEEP[::-1], DEEP], -1) >> 8,
        [SCALED],
    ),
    "16 bits and a level of glass": (
        "a.png",
        png(16, 0, big(DEEP), tRNS=struct.pack(">H", DEEP[2, 3])),
        grey(np.where(DEEP[2, 3] == DEEP, 255, ROUNDED)),
        [SCALED, WHITE],
    ),
    "1 bit": ("a.png", png(1, 0, [b"\xaa"] * 5), grey(np.tile([255, 0, 255, 0, 255, 0, 255], (5, 1))), []),
    "2 bits": ("a.png", png(2, 0, [b"\x1b\x1b"] * 5), grey(np.tile([0, 85, 170, 255, 0, 85, 170], (5, 1))), []),
    "a palette": (
        "a.png",
        png(8, 3, [bytes([0, 1, 2, 2, 1, 0, 1])] * 5, PLTE=bytes(range(9))),
        np.tile(np.arange(9, dtype=np.uint8).reshape(3, 3)[[0, 1, 2, 2, 1, 0, 1]], (5, 1, 1)),
        [],
    ),
    "a palette with glass": (
        "a.png",
        png(8, 3, [bytes([0, 1, 2, 2, 1, 0, 1])] * 5, PLTE=bytes(range(9)), tRNS=b"\xff\x00"),
        np.tile(np.array([[0, 1, 2], [255] * 3, [6, 7, 8]], np.uint8)[[0, 1, 2, 2, 1, 0, 1]], (5, 1, 1)),
        [WHITE],
    ),
    "a colour of glass": (
        "a.png",
        png(8, 2, [row.tobytes() for row in COLOUR], tRNS=struct.pack(">3H", *COLOUR[1, 2])),
        np.where((COLOUR[1, 2] == COLOUR).all(-1, keepdims=True), 255, COLOUR),
        [WHITE],
    ),
    "opaque alpha": ("a.png", png(8, 6, [np.insert(row, 3, 255, 1).tobytes() for row in COLOUR]), COLOUR, []),
    "ppm": ("a.ppm", b"P6\n7 5\n255\n" + COLOUR.tobytes(), COLOUR, []),
    "another name": ("a.jpg", b"P6\n7 5\n255\n" + COLOUR.tobytes(), COLOUR, []),
}


@pytest.mark.parametrize("name", FILES)
def test_files_by_their_bytes(tmp_path, name):
    file, content, expected, done = FILES[name]
    (tmp_path / file).write_bytes(content)
    image, notes = read(tmp_path / file)
    np.testing.assert_array_equal(image, expected)
    assert notes == done


@pytest.mark.parametrize("file", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_formats_without_loss(tmp_path, file):
    image, notes = read(saved(tmp_path / file, COLOUR, **({"lossless": True} if file == "a.webp" else {})))
    np.testing.assert_array_equal(image, COLOUR)
    assert not notes


def test_sixteen_bits_of_tiff(tmp_path):
    image, notes = read(saved(tmp_path / "a.tif", DEEP))
    np.testing.assert_array_equal(image, grey(ROUNDED))
    assert notes == [SCALED]


@pytest.mark.parametrize("file", ["a.png", "a.webp", "a.tif"])
def test_alpha_is_composed_on_white(tmp_path, file):
    alpha = RNG.integers(1, 256, (5, 7, 1), dtype=np.uint8)  # WebP keeps no colour that nobody sees
    options = {"lossless": True} if file == "a.webp" else {}
    image, notes = read(saved(tmp_path / file, np.concatenate([COLOUR, alpha], -1), **options))
    share = alpha / 255
    np.testing.assert_allclose(image, share * COLOUR + (1 - share) * 255, atol=0.51)  # rounded once
    assert notes == [WHITE]


ORIENTED = {  # EXIF 2.32, 4.6.5: what the 0th row and column of the stored picture are
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("file", ["a.png", "a.webp", "a.tif", "a.jpg"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_orientation(tmp_path, orientation, file):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, _ = read(saved(tmp_path / f"plain_{file}", COLOUR, **({"lossless": True} if file == "a.webp" else {})))
    options = {"lossless": True} if file == "a.webp" else {}
    image, notes = read(saved(tmp_path / file, COLOUR, exif=exif, **options))
    np.testing.assert_array_equal(image, ORIENTED[orientation](plain))
    assert notes == ([TURNED] if orientation > 1 else [])


def test_damaged_exif_is_told(tmp_path, recwarn, caplog, monkeypatch):
    """The picture itself is whole, and the entry that is there counts."""
    monkeypatch.setattr(pictures.logger, "propagate", True)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.jpg", COLOUR, exif=exif)
    start = path.read_bytes().index(b"MM\0*")
    broken = b"MM\0*\0\0\0\x08\0\x09"  # that there are nine entries, of one
    path.write_bytes(path.read_bytes()[:start] + broken + path.read_bytes()[start + len(broken) :])
    assert read(path)[0].shape == (7, 5, 3)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("reading pictures, Pillow warned ") and "first: Corrupt EXIF data." in line
    assert not recwarn.list


def test_turned_pictures_have_their_turned_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = saved(tmp_path / "a.png", COLOUR.swapaxes(0, 1).copy())
    turned = saved(tmp_path / "b.png", COLOUR, exif=exif)
    images, _ = read_pictures([upright, turned])
    np.testing.assert_array_equal(images, [COLOUR.swapaxes(0, 1), COLOUR[::-1].swapaxes(0, 1)])
    with pytest.raises(UserError, match=r"a\.png is 7x5 but .*b\.png is 5x7; dataset\.image_size=N"):
        read_pictures([saved(tmp_path / "a.png", COLOUR), turned])


@pytest.mark.parametrize("file", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_of_several_frames_the_first(tmp_path, file):
    frames = [Image.fromarray(np.full((5, 7, 3), level, np.uint8)) for level in (0, 255)]
    frames[0].save(tmp_path / file, save_all=True, append_images=frames[1:])
    image, notes = read(tmp_path / file)
    assert image.shape == (5, 7, 3) and not image.any() and notes == [FRAMES]


@pytest.mark.parametrize(
    ("array", "file", "message"),
    [
        (DEEP.astype(np.int32), "a.tif", "levels of 32 bits"),
        (DEEP.astype(np.float32), "a.tif", "levels of 32 bits"),
        (DEEP.astype(np.float32), "a.pfm", "levels of 32 bits"),
        (COLOUR, "a.ico", "cannot identify"),
        (COLOUR, "a.tga", "cannot identify"),
        (COLOUR, "a.eps", "cannot identify"),
    ],
)
def test_what_has_no_plain_meaning_is_refused(tmp_path, array, file, message):
    Image.fromarray(array).save(tmp_path / file)
    with pytest.raises(UserError, match=rf"{file} cannot be read as a picture \(PNG, JPEG, .*{message}"):
        read_pictures([tmp_path / file])


def test_cmyk_is_converted_and_told(tmp_path):
    levels = np.full((8, 8, 4), [0, 255, 0, 0], np.uint8)
    Image.frombytes("CMYK", (8, 8), levels.tobytes()).save(tmp_path / "a.tif")
    image, notes = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(image, np.full((8, 8, 3), [255, 0, 255]))
    assert notes == ["were converted from CMYK to RGB"]


@pytest.mark.parametrize("file", ["a.png", "a.jpg"])
@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (64, 64), (65, 3000)])
def test_the_middle_square_is_resized_without_aliasing(tmp_path, file, shape):
    """Stripes of a pixel become grey; a ramp over the middle stays one; the sides are cut off."""
    side = min(shape)
    long = np.clip(((np.arange(max(shape)) + 0.5 - max(shape) / 2) / side + 0.5) * 255, 0, 255)
    red = np.broadcast_to(long if shape[1] >= shape[0] else long[:, None], shape)
    stripes = np.broadcast_to(np.indices(shape).sum(0) % 2 * 255, shape)
    array = np.stack([red, stripes, np.full(shape, 77)], -1).round().astype(np.uint8)
    options = {"quality": 95, "subsampling": 0} if file == "a.jpg" else {}
    image, notes = read(saved(tmp_path / file, array, **options), 8)
    assert image.shape == (8, 8, 3) and notes == ["were resized to 8 x 8"]
    expected = 255 * (np.arange(8) + 0.5) / 8
    found = image[..., 0] if shape[1] >= shape[0] else image[..., 0].T
    np.testing.assert_allclose(found[:, 1:-1], np.tile(expected[1:-1], (8, 1)), atol=4)
    np.testing.assert_allclose(image[1:-1, 1:-1, 1], 127.5, atol=4)
    np.testing.assert_allclose(image[1:-1, 1:-1, 2], 77, atol=3)


def test_smaller_pictures_are_enlarged_and_equal_ones_left(tmp_path):
    small, equal = saved(tmp_path / "a.png", COLOUR[:1, :1]), saved(tmp_path / "b.png", COLOUR[:5, :5].copy())
    images, done = read_pictures([small, equal], 5)
    np.testing.assert_array_equal(images[0], np.broadcast_to(COLOUR[0, 0], (5, 5, 3)))
    np.testing.assert_array_equal(images[1], COLOUR[:5, :5])
    assert done == {"were resized to 5 x 5": 1}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:50],
        lambda content: b"no picture",
        lambda content: content[:20] + b"\xff" * 4 + content[24:],
    ],
)
@pytest.mark.parametrize("image_size", [0, 3])
@pytest.mark.parametrize("place", [0, 1, 30])
def test_a_damaged_picture_is_named(tmp_path, damage, image_size, place):
    files = [saved(tmp_path / f"{k}.png", COLOUR) for k in range(31)]
    files[place].write_bytes(damage(files[place].read_bytes()))
    with pytest.raises(UserError, match=rf"/{place}\.png cannot be read as a picture"):
        read_pictures(files, image_size)


def test_rows_are_in_the_order_of_their_files(tmp_path):
    """However many threads read them, and in however many portions."""
    files = [saved(tmp_path / f"{k}.png", np.full((2, 2), k, np.uint8)) for k in range(200)]
    images, _ = read_pictures(files)
    np.testing.assert_array_equal(images[:, 1, 0, 2], np.arange(200))


def test_more_than_all_memory_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"1,000,000 images of 4000x4000x3 take 4.47e\+04 GiB, and this machine has .*image_size"
    ):
        pictures.room((1_000_000, 4000, 4000, 3))
    assert pictures.room((2, 3, 4, 1)).shape == (2, 3, 4, 1)
