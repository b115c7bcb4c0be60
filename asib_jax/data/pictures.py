"""Pictures as arrays: every file that Pillow reads without the help of other programs becomes uint8 RGB."""

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from asib_jax.data.archives import check_unpacked
from asib_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # by contents; some others Pillow gives to programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
logger = logging.getLogger("asib_jax")

_ORIENTATION = 0x0112  # in EXIF
_PICTURE_BYTES = 64 << 20  # of one picture, unpacked, however small its file
_AT_ONCE = 4096  # pictures that wait for a thread
_PLAIN = ("1", "L", "P", "RGB")  # modes that RGB holds without a loss


def read_pictures(files: Sequence[Path], image_size: int = 0) -> tuple[np.ndarray, Counter[str]]:
    """[N,H,W,3] of at least one file, and how many had what done to them; `_rgb` says what is done.

    image_size: 0: they must have one size. n: each becomes n x n, see `resized`.

    Pictures are of `FORMATS` by their contents, not their names. One is unpacked only once its header says that it has
    the size of the first or, with `image_size`, is not far larger than its file. Several threads read.

    Raises UserError naming one that cannot be read, has another size, or states one that only an attack has.
    """
    Image.init()  # all formats, by one thread
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)  # of damaged EXIF and the like
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _opened(files[0]) as picture:
            size = picture.size
            if not image_size:
                check_unpacked(len(files) * math.prod(size) * 3, sum(file.stat().st_size for file in files))

        def decoded(file: Path) -> tuple[np.ndarray, list[str]]:
            with _opened(file) as picture:
                if image_size:
                    check_unpacked(math.prod(picture.size) * 4, file.stat().st_size, _PICTURE_BYTES)
                elif sorted(picture.size) != sorted(size):
                    raise _other_size(files[0], size, file, picture.size)
                return _rgb(picture, image_size)

        first, _ = decoded(files[0])
        images = room((len(files), *first.shape))

        def read(row: int) -> list[str]:
            image, notes = decoded(files[row])
            if image.shape != first.shape:  # by its orientation
                raise _other_size(files[0], first.shape[1::-1], files[row], image.shape[1::-1])
            images[row] = image
            return notes

        done = Counter[str]()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:  # which Pillow lets run while it decodes
            for start in range(0, len(files), _AT_ONCE):
                for notes in threads.map(read, range(start, min(start + _AT_ONCE, len(files)))):
                    done.update(notes)
    if heard:
        logger.warning("reading pictures, Pillow warned %d times, first: %.200s", len(heard), heard[0].message)
    return images, done


def room(shape: tuple[int, ...]) -> np.ndarray:
    """An array for images, uint8 and not filled. UserError for more than all memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if math.prod(shape) > memory:
        raise UserError(
            f"{shape[0]:,} images of {'x'.join(map(str, shape[1:]))} take {math.prod(shape) / 2**30:.3g} GiB, and this "
            f"machine has {memory / 2**30:.3g}: make them smaller (dataset.image_size), or fewer"
        )
    return np.empty(shape, np.uint8)


@contextmanager
def _opened(file: Path) -> Iterator[ImageFile.ImageFile]:
    """The picture in a file; UserError naming it for whatever is raised while it is open."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            yield picture
    except UserError:
        raise
    except Exception as error:  # damaged pictures raise nearly anything
        raise UserError(f"{file} cannot be read as a picture ({', '.join(FORMATS)}): {error}") from error


def _other_size(first: Path, one: Sequence[int], file: Path, other: Sequence[int]) -> UserError:
    sizes = ("x".join(map(str, size)) for size in (one, other))
    return UserError(
        f"all pictures must have one size: {first} is {next(sizes)} but {file} is {next(sizes)}; "
        "dataset.image_size=N makes all of them N x N"
    )


def _rgb(picture: ImageFile.ImageFile, image_size: int) -> tuple[np.ndarray, list[str]]:
    """[H,W,3] of the first frame, turned as its EXIF says, on white where it is transparent, 16 bits scaled to 8; and
    what of that was done. Colour profiles are ignored, as data loaders do."""
    notes = []
    if ";16" in f"{picture.mode} {picture.tile}":  # of colours Pillow itself takes the upper 8 bits
        notes.append("had 16 bits a channel, scaled to 8")
    if getattr(picture, "is_animated", False):
        notes.append("had several frames, the first of which was read")
    if picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
        notes.append("were turned by their EXIF orientation")
    if image_size:
        picture.draft(None, (3 * image_size, 3 * image_size))  # JPEG is decoded at 1/2, 1/4 or 1/8, not below
    turned = ImageOps.exif_transpose(picture)
    if turned.mode == "F" or (turned.mode == "I" and picture.format not in ("PNG", "PPM")):
        raise ValueError("levels of 32 bits have no stated range: store 8 or 16")
    if turned.mode.startswith("I"):
        turned = _eight_bits(turned)
    if turned.has_transparency_data:
        with_alpha = turned.convert("RGBA")
        if with_alpha.getchannel("A").getextrema() != (255, 255):
            notes.append("had transparent parts, composed on white")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), with_alpha)
    elif turned.mode not in _PLAIN:
        notes.append(f"were converted from {turned.mode} to RGB")
    rgb = turned.convert("RGB")
    if image_size and rgb.size != (image_size, image_size):
        notes.append(f"were resized to {image_size} x {image_size}")
        rgb = resized(rgb, image_size)
    return np.asarray(rgb), notes


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Levels 0..65535 to the nearest of 0..255; a transparent one stays so."""
    levels = np.asarray(picture).astype(np.uint32)
    grey = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" not in picture.info:
        return grey
    opaque = np.where(levels == picture.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(opaque)))


def resized(picture: Image.Image, size: int) -> Image.Image:
    """size x size: the shorter side becomes that, of the longer one the middle is kept.

    By a Lanczos filter over three pixels of the smaller of both scales to each side, so that nothing is aliased.
    """
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
