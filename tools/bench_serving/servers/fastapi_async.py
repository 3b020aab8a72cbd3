"""Bench serving: FastAPI with a coroutine, which spares it the thread pool."""

import uvicorn
from fastapi import FastAPI
from onnx_models import NAMES, PORT, open_session, scores
from pydantic import BaseModel

app = FastAPI()
sessions = {name: open_session(name) for name in NAMES}


class Row(BaseModel):
    features: list[float]


class Answer(BaseModel):
    label: int
    scores: list[float]


@app.post("/{model}/predict")
async def predict(model: str, row: Row) -> Answer:
    found = scores(sessions[model], row.features)
    return Answer(label=found.index(max(found)), scores=found)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
