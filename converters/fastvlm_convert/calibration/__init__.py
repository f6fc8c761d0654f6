"""Pictures that a package's powers of two are chosen from, and others that the finished package is checked on.

A network's activations reach further on some pictures than on others, and further at some sizes than at others:
a package calibrated on noise of 512 px overflowed on other noise of 512 px and more. So the built-in set mixes
photographs with what drives activations hard (text, saturated flat colours, noise, checkerboards), and is made
anew at every size that is converted.

    pictures.py    Pictures, which gives arrays of any size, one at a time; the embedded photographs
    rendered.py    pictures drawn at the asked size
    folder.py      the caller's own pictures

Light to import: numpy and Pillow only.
"""

from fastvlm_convert.calibration.folder import MAX_PICTURES, from_folder
from fastvlm_convert.calibration.pictures import Pictures
from fastvlm_convert.calibration.sets import built_in, verification

__all__ = ["MAX_PICTURES", "Pictures", "built_in", "from_folder", "verification"]
