"""From files to batches: sources, conversations, packing, mixtures and the exactly resumable loader."""

from jaxdistill.data.chat import ChatFormat, ChatTemplateError
from jaxdistill.data.evaluation import eval_batches
from jaxdistill.data.packing import Statistics
from jaxdistill.data.paths import open_path, source_at
from jaxdistill.data.pipeline import DataConfig, Loader, Weighted, make_loader, merge_states
from jaxdistill.data.sources import ArrayRecord, Concatenated, DataError, JsonLines, Parquet, PlainText
from jaxdistill.data.tfds_builder import build_tfds
from jaxdistill.data.tfds_source import Tfds, TfdsDirectory

__all__ = [
    "ArrayRecord",
    "ChatFormat",
    "ChatTemplateError",
    "Concatenated",
    "DataConfig",
    "DataError",
    "JsonLines",
    "Loader",
    "Parquet",
    "PlainText",
    "Statistics",
    "Tfds",
    "TfdsDirectory",
    "Weighted",
    "build_tfds",
    "eval_batches",
    "make_loader",
    "merge_states",
    "open_path",
    "source_at",
]
