"""The model as MLflow serves it.

    text, doc_id (optional)  ->  doc_id, tags, probabilities, scores

MLflow runs this file to make the model, with the package logged beside it; the data come from `Tagger.load`.
"""

from typing import Any

import pandas as pd
import pyarrow as pa
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from pipeline.errors import DataError
from pipeline.learners.tagger import Tagger


class TaggerModel(PythonModel):
    """Tags of texts, most probable first."""

    def load_context(self, context: PythonModelContext) -> None:
        self.tagger = Tagger.load(context.artifacts["tagger"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row a text; without a column `doc_id` the rows are counted from 0.  An empty text counts as no term.

        Raises DataError where the column `text` is missing or holds something else.
        """
        texts = _texts(model_input)
        given = model_input["doc_id"] if "doc_id" in model_input else range(len(texts))
        doc_ids = [str(doc_id) for doc_id in given]
        max_tags = (params or {}).get("max_tags", self.tagger.settings["max_tags"])
        if max_tags < 0:
            raise DataError(
                f"max_tags is {max_tags}; expected 0 (no limit) or the number of tags a document gets at most"
            )
        tagger = self.tagger._replace(settings={**self.tagger.settings, "max_tags": max_tags})
        rows = tagger.tag(pa.array(doc_ids, pa.string()), texts)["tags"].to_pylist()
        columns = {"tags": "label", "probabilities": "probability", "scores": "score"}
        return pd.DataFrame(
            {"doc_id": doc_ids}
            | {name: [[tag[field] for tag in row] for row in rows] for name, field in columns.items()}
        )


def signature(max_tags: int) -> ModelSignature:
    """Columns in and out, and the parameter max_tags with its default."""
    return ModelSignature(
        Schema([ColSpec(DataType.string, "text"), ColSpec(DataType.string, "doc_id", required=False)]),
        Schema(
            [
                ColSpec(DataType.string, "doc_id"),
                ColSpec(Array(DataType.string), "tags"),
                ColSpec(Array(DataType.double), "probabilities"),
                ColSpec(Array(DataType.double), "scores"),
            ]
        ),
        ParamSchema([ParamSpec("max_tags", DataType.long, max_tags)]),
    )


def _texts(frame):
    if not isinstance(frame, pd.DataFrame) or "text" not in frame:
        found = ", ".join(map(str, frame.columns)) if isinstance(frame, pd.DataFrame) else type(frame).__name__
        raise DataError(
            f"the input holds {found or 'no column'}; expected a frame with a column `text`, and `doc_id` if wanted"
        )
    texts = frame["text"]
    try:
        return pa.array(texts.where(texts.notna(), "").tolist(), pa.string())
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise DataError(f"column `text` holds something that is not text ({error}); expected strings") from error


set_model(TaggerModel())
