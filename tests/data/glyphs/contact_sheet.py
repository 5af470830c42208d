"""Every augmentation side by side, to look at: ``python -m tests.data.glyphs.contact_sheet DATASET OUT.png``."""

import sys

from PIL import Image, ImageDraw

from pfc.data.loading.augment import Augment
from pfc.data.loading.loader import TrainLoader
from pfc.data.records.dataset import RecordDataset

_COLUMNS, _GAP, _MARGIN = 8, 4, 100


def contact_sheet(dataset: RecordDataset) -> Image.Image:
    """One row for each augmentation, always applied; the same images as in the first row, which are as they are."""
    assert dataset.image_size is not None
    height, width = dataset.image_size
    rows = {"": Augment()}
    for name in Augment.model_fields:
        rows[name] = Augment.model_validate({name: {"probability": 1.0}})
    rows["all, half the time"] = Augment.model_validate({name: {"probability": 0.5} for name in Augment.model_fields})
    sheet = Image.new("RGB", (_MARGIN + _COLUMNS * (width + _GAP), len(rows) * (height + _GAP)), "white")
    for row, (name, augment) in enumerate(rows.items()):
        loader = TrainLoader(dataset, batch_size=_COLUMNS, image_size=(height, width), flip=False, augment=augment)
        pixels = ((next(loader).images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        loader.close()
        ImageDraw.Draw(sheet).text((2, row * (height + _GAP) + height // 2), name, fill="black")
        for column, picture in enumerate(pixels):
            sheet.paste(Image.fromarray(picture), (_MARGIN + column * (width + _GAP), row * (height + _GAP)))
    return sheet


if __name__ == "__main__":
    contact_sheet(RecordDataset.open(sys.argv[1])).save(sys.argv[2])
