"""A prepared TensorFlow Datasets folder in array_record, made without TensorFlow."""

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def write_folder(place: Path, splits: Mapping[str, Sequence[str]], shards: int = 1) -> Path:
    """Writes `place`/text_files/1.0.0: the splits' texts, with their number and words, in `shards` files a split."""
    import tensorflow_datasets as tfds

    builder = _builder()(data_dir=str(place), file_format="array_record")
    builder.texts = splits
    config = tfds.download.DownloadConfig(num_shards=shards)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        builder.download_and_prepare(download_config=config)
    return place / "text_files" / "1.0.0"


@functools.cache  # a process may define a name but once
def _builder():
    import tensorflow_datasets as tfds

    class TextFiles(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "number": np.int64, "words": tfds.features.Sequence(np.str_)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(texts) for name, texts in self.texts.items()}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "number": number, "words": text.split()}

    return TextFiles
