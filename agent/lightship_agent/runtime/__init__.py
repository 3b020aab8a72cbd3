"""An ONNX model in memory: session, predict, golden rows, and the probe process that tries it first."""
